"""How the tokens of a prefix get out of the pages of one cache and into those of another, layer by layer."""

from __future__ import annotations

import itertools
from typing import Any

import torch

from ..codec import row_layout
from .cache import PagedLatentCache
from .indexed import PagedIndexedLayer

__all__ = ["fill", "taken"]


def taken(
    cache: PagedLatentCache, row: int, columns: torch.Tensor
) -> tuple[dict[str, torch.Tensor], dict[str, dict[str, Any]]]:
    """The first tokens of one row of a cache.

    Args:
        cache: holds them in every layer.
        row: of the batch.
        columns: int64 `[num_tokens]`, the padded positions of the row's first real tokens.
    Returns: tensors on the CPU and what a header says of the layers, both as in `prefix_file`.
    """
    tensors, layers = {}, {}
    for layer in cache.paged_layers:
        if layer.kv_cache is not None:  # layers that read another one's latents have none
            tensors[f"layers.{layer.index}.rows"] = layer.rows_of(row, len(columns)).cpu()
            layers[str(layer.index)] = {
                "kv_lora_rank": layer.kv_lora_rank,
                "qk_rope_head_dim": layer.qk_rope_head_dim,
                "dtype": str(layer.dtype).removeprefix("torch."),
            }
        if isinstance(layer, PagedIndexedLayer):
            keys = layer.indexer_keys_of(row, columns)
            if keys is not None:
                tensors[f"layers.{layer.index}.indexer_keys"] = keys.cpu()
    return tensors, layers


def fill(
    cache: PagedLatentCache,
    model: Any,
    name: str,
    layers: dict[str, dict[str, Any]],
    tensors: dict[str, torch.Tensor],
    num_tokens: int,
    batch: int,
) -> None:
    """Put a prefix into an empty cache; after any fault it is empty again.

    Args:
        cache: empty.
        model: says on which device each layer is.
        name: of the file, for messages.
        layers, tensors: of the file.
        num_tokens: how many of its tokens to take.
        batch: rows to give it to.
    Raises: ValueError: tensors that do not fit the layers, or more tokens than a fixed capacity takes.
    """
    tensors = {key: tensor[:num_tokens] for key, tensor in tensors.items()}
    rows = _checked(name, cache, layers, tensors, num_tokens)
    capacity = cache.max_cache_len
    if capacity is not None and num_tokens >= capacity:
        raise ValueError(
            f"flash_mla.PrefixStore.load: max_cache_len must be more than the {num_tokens} tokens of the prefix, "
            f"got {capacity}"
        )
    devices = _devices(model)
    # A growing cache gets one row, which the others then share; with fixed capacity each row owns its pages.
    made = 1 if capacity is None else batch
    try:
        for index, layer in enumerate(cache.layers):
            device = devices.get(index, model.device)
            if index in rows:
                info = layers[str(index)]
                latents, k_rope = (
                    torch.empty((made, 1, 0, info[dim]), dtype=getattr(torch, info["dtype"]), device=device)
                    for dim in ("kv_lora_rank", "qk_rope_head_dim")
                )
                layer.lay_down(rows[index].to(device), latents, k_rope)
            keys = tensors.get(f"layers.{index}.indexer_keys")
            if keys is not None:
                layer.lay_down_indexer(keys.to(device).expand(made, -1, -1).contiguous())
        if batch > made:
            cache.batch_repeat_interleave(batch)
    except BaseException:
        cache.reset()
        raise


def _checked(
    name: str,
    cache: PagedLatentCache,
    layers: dict[str, dict[str, Any]],
    tensors: dict[str, torch.Tensor],
    num_tokens: int,
) -> dict[int, torch.Tensor]:
    """Rows by layer; raises ValueError if they do not fit the cache's layers."""
    rows = {}
    for text, info in layers.items():
        index, rank, rope = int(text), info["kv_lora_rank"], info["qk_rope_head_dim"]
        width = row_layout(rank, rope).row_bytes if cache.dtype == "fp8" else rank + rope
        dtype = "uint8" if cache.dtype == "fp8" else info["dtype"]
        found = tensors.get(f"layers.{text}.rows")
        own = cache.group.kv_lora_ranks[index] if index < len(cache.layers) else None
        if found is None or own != rank or found.shape != (num_tokens, width) or str(found.dtype) != f"torch.{dtype}":
            came = "none" if found is None else f"{found.dtype} {tuple(found.shape)}"
            raise ValueError(
                f"{name}: layer {index} must have rows of kv_lora_rank={own}, {dtype} {(num_tokens, width)}, got {came}"
            )
        rows[index] = found
    for key, tensor in tensors.items():
        if tensor.shape[0] != num_tokens:
            raise ValueError(f"{name}: {key} must have {num_tokens} rows, got {tensor.shape[0]}")
    return rows


def _devices(model: Any) -> dict[int, torch.device]:
    """Where each layer's latents are made, by layer number."""
    found = {}
    for module in model.modules():
        if hasattr(module, "kv_b_proj") and hasattr(module, "layer_idx"):
            tensors = itertools.chain(module.kv_b_proj.parameters(), module.kv_b_proj.buffers())
            found[module.layer_idx] = next(tensor.device for tensor in tensors)
    return found
