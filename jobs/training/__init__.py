"""The training loop: open a job, train chunks, save and restore the complete state."""
