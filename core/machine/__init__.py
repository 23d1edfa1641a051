"""This machine's memory, cores and number formats."""
