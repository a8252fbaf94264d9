"""Loggers: where a run's curves go. The setting "loggers" names them: built in, or "my_module:MyLogger"."""

from __future__ import annotations

from jobs.loggers.logger import Logger, Place, Points, Series

__all__ = ["Logger", "Place", "Points", "Series"]
