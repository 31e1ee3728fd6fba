"""Decode cases, each for a reason, and their tensors: NaN in every cache row and garbage in every table entry that a
kernel must not read."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from flash_mla.codec import decode_rows, encode_rows

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Not whether the kernels are built: on a Hopper GPU without them the tests fail and say so.
ON_HOPPER = DEVICE == "cuda" and torch.cuda.get_device_capability() == (9, 0)
# (backend, dtype) that run here; the interpreter computes in float16 and float32 only.
BACKENDS = (
    [("torch", torch.bfloat16), ("triton", torch.bfloat16), ("triton", torch.float16)]
    if DEVICE == "cuda"
    else [("torch", torch.float32), ("torch", torch.float16), ("triton", torch.float16), ("triton", torch.float32)]
)
if ON_HOPPER:
    BACKENDS += [("cuda", torch.bfloat16), ("cuda", torch.float16)]
TRITON_DTYPES = [dtype for backend, dtype in BACKENDS if backend == "triton"]
# Each backend that has kernels, in one dtype: where a dtype more would show nothing.
KERNELS = [("triton", TRITON_DTYPES[0])] + ([("cuda", torch.bfloat16)] if ON_HOPPER else [])
GARBAGE = 2147480000  # a page that no pool has

needs_gpu = pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU: CUDA graphs and real sizes")
needs_hopper = pytest.mark.skipif(not ON_HOPPER, reason="needs Hopper: the compiled kernels are for nothing else")


@dataclass(frozen=True)
class Case:
    """One decode call; lengths are tokens per request."""

    why: str
    lengths: tuple[int, ...]
    num_heads: int = 4
    seqlen_q: int = 1
    h_kv: int = 1
    kv_lora_rank: int = 128
    qk_rope_head_dim: int = 32
    block_size: int = 64
    causal: bool = True
    softmax_scale: float = 0.11
    q_factor: float = 1.0
    fp8: bool = False

    @property
    def d_qk(self) -> int:
        return self.kv_lora_rank + self.qk_rope_head_dim


CASES = (
    Case("one token", (1,)),
    Case("a full page, and one token on a second page", (64, 65)),
    Case("an empty request among others", (0, 70, 0, 3)),
    Case("only empty requests", (0, 0)),
    Case("ragged enough that one request is split and others are not", (1, 400, 64)),
    Case("one long request among short ones: its parts are merged in several rounds", (700, 1, 1, 1, 1)),
    Case("many rows: merged whole rows at a time", (400, 1, 1, 1, 1, 1, 1, 1, 1), num_heads=128),
    Case("parts longer than one unit, on few processors", (1100,)),
    Case("one head", (100,), num_heads=1),
    Case("20 heads: rows of the tile are masked, tokens on the 64-row side", (150, 33), num_heads=20),
    Case("40 heads: rows of a 64-row tile are masked", (150, 33), num_heads=40),
    Case("128 heads: two row tiles of 64", (129,), num_heads=128),
    Case("two latent heads", (400, 10), num_heads=8, h_kv=2),
    Case("two latent heads, two queries, many heads each", (400,), num_heads=72, h_kv=2, seqlen_q=2),
    Case("causal: the last tile is seen by some queries only", (64, 65, 66), seqlen_q=3),
    Case("causal: more queries than tokens, so the first see nothing", (2, 1, 0, 3), num_heads=16, seqlen_q=4),
    Case("causal, split: the last part is all masked for the first query", (513,), seqlen_q=4),
    Case("causal, tokens on the 64-row side", (65, 400), seqlen_q=3, num_heads=8),
    Case("causal, 64-row tiles", (65, 400), seqlen_q=4, num_heads=12),
    Case("not causal: every query sees all", (65, 2), seqlen_q=3, causal=False),
    Case("pages of 16: a tile spans several", (40, 400), block_size=16),
    Case("pages of 48: a tile straddles two, unevenly", (47, 49, 400), block_size=48),
    Case("pages of 48, tokens on the 64-row side", (49, 400), block_size=48, num_heads=24),
    Case("pages of 48, 64-row tiles", (49, 400), block_size=48, num_heads=48),
    Case("pages of 128: a tile begins inside a page", (127, 129, 400), block_size=128),
    Case("the other latent shapes: 256 + 64", (70,), kv_lora_rank=256, qk_rope_head_dim=64),
    Case("the other latent shapes: 256 + 32", (70,), kv_lora_rank=256, qk_rope_head_dim=32, num_heads=20),
    Case("DeepSeek's latent shape", (70,), kv_lora_rank=512, qk_rope_head_dim=64),
    Case("DeepSeek's latent shape, 64-row tiles", (66,), kv_lora_rank=512, qk_rope_head_dim=64, num_heads=40),
    Case("large scores: the running maximum moves by tens", (700,), q_factor=6.0),
    Case("large scores, tokens on the 64-row side", (400,), num_heads=20, q_factor=6.0),
    Case("large scores, 64-row tiles", (400,), num_heads=40, q_factor=6.0),
    Case("a negative scale", (90,), softmax_scale=-0.2),
)


@dataclass(frozen=True)
class Problem:
    """A case's tensors."""

    case: Case
    q: torch.Tensor
    kv_cache: torch.Tensor
    block_table: torch.Tensor
    cache_seqlens: torch.Tensor

    def latents(self) -> torch.Tensor:
        """The rows of the pool in the dtype of the queries, `[num_blocks, block_size, h_kv, d_qk]`."""
        case = self.case
        if not case.fp8:
            return self.kv_cache
        parts = decode_rows(self.kv_cache, case.kv_lora_rank, case.qk_rope_head_dim, self.q.dtype)
        return torch.cat(parts, dim=-1)

    def arguments(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.q, self.kv_cache, self.block_table, self.cache_seqlens

    def options(self) -> dict[str, object]:
        case = self.case
        return {"kv_lora_rank": case.kv_lora_rank, "softmax_scale": case.softmax_scale, "causal": case.causal}


def make(case: Case, dtype: torch.dtype, seed: int = 0, device: str = DEVICE, spare_pages: int = 2) -> Problem:
    """Random queries and latents; pages in random order; NaN and garbage wherever nothing may be read."""
    generator = torch.Generator().manual_seed(seed)
    pages = [-(-length // case.block_size) for length in case.lengths]
    num_blocks = sum(pages) + spare_pages
    kv_cache = torch.randn((num_blocks, case.block_size, case.h_kv, case.d_qk), generator=generator)
    order = torch.randperm(num_blocks, generator=generator).tolist()
    block_table = torch.full((len(case.lengths), max(pages) + 1), GARBAGE, dtype=torch.int32)
    is_used = torch.zeros((num_blocks, case.block_size), dtype=torch.bool)
    for request, length in enumerate(case.lengths):
        for index in range(pages[request]):
            page = order.pop()
            block_table[request, index] = page
            is_used[page, : min(case.block_size, length - index * case.block_size)] = True
    if case.fp8:
        # Columns of very different size, as the outliers of real latents: each 128 have a scale of their own. Rows as
        # long as without, or scores would be larger than the case wants them.
        sizes = torch.logspace(-1, 1, case.d_qk)
        kv_cache *= sizes / sizes.square().mean().sqrt()
        kv_cache = encode_rows(kv_cache[..., : case.kv_lora_rank], kv_cache[..., case.kv_lora_rank :])
        kv_cache[~is_used] = 0xFF  # NaN as code, as scale and as bf16
    else:
        kv_cache[~is_used] = float("nan")
    q = torch.randn((len(case.lengths), case.seqlen_q, case.num_heads, case.d_qk), generator=generator) * case.q_factor
    return Problem(
        case,
        q.to(device, dtype),
        kv_cache.to(device, torch.uint8 if case.fp8 else dtype),
        block_table.to(device),
        torch.tensor(case.lengths, dtype=torch.int32, device=device),
    )
