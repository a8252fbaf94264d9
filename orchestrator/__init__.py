"""orch: a Slurm-native, coordinator-free population trainer."""

__version__ = "0.2.0"
