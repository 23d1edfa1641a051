"""Base models: where they come from, what an address stands for today, their licence."""
