"""What a model is made of: sizes of each layer, families, building and checkpoints."""
