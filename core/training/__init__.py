"""Recovery training: the learning-rate schedule, the loop and its states."""
