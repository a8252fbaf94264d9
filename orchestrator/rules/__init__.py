"""All decisions of orch, as pure functions that take the state and the time as arguments."""
