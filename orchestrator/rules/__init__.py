"""Every decision of orch, as pure functions: state and time are arguments, and None means no."""
