"""What a run has measured: MLflow runs, the record of a run and its report."""
