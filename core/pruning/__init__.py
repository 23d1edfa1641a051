"""Which groups a model can lose: calibration, importance, sparsity, plans and surgery."""
