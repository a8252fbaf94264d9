"""What runs on the GPU: models, data and the training loop. Knows no cluster and no leaderboard."""
