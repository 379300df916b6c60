"""What a run's page in Prefect shows.

May import `hubert`.
"""
