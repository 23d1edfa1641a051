"""Experiments: many runs that differ in a few settings, and the table and the picture that they make."""
