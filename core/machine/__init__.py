"""What the machine has and may use: memory, cores, number formats."""
