"""The training loop: open a job, train chunks, keep and restore the whole state."""
