"""The FP8 row of a latent cache: what its bytes mean, in plain torch. Kernels write and read the same bytes.

A row is `[latent: kv_lora_rank x e4m3 | scales: kv_lora_rank / 128 x fp32 | rotated key: qk_rope_head_dim x bf16 |
padding to a multiple of 16 bytes]`. One scale multiplies the 128 columns that it stands for:

| latent shape (kv_lora_rank, qk_rope_head_dim) | bytes per token | in bf16 |
|---|---|---|
| (512, 64) | 512 + 16 + 128 = 656 | 1,152 |
| (256, 64) | 256 + 8 + 128, padded: 400 | 640 |
| (256, 32) | 256 + 8 + 64, padded: 336 | 576 |
| (128, 32) | 128 + 4 + 64, padded: 208 | 320 |

The first of them is the row of DeepSeek FlashMLA's FP8 cache (its README, "FP8 KV cache").
"""

from __future__ import annotations

from typing import NamedTuple

import torch

__all__ = [
    "COLUMNS_PER_SCALE",
    "LARGEST",
    "ROW_ALIGNMENT",
    "SMALLEST_SCALE",
    "RowLayout",
    "decode_rows",
    "encode_rows",
    "row_layout",
]

COLUMNS_PER_SCALE = 128
LARGEST = 448.0  # of e4m3
# Scales are at least this: columns all below 448 * 2^-100 = 3.5e-28 lose bits then, and a scale is never zero.
SMALLEST_SCALE = 2.0**-100
ROW_ALIGNMENT = 16  # bytes: what one load of a kernel takes


class RowLayout(NamedTuple):
    """Where the parts of an FP8 row begin, in bytes; the latent begins at 0."""

    scales: int
    k_rope: int
    end: int  # of the rotated key
    row_bytes: int  # with padding


def row_layout(kv_lora_rank: int, qk_rope_head_dim: int) -> RowLayout:
    """Offsets of the parts of a row.

    Raises: ValueError: 128 does not divide `kv_lora_rank`.
    """
    if kv_lora_rank < 1 or kv_lora_rank % COLUMNS_PER_SCALE:
        raise ValueError(
            f"flash_mla: an FP8 cache needs a kv_lora_rank that {COLUMNS_PER_SCALE} divides, got {kv_lora_rank}"
        )
    k_rope = kv_lora_rank + 4 * (kv_lora_rank // COLUMNS_PER_SCALE)
    end = k_rope + 2 * qk_rope_head_dim
    return RowLayout(kv_lora_rank, k_rope, end, -(-end // ROW_ALIGNMENT) * ROW_ALIGNMENT)


def encode_rows(latent: torch.Tensor, k_rope: torch.Tensor) -> torch.Tensor:
    """Rows of a cache from latents and rotated keys.

    A scale is the largest magnitude of its 128 columns / 448, in fp32, as it comes (not rounded to a power of two), and
    at least 2^-100; NaN where a column is not finite. Columns are rounded to the nearest e4m3, ties to even.

    Args:
        latent: `[..., kv_lora_rank]`, any floating dtype.
        k_rope: `[..., qk_rope_head_dim]`, any floating dtype; stored as bf16.
    Returns: uint8 `[..., row_bytes]`; padding is 0.
    Raises: ValueError: 128 does not divide `kv_lora_rank`.
    """
    layout = row_layout(latent.shape[-1], k_rope.shape[-1])
    groups = latent.float().unflatten(-1, (-1, COLUMNS_PER_SCALE))
    largest = groups.abs().amax(-1, keepdim=True)
    # A tensor: by a number torch multiplies with its rounded reciprocal on CUDA, and a third of the scales are off by a
    # bit.
    quotient = largest / torch.full_like(largest, LARGEST)
    scales = torch.where(largest.isfinite(), quotient.clamp(min=SMALLEST_SCALE), float("nan"))
    rows = torch.zeros((*latent.shape[:-1], layout.row_bytes), dtype=torch.uint8, device=latent.device)
    codes = (groups / scales).to(torch.float8_e4m3fn).flatten(-2)
    rows[..., : layout.scales] = codes.view(torch.uint8)
    rows[..., layout.scales : layout.k_rope] = scales.squeeze(-1).contiguous().view(torch.uint8)
    rows[..., layout.k_rope : layout.end] = k_rope.to(torch.bfloat16).contiguous().view(torch.uint8)
    return rows


def decode_rows(
    rows: torch.Tensor, kv_lora_rank: int, qk_rope_head_dim: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents `[..., kv_lora_rank]` and rotated keys `[..., qk_rope_head_dim]` of rows, in `dtype`.

    A latent is its code times its scale, multiplied in fp32 (fp64 for fp64) and rounded once.

    Args:
        rows: `[..., row_bytes]` of one-byte elements.
        kv_lora_rank, qk_rope_head_dim: the latent shape.
        dtype: of the result, floating.
    Raises: ValueError: rows of another width than this latent shape has.
    """
    layout = row_layout(kv_lora_rank, qk_rope_head_dim)
    if rows.shape[-1] != layout.row_bytes:
        raise ValueError(
            f"flash_mla: FP8 rows of ({kv_lora_rank}, {qk_rope_head_dim}) columns have {layout.row_bytes} bytes, "
            f"got {rows.shape[-1]}"
        )
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    rows = rows.view(torch.uint8)
    codes = rows[..., : layout.scales].contiguous().view(torch.float8_e4m3fn).to(exact)
    scales = rows[..., layout.scales : layout.k_rope].contiguous().view(torch.float32).to(exact)
    latent = codes.unflatten(-1, (-1, COLUMNS_PER_SCALE)) * scales.unsqueeze(-1)
    k_rope = rows[..., layout.k_rope : layout.end].contiguous().view(torch.bfloat16)
    return latent.flatten(-2).to(dtype), k_rope.to(dtype)
