"""Thin adapters that put a model with a paged cache behind other people's systems; `import flash_mla` imports none."""
