"""The speed of two checkpoints side by side."""
