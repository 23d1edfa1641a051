"""Runs in a store: their identity, their measurements, their overview."""
