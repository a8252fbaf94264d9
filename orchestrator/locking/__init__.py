"""The locks around the SQLite database: which lock works on which file system, and tests that prove it."""
