"""How the sparsity of a step is spread over the layers: ``prune.widths``."""
