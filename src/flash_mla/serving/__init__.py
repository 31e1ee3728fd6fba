"""Thin adapters that put a model with a paged cache behind something else; each is imported by its own name."""
