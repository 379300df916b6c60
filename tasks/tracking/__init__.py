"""MLflow: losses, checkpoints and scores, and the registry of teachers. Nothing else imports mlflow.

May import `hubert`.
"""
