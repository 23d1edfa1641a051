"""Perplexity and zero-shot benchmarks of a checkpoint."""
