"""orch: trains a population of models on Slurm, without a coordinator."""

__version__ = "0.2.0"
