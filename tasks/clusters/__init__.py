"""Dask workers wherever a cluster file says, and whether a site can give what it asks for.

May import `hubert`, `tasks.slurm` and `tasks.service`.
"""
