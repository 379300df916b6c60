-- Run once, when PostgreSQL's volume is new. Prefect's database is the one that POSTGRES_DB names.
CREATE DATABASE mlflow;
