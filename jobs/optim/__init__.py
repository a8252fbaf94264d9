"""Optimizers and learning-rate schedules of a profile."""
