"""The `orch` command: parses options, calls other packages, and prints results. One module per group of commands."""
