"""Finished runs: records, statistics, claims, the regression check, MLflow."""
