"""Models: sizes of each layer, families, configs, building, checkpoints, the loss."""
