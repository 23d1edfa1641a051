"""The pipeline on this machine."""
