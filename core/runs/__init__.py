"""Runs in a store: their identity, what they have measured, which there are."""
