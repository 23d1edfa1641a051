"""Texts and conversations: read, mixed, tokenized, packed."""
