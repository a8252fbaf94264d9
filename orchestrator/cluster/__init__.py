"""Where jobs run: Slurm, this machine, this process. The only package that imports submitit."""
