"""Is this place fit to run? Facts are gathered first; pure functions turn them into findings."""
