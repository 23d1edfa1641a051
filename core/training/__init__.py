"""Recovery training: the mixture of texts, packing, the learning-rate schedule and the loop."""
