"""The mask of an attention call under "flash_mla": over the new tokens only where the cache is paged, the same as under
"sdpa" everywhere else. What is stored stays visible: a later 2D mask that hides it again is not looked at.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers.masking_utils import causal_mask_function, sdpa_mask

from .models import require_mla

__all__ = ["flash_mla_mask"]

# Layer types whose modules slice the mask themselves and so must always get one (Transformers 5.17 has the long name).
SPARSE_LAYER_TYPES = frozenset({"indexed_attention", "deepseek_sparse_attention"})


def flash_mla_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | torch.Tensor = 0,
    kv_offset: int | torch.Tensor = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    allow_is_causal_skip: bool = True,
    config: Any = None,
    **kwargs: Any,
) -> torch.Tensor | None:
    """Bool mask `[batch, 1, q_length, kv_length]`, True = visible, or None for plain causal attention.

    Called by Transformers' `create_causal_mask` and its siblings (transformers/masking_utils.py). The paged cache asks
    for keys from `kv_offset` = its length on, `kv_length` = `q_length` of them.

    Raises: ValueError: a causal model without `kv_lora_rank`.
    """
    # Only bidirectional masks are offered this skip: towers of a composite model, which may well have no latents.
    is_causal = "allow_is_bidirectional_skip" not in kwargs
    if is_causal:
        require_mla(config)
        if SPARSE_LAYER_TYPES & set(getattr(config, "layer_types", None) or ()):
            allow_is_causal_skip = False
    starts_empty = isinstance(kv_offset, int) and kv_offset == 0
    new_tokens_only = is_causal and kv_length == q_length and not (starts_empty and not allow_is_causal_skip)
    plain = mask_function is causal_mask_function
    if new_tokens_only and plain:
        new = _new_columns(attention_mask, q_length, kv_offset)
        if new is None:
            return None
        if q_length == 1:
            return new.view(-1, 1, 1, 1)
        # One wait per padded forward; a batch without padding then keeps the plain causal path. Not while compiling.
        if not torch.compiler.is_compiling() and bool(new.all()):
            return None
        causal = torch.ones((q_length, q_length), dtype=torch.bool, device=new.device).tril()
        return causal & new[:, None, None, :]
    if new_tokens_only and not starts_empty:
        # An overlay may hide context too, which a mask over the new tokens cannot say: cover everything.
        kv_length, kv_offset = kv_length + int(kv_offset), 0
    return sdpa_mask(  # type: ignore[no-any-return]
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        allow_is_causal_skip=allow_is_causal_skip,
        config=config,
        **kwargs,
    )


def _new_columns(
    attention_mask: torch.Tensor | None, q_length: int, kv_offset: int | torch.Tensor
) -> torch.Tensor | None:
    """The columns of a 2D mask `[batch, positions]` that speak of the new tokens, bool `[batch, q_length]`."""
    if attention_mask is None:
        return None
    width = attention_mask.shape[1]
    if q_length > 1 and not torch.compiler.is_compiling():
        kv_offset = int(kv_offset)  # the caller waits for the device in any case
    if isinstance(kv_offset, int):
        columns = attention_mask[:, kv_offset : kv_offset + q_length]
        if columns.shape[1] != q_length:
            raise ValueError(
                f"flash_mla: attention_mask must cover the {kv_offset} cached and {q_length} new positions, "
                f"got {tuple(attention_mask.shape)}"
            )
    else:
        steps = torch.arange(q_length, device=attention_mask.device)
        columns = attention_mask.index_select(1, (kv_offset + steps).clamp(max=width - 1))
    return columns.to(torch.bool)
