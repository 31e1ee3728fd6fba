"""Values in device memory, looked at before a call if FLASH_MLA_DEBUG=1: each look waits for the device.

The hot path trusts lengths, table entries, slots, indices and scales; a wrong one reads or writes somewhere else. Not
looked at while a CUDA graph is being captured or a graph traced: there is nothing to read yet.
"""

from __future__ import annotations

import os

import torch

from .codec import COLUMNS_PER_SCALE, row_layout
from .contract import AppendCall, DecodeCall

__all__ = ["check_append", "check_decode", "check_scales", "check_sparse", "is_on"]


def is_on() -> bool:
    """Whether FLASH_MLA_DEBUG is 1 and values can be looked at now."""
    if os.environ.get("FLASH_MLA_DEBUG") != "1" or torch.compiler.is_compiling():
        return False
    return not (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing())


def _first(wrong: torch.Tensor) -> list[int]:
    where: list[int] = wrong.nonzero()[0].tolist()
    return where


def check_decode(
    function: str, call: DecodeCall, kv_cache: torch.Tensor, block_table: torch.Tensor, cache_seqlens: torch.Tensor
) -> None:
    """Raise ValueError unless lengths fit the table, every entry in use names a page, and scales are numbers."""
    num_blocks, block_size = call.num_blocks, call.block_size
    most = block_table.shape[1] * block_size
    wrong = (cache_seqlens < 0) | (cache_seqlens > most)
    if bool(wrong.any()):
        (row,) = _first(wrong)
        raise ValueError(
            f"flash_mla.{function}: cache_seqlens must be in 0..{most} (max_blocks={block_table.shape[1]} pages of "
            f"{block_size}), got {int(cache_seqlens[row])} at [{row}]"
        )
    used = torch.arange(block_table.shape[1], device=block_table.device) * block_size < cache_seqlens[:, None]
    wrong = used & ((block_table < 0) | (block_table >= num_blocks))
    if bool(wrong.any()):
        row, index = _first(wrong)
        raise ValueError(
            f"flash_mla.{function}: block_table must name pages in 0..{num_blocks - 1}, "
            f"got {int(block_table[row, index])} at [{row}, {index}]"
        )
    if call.fp8:
        token = torch.arange(most, device=block_table.device)
        slots = block_table.long().repeat_interleave(block_size, 1) * block_size + token % block_size
        check_scales(function, call, kv_cache, slots[token < cache_seqlens[:, None]])


def check_append(function: str, call: AppendCall, slots: torch.Tensor) -> None:
    """Raise ValueError unless every slot lies inside the pool."""
    num_slots = call.num_blocks * call.block_size
    wrong = (slots < 0) | (slots >= num_slots)
    if bool(wrong.any()):
        row, index = _first(wrong)
        raise ValueError(
            f"flash_mla.{function}: slots must be in 0..{num_slots - 1}, "
            f"got {int(slots[row, index])} at [{row}, {index}]"
        )


def check_sparse(
    function: str,
    call: DecodeCall,
    kv_cache: torch.Tensor,
    indices: torch.Tensor,
    topk_length: torch.Tensor | None,
) -> None:
    """Raise ValueError unless every index that counts is negative or inside the pool, and scales are numbers."""
    num_slots, topk = call.num_blocks * call.block_size, indices.shape[2]
    if topk_length is not None:
        wrong = (topk_length < 0) | (topk_length > topk)
        if bool(wrong.any()):
            (row,) = _first(wrong)
            raise ValueError(
                f"flash_mla.{function}: topk_length must be in 0..topk={topk}, got {int(topk_length[row])} at [{row}]"
            )
        place = torch.arange(topk, device=indices.device)
        indices = indices.masked_fill(place >= topk_length[:, None, None], -1)
    wrong = indices >= num_slots
    if bool(wrong.any()):
        row, query, index = _first(wrong)
        raise ValueError(
            f"flash_mla.{function}: indices must be negative or below the {num_slots} rows of kv_cache, "
            f"got {int(indices[row, query, index])} at [{row}, {query}, {index}]"
        )
    if call.fp8:
        check_scales(function, call, kv_cache, indices[indices >= 0])


def check_scales(function: str, call: DecodeCall | AppendCall, kv_cache: torch.Tensor, slots: torch.Tensor) -> None:
    """Raise ValueError unless the scales of some FP8 rows are finite and above 0.

    Args:
        function: the name that the error carries.
        call: gives the latent shape.
        kv_cache: FP8 rows `[num_blocks, block_size, h_kv, row_bytes]`.
        slots: integers `[n]`, block * block_size + offset, all inside the pool.
    """
    layout, slots = row_layout(call.kv_lora_rank, call.qk_rope_head_dim), slots.long()
    rows = kv_cache.view(torch.uint8)[slots // call.block_size, slots % call.block_size]
    scales = rows[..., layout.scales : layout.k_rope].contiguous().view(torch.float32)
    wrong = ~(scales.isfinite() & (scales > 0))
    if bool(wrong.any()):
        row, head, group = _first(wrong)
        raise ValueError(
            f"flash_mla.{function}: scales of FP8 rows must be finite and above 0, got "
            f"{float(scales[row, head, group])} for columns {COLUMNS_PER_SCALE * group}.."
            f"{COLUMNS_PER_SCALE * (group + 1) - 1} of slot {int(slots[row])}: a latent that was not finite, or a row "
            "that nobody wrote"
        )
