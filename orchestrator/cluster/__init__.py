"""Queues for worker jobs: on Slurm, on this machine or in this process. Only this package imports submitit."""
