"""Checkpoints in object storage: a store is a URI, a publication a directory with a manifest."""
