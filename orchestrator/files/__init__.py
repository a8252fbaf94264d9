"""What a run keeps on disk: checkpoints and their records, atomic writes, permissions, the disk budget."""
