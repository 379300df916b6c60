"""Programs for people who work on the project: set-up, a virtual Slurm, a demo on it."""
