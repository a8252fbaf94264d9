"""The `orch` command: parse, wire, print. One module a command group."""
