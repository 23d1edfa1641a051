"""Choosing and removing groups: scores, importance, sparsity, plans and surgery."""
