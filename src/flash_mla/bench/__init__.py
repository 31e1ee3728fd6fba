"""Measurements behind `flash-mla bench`: the decode kernel by shape, `generate()` by step."""
