"""Thin adapters over other people's systems, one module and one extra each; `import flash_mla` imports none of them."""
