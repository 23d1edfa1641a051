"""How fast two checkpoints are side by side."""
