"""The `orch` command: parses options, calls the code that does the work, prints. One module per group of commands."""
