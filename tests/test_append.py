"""Append: rows land in their slots, nothing else changes."""

from __future__ import annotations

import pytest
import torch
from cases import BACKENDS, DEVICE

import flash_mla

BY_BACKEND = pytest.mark.parametrize(
    ("backend", "dtype"), BACKENDS, ids=[f"{backend}-{str(dtype)[6:]}" for backend, dtype in BACKENDS]
)


def rows(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def some_slots(count: int, available: int, seed: int = 0) -> torch.Tensor:
    return torch.randperm(available, generator=torch.Generator().manual_seed(seed))[:count].to(DEVICE)


def expected(pool: torch.Tensor, latent: torch.Tensor, k_rope: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """Row by row, as one would with a pencil."""
    pool, block_size = pool.clone(), pool.shape[1]
    for request, token_slots in enumerate(slots.tolist()):
        for token, slot in enumerate(token_slots):
            row = torch.cat((latent[request, token], k_rope[request, token]), -1)
            pool[slot // block_size, slot % block_size] = row
    return pool


def assert_same(pool: torch.Tensor, right: torch.Tensor) -> None:
    torch.testing.assert_close(pool, right, rtol=0, atol=0, equal_nan=True)


@BY_BACKEND
@pytest.mark.parametrize(
    ("batch", "seqlen_q", "h_kv", "block_size", "rank", "rope"),
    [
        pytest.param(3, 1, 1, 64, 128, 32, id="one token each"),
        pytest.param(2, 5, 1, 16, 128, 32, id="a few tokens, small pages"),
        pytest.param(2, 3, 2, 48, 256, 32, id="two latent heads"),
        pytest.param(1, 2, 1, 64, 512, 64, id="DeepSeek's shape"),
        pytest.param(3, 347, 1, 64, 128, 32, id="prefill: several rows per program, the last one not full"),
    ],
)
def test_rows_land(
    batch: int, seqlen_q: int, h_kv: int, block_size: int, rank: int, rope: int, backend: str, dtype: torch.dtype
) -> None:
    num_blocks = -(-batch * seqlen_q // block_size) + 2
    pool = torch.full((num_blocks, block_size, h_kv, rank + rope), float("nan"), dtype=dtype, device=DEVICE)
    latent = rows(batch, seqlen_q, h_kv, rank, dtype=dtype)
    k_rope = rows(batch, seqlen_q, h_kv, rope, dtype=dtype, seed=1)
    slots = some_slots(batch * seqlen_q, num_blocks * block_size).view(batch, seqlen_q)
    right = expected(pool, latent, k_rope, slots)
    before = latent.clone(), k_rope.clone(), slots.clone()
    flash_mla.append(pool, latent, k_rope, slots, backend=backend)
    assert_same(pool, right)
    for tensor, copy in zip((latent, k_rope, slots), before, strict=True):
        assert torch.equal(tensor, copy)


@BY_BACKEND
def test_strides(backend: str, dtype: torch.dtype) -> None:
    """Latent and key out of one projection, tokens before requests, slots out of a wider table, a layer's pool."""
    projected = rows(4, 2, 1, 176, dtype=dtype).transpose(0, 1)  # [2, 4, 1, 128 latent | 16 other | 32 key]
    latent, k_rope = projected[..., :128], projected[..., 144:]
    layers = torch.full((3, 2, 64, 1, 160), float("nan"), dtype=dtype, device=DEVICE)
    slots = some_slots(24, 192).view(2, 4, 3)[..., 1]
    right = layers.clone()
    right[:, 1] = expected(layers[:, 1], latent, k_rope, slots)
    flash_mla.append(layers[:, 1], latent, k_rope, slots, backend=backend)
    assert_same(layers, right)


@BY_BACKEND
def test_columns_apart(backend: str, dtype: torch.dtype) -> None:
    latent = rows(128, 1, 1, 2, dtype=dtype).permute(3, 1, 2, 0)
    k_rope = rows(32, 1, 1, 2, dtype=dtype).permute(3, 1, 2, 0)
    pool = torch.full((2, 64, 1, 160), float("nan"), dtype=dtype, device=DEVICE)
    slots = torch.tensor([[5], [64]], device=DEVICE)
    right = expected(pool, latent, k_rope, slots)
    flash_mla.append(pool, latent, k_rope, slots, backend=backend)
    assert_same(pool, right)


@BY_BACKEND
@pytest.mark.parametrize(
    ("batch", "seqlen_q", "num_heads", "rank", "rope"),
    [
        pytest.param(3, 1, 5, 128, 32, id="one token each"),
        pytest.param(2, 1, 16, 512, 64, id="DeepSeek's shape"),
        pytest.param(2, 3, 7, 256, 32, id="a few tokens"),
        pytest.param(1, 1030, 2, 128, 32, id="many rows"),
    ],
)
def test_queries_are_placed(
    batch: int, seqlen_q: int, num_heads: int, rank: int, rope: int, backend: str, dtype: torch.dtype
) -> None:
    """The last columns of q, and those alone; the source is a part of Transformers' [batch, heads, tokens, columns]."""
    num_blocks = -(-batch * seqlen_q // 64) + 1
    pool = torch.full((num_blocks, 64, 1, rank + rope), float("nan"), dtype=dtype, device=DEVICE)
    latent, k_rope = rows(batch, seqlen_q, 1, rank, dtype=dtype), rows(batch, seqlen_q, 1, rope, dtype=dtype, seed=1)
    slots = some_slots(batch * seqlen_q, num_blocks * 64).view(batch, seqlen_q)
    q_rope = rows(batch, num_heads, seqlen_q, 24 + rope, dtype=dtype, seed=2)[..., 24:].transpose(1, 2)
    # Rows of a wider buffer: what lies beside q must stay.
    wide = torch.full((batch, seqlen_q, num_heads, rank + rope + 8), 3.0, dtype=dtype, device=DEVICE)
    right, wanted = expected(pool, latent, k_rope, slots), wide.clone()
    wanted[..., rank : rank + rope] = q_rope
    flash_mla.append(pool, latent, k_rope, slots, q=wide[..., :-8], q_rope=q_rope, backend=backend)
    assert_same(pool, right)
    assert torch.equal(wide, wanted)


@BY_BACKEND
def test_columns_of_queries_apart(backend: str, dtype: torch.dtype) -> None:
    pool = torch.zeros((2, 64, 1, 160), dtype=dtype, device=DEVICE)
    latent, k_rope = rows(2, 1, 1, 128, dtype=dtype), rows(2, 1, 1, 32, dtype=dtype)
    slots = torch.tensor([[5], [64]], device=DEVICE)
    q_rope = rows(32, 4, 1, 2, dtype=dtype).permute(3, 2, 1, 0)
    for q in (torch.zeros((2, 1, 4, 160)), torch.zeros((160, 4, 1, 2)).permute(3, 2, 1, 0)):
        q = q.to(DEVICE, dtype)
        flash_mla.append(pool, latent, k_rope, slots, q=q, q_rope=q_rope, backend=backend)
        assert torch.equal(q[..., 128:], q_rope)
        assert not q[..., :128].any()


@BY_BACKEND
def test_nothing_to_append(backend: str, dtype: torch.dtype) -> None:
    pool = torch.full((2, 64, 1, 160), 3.0, dtype=dtype, device=DEVICE)
    slots = torch.empty((2, 0), dtype=torch.int64, device=DEVICE)
    flash_mla.append(pool, pool.new_empty((2, 0, 1, 128)), pool.new_empty((2, 0, 1, 32)), slots, backend=backend)
    assert bool((pool == 3).all())


@BY_BACKEND
def test_opcheck(backend: str, dtype: torch.dtype) -> None:
    pool = torch.zeros((2, 64, 1, 160), dtype=dtype, device=DEVICE)
    latent, k_rope = rows(2, 1, 1, 128, dtype=dtype), rows(2, 1, 1, 32, dtype=dtype)
    slots = torch.tensor([[5], [64]], device=DEVICE)
    torch.library.opcheck(torch.ops.flash_mla.append.default, (pool, latent, k_rope, slots, backend))
