"""Models, data and the training loop: the code that runs on the GPU, independent of cluster and leaderboard."""
