"""A run's files on disk: checkpoints and their records, atomic writes, permissions, the disk budget."""
