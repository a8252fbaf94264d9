"""Which lock around the SQLite database holds on which file system, and the proof that it does."""
