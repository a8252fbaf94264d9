"""Loggers write a run's curves. The setting "loggers" lists them: built-in names, or "my_module:MyLogger"."""

from __future__ import annotations

from jobs.loggers.logger import Logger, Place, Points, Series

__all__ = ["Logger", "Place", "Points", "Series"]
