"""What 8 bits per latent cost one attention layer when some columns are outliers, by how many share a scale."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from .codec import COLUMNS_PER_SCALE, LARGEST, row_layout
from .ops import append, decode

__all__ = ["LayerShape", "layer_errors", "outlier_latents"]


class LayerShape(NamedTuple):
    """Dimensions of one MLA layer, by their names in the config."""

    num_heads: int
    kv_lora_rank: int
    qk_rope_head_dim: int
    qk_nope_head_dim: int
    v_head_dim: int


LOG_STD = 0.5  # of column scales, natural log: two thirds of them lie within a factor of 1.65
SCORE_STD = 2.0  # over tokens, natural log: as if n exp(-4), a 55th of the tokens, had equal weights


def outlier_latents(tokens: int, kv_lora_rank: int, outlier: float, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Random latents with outlier columns, and their column scales.

    Rows are normal numbers at a root mean square of 1, as an RMSNorm leaves them, times column scales, as its weight
    multiplies them. Scales are log-normal (standard deviation 0.5 of the natural log), and `kv_lora_rank` / 128 random
    columns, at least one, are `outlier` times as large. Keys of trained models have a few such channels, the same at
    every token (KIVI, arXiv 2402.02750; KVQuant, arXiv 2401.18079). This is a recipe, not a measurement: `verify` on a
    checkpoint says what its own latents do.

    Returns: fp64 `[tokens, kv_lora_rank]` and fp64 `[kv_lora_rank]`, on the CPU.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn((tokens, kv_lora_rank), dtype=torch.float64, generator=generator)
    rows /= rows.square().mean(-1, keepdim=True).sqrt()
    scales = (LOG_STD * torch.randn(kv_lora_rank, dtype=torch.float64, generator=generator)).exp()
    columns = torch.randperm(kv_lora_rank, generator=generator)[: max(1, kv_lora_rank // COLUMNS_PER_SCALE)]
    scales[columns] *= outlier
    return rows * scales, scales


def _rounded(latent: torch.Tensor, largest: torch.Tensor, kind: torch.dtype) -> torch.Tensor:
    """Latents through 8 bits, one scale for each entry of `largest` (which broadcasts), back in fp64."""
    if kind == torch.int8:
        scale = largest / 127
        return (latent / scale).round().clamp(-127, 127) * scale
    scale = largest / LARGEST
    return (latent / scale).to(torch.float32).to(kind).double() * scale


def layer_errors(
    shape: LayerShape,
    outlier: float,
    *,
    tokens: int = 1024,
    queries: int = 8,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
    backend: str | None = None,
    seed: int = 0,
) -> dict[str, float]:
    """Error of one layer's decode on latents with outlier columns, by how the latents are stored.

    The up-projections are random and divided by the column scales: every column weighs the same in scores and output,
    so an error in a small column is not hidden behind a large one. Scores have a standard deviation of 2.

    Args:
        shape: of the layer.
        outlier: as in `outlier_latents`.
        tokens: in the cache.
        queries: decoded over the same tokens; the error is over all of them.
        dtype: of queries and pages; an FP8 row keeps the rotated key in bf16 whatever it is.
        device, backend: where and by what `ops.decode` runs.
        seed: of all random numbers.
    Returns: relative error, Frobenius norm over that of the result, of the heads' outputs (after W_UV, which is applied
        in fp64) against the same layer in fp64 on unrounded latents:
        "pages": latents in `dtype`. "fp8 pages": `flash_mla.codec`, one scale per 128 columns.
        "fp8, scale per row", "fp8, scale per tensor", "int8, scale per row": rounded so and stored in `dtype`.
    Raises: ValueError, UnsupportedError: as `ops.decode`; ValueError: 128 does not divide `kv_lora_rank`.
    """
    num_heads, rank, rope, nope, v_head_dim = shape
    generator = torch.Generator().manual_seed(seed + 1)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(size, dtype=torch.float64, generator=generator)

    latent, scales = outlier_latents(tokens, rank, outlier, seed)
    w_uk, w_uv = normal(num_heads, nope, rank) / scales, normal(num_heads, v_head_dim, rank) / scales
    k_rope = normal(tokens, rope)
    q = torch.cat((torch.einsum("qhn,hnr->qhr", normal(queries, num_heads, nope), w_uk) / nope**0.5,
                   normal(queries, num_heads, rope)), -1)  # fmt: skip
    q *= SCORE_STD / (q @ torch.cat((latent, k_rope), -1).T).std(-1, keepdim=True)
    block_size = 64
    num_pages = -(-tokens // block_size)
    table = torch.arange(num_pages, dtype=torch.int32, device=device).repeat(queries, 1)
    lengths = torch.full((queries,), tokens, dtype=torch.int32, device=device)
    slots = torch.arange(tokens, device=device)[None]

    def output(latents: torch.Tensor, kind: torch.dtype, fp8: bool = False, by: str | None = backend) -> torch.Tensor:
        width = row_layout(rank, rope).row_bytes if fp8 else rank + rope
        pool = torch.zeros((num_pages, block_size, 1, width), dtype=torch.uint8 if fp8 else kind, device=device)
        new = [part[None, :, None].to(device, kind) for part in (latents, k_rope)]
        append(pool, new[0], new[1], slots, backend=by)
        options: dict[str, Any] = {"kv_lora_rank": rank, "softmax_scale": 1.0, "backend": by}
        out, _ = decode(q[:, None].to(device, kind), pool, table, lengths, **options)
        return torch.einsum("qhr,hvr->qhv", out[:, 0].to("cpu", torch.float64), w_uv)

    exact = output(latent, torch.float64, by="torch")
    magnitudes = latent.abs()
    by_row, by_tensor = magnitudes.amax(-1, keepdim=True), magnitudes.max()
    e4m3 = torch.float8_e4m3fn
    outputs = {
        "pages": output(latent, dtype),
        "fp8 pages": output(latent, dtype, fp8=True),
        "fp8, scale per row": output(_rounded(latent, by_row, e4m3), dtype),
        "fp8, scale per tensor": output(_rounded(latent, by_tensor, e4m3), dtype),
        "int8, scale per row": output(_rounded(latent, by_row, torch.int8), dtype),
    }
    return {name: ((out - exact).norm() / exact.norm()).item() for name, out in outputs.items()}
