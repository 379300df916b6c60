"""The service on one machine: Prefect, MLflow and a worker, started, watched and stopped.

May import `hubert`.
"""
