"""The compared systems, as far as they decide otherwise than Adapt-Pruner under other settings."""
