"""Training by several processes (ranks), one a GPU: started, kept in step, and ended together."""
