"""Slurm: its commands, a site's settings, trainings and Dask workers as jobs.

May import `hubert` and `tasks.service`.
"""
