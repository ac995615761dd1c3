"""What finished runs wrote: records, statistics, the regression check, MLflow."""
