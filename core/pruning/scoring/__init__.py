"""Scores of layers and groups, computed with only one layer's gradients in memory at a time."""
