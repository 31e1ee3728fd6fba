"""FP8 rows: what their bytes mean, that every writer writes the same, and decode over them."""

from __future__ import annotations

import dataclasses
import math
import struct

import pytest
import torch
from cases import BACKENDS, CASES, DEVICE, Case, make
from numerics import assert_right

import flash_mla
from flash_mla.codec import LARGEST, SMALLEST_SCALE, decode_rows, encode_rows, row_layout

# Readers. The compiled kernels read another shape (test_fp8_gpu.py).
FP8_BACKENDS = [(backend, dtype) for backend, dtype in BACKENDS if backend != "cuda"]
BY_BACKEND = pytest.mark.parametrize(
    ("backend", "dtype"), FP8_BACKENDS, ids=[f"{backend}-{str(dtype)[6:]}" for backend, dtype in FP8_BACKENDS]
)
BY_WRITER = pytest.mark.parametrize(
    ("backend", "dtype"), BACKENDS, ids=[f"{backend}-{str(dtype)[6:]}" for backend, dtype in BACKENDS]
)


@pytest.mark.parametrize(
    ("rank", "rope", "row_bytes"), [(512, 64, 656), (256, 64, 400), (256, 32, 336), (128, 32, 208)]
)
def test_bytes_of_a_row(rank: int, rope: int, row_bytes: int) -> None:
    assert row_layout(rank, rope).row_bytes == row_bytes
    assert encode_rows(torch.ones(3, rank), torch.ones(3, rope)).shape == (3, row_bytes)


@pytest.mark.parametrize("rank", [0, 96, 192, 64])
def test_a_latent_that_128_does_not_divide(rank: int) -> None:
    with pytest.raises(ValueError, match=f"kv_lora_rank that 128 divides, got {rank}"):
        row_layout(rank, 64)


def test_rows_of_another_shape() -> None:
    with pytest.raises(ValueError, match=r"FP8 rows of \(512, 64\) columns have 656 bytes, got 400"):
        decode_rows(torch.zeros(400, dtype=torch.uint8), 512, 64, torch.float32)


def e4m3(code: int) -> float:
    """By the definition of OCP 8-bit floating point: bias 7, subnormals, no infinities, 0x7f is NaN."""
    sign, exponent, mantissa = -1.0 if code & 0x80 else 1.0, code >> 3 & 15, code & 7
    if code & 0x7F == 0x7F:
        return float("nan")
    return sign * (mantissa / 8 * 2**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7))


def by_hand(row: bytes, rank: int, rope: int) -> list[float]:
    """The columns of one row, byte by byte, as FlashMLA describes it."""
    scales = struct.unpack_from(f"<{rank // 128}f", row, rank)
    latent = [e4m3(code) * scales[column // 128] for column, code in enumerate(row[:rank])]
    halves = struct.unpack_from(f"<{rope}H", row, rank + 4 * (rank // 128))
    return latent + [struct.unpack("<f", struct.pack("<I", half << 16))[0] for half in halves]


def test_a_row_read_by_hand() -> None:
    rank, rope = 256, 32
    generator = torch.Generator().manual_seed(0)
    row = torch.randint(0, 256, (row_layout(rank, rope).row_bytes,), dtype=torch.uint8, generator=generator)
    row[rank : rank + 8] = torch.tensor([0.37, 12.5]).view(torch.uint8)
    row[:256] = torch.arange(256, dtype=torch.uint8)  # every code once
    wanted = torch.tensor(by_hand(bytes(row.tolist()), rank, rope), dtype=torch.float64)
    found = torch.cat(decode_rows(row, rank, rope, torch.float64), -1)
    torch.testing.assert_close(found, wanted, rtol=1e-15, atol=0, equal_nan=True)


def test_encoding_rounds_to_the_nearest_code() -> None:
    """Every column within half a step of its code: 2^-4 of itself, or 2^-10 of the scale where codes are subnormal."""
    generator = torch.Generator().manual_seed(1)
    latent = torch.randn(50, 512, generator=generator, dtype=torch.float64) * torch.logspace(-4, 2, 512)
    found, _ = decode_rows(encode_rows(latent, torch.zeros(50, 64)), 512, 64, torch.float64)
    scale = latent.unflatten(-1, (-1, 128)).abs().amax(-1).repeat_interleave(128, -1) / LARGEST
    allowed = torch.maximum(latent.abs() * 2**-4, scale * 2**-10) * (1 + 1e-6)
    assert bool(((found - latent).abs() <= allowed).all())
    # A scale is the one that the columns ask for, not the next power of two.
    scales = encode_rows(latent, torch.zeros(50, 64))[:, 512:528].contiguous().view(torch.float32)
    torch.testing.assert_close(scales.double(), scale[:, ::128], rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("value", "wanted"),
    [
        (0.0, SMALLEST_SCALE),
        (1e-40, SMALLEST_SCALE),
        (3e38, 3e38 / 448),
        (float("inf"), math.nan),
        (math.nan, math.nan),
    ],
)
def test_scales_at_the_ends(value: float, wanted: float) -> None:
    latent = torch.zeros(1, 128)
    latent[0, 5] = value
    row = encode_rows(latent, torch.zeros(1, 32))
    scale = row[0, 128:132].view(torch.float32)
    torch.testing.assert_close(scale, torch.tensor([wanted]), rtol=1e-6, atol=0, equal_nan=True)
    if math.isnan(wanted):  # nothing of such a row looks like a number
        assert bool(decode_rows(row, 128, 32, torch.float32)[0].isnan().all())


def difficult_latents(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """Columns over twelve powers of ten, ties between two codes, groups of zeros, and of one value."""
    latent = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    latent = latent * torch.logspace(-3, 3, shape[-1])
    latent[..., :128] = (torch.arange(128) % 64 + 0.5) / 8  # halfway between codes where the scale is 1
    latent[..., 0] = 448.0
    flat = latent.view(-1, shape[-1])
    flat[1::7, -128:] = 0
    flat[2::7, -128:] = -3.25
    return latent.to(DEVICE, dtype)


@BY_WRITER
@pytest.mark.parametrize(
    ("batch", "seqlen_q", "h_kv", "block_size", "rank", "rope"),
    [
        pytest.param(3, 1, 1, 64, 128, 32, id="one token each"),
        pytest.param(2, 3, 2, 48, 256, 32, id="two latent heads"),
        pytest.param(3, 4, 1, 16, 256, 64, id="small pages"),
        pytest.param(9, 2, 1, 64, 512, 64, id="DeepSeek's shape"),
        pytest.param(3, 347, 1, 64, 128, 32, id="prefill: several rows per program, the last one not full"),
    ],
)
def test_writers_write_the_same_bytes(
    batch: int, seqlen_q: int, h_kv: int, block_size: int, rank: int, rope: int, backend: str, dtype: torch.dtype
) -> None:
    num_blocks, row_bytes = -(-batch * seqlen_q // block_size) + 2, row_layout(rank, rope).row_bytes
    pool = torch.full((num_blocks, block_size, h_kv, row_bytes), 0xAB, dtype=torch.uint8, device=DEVICE)
    latent = difficult_latents(batch, seqlen_q, h_kv, rank, dtype=dtype)
    k_rope = torch.randn(batch, seqlen_q, h_kv, rope, generator=torch.Generator().manual_seed(3)).to(DEVICE, dtype)
    order = torch.randperm(num_blocks * block_size, generator=torch.Generator().manual_seed(4))
    slots = order[: batch * seqlen_q].view(batch, seqlen_q).to(DEVICE)
    q = torch.full((batch, seqlen_q, 3, rank + rope), 7.0, dtype=dtype, device=DEVICE)
    q_rope = torch.randn(batch, seqlen_q, 3, rope, generator=torch.Generator().manual_seed(5)).to(DEVICE, dtype)
    right, end = pool.clone(), row_layout(rank, rope).end
    for request, token_slots in enumerate(slots.tolist()):
        for token, slot in enumerate(token_slots):
            row = encode_rows(latent[request, token], k_rope[request, token])
            right[slot // block_size, slot % block_size, :, :end] = row[..., :end]
    flash_mla.append(pool, latent, k_rope, slots, q=q, q_rope=q_rope, backend=backend)
    assert torch.equal(pool[..., :end], right[..., :end])
    untouched = torch.ones(num_blocks * block_size, dtype=torch.bool, device=DEVICE)
    untouched[slots.flatten()] = False
    assert bool((pool.flatten(0, 1)[untouched] == 0xAB).all())
    assert torch.equal(q[..., rank:], q_rope)
    assert bool((q[..., :rank] == 7).all())


@BY_BACKEND
def test_what_is_not_finite_is_not_hidden(backend: str, dtype: torch.dtype) -> None:
    """NaN or infinity in one column of a token: reading that token gives NaN, reading another one does not."""
    pool = torch.zeros((2, 64, 1, 400), dtype=torch.uint8, device=DEVICE)
    latent = torch.ones((3, 1, 1, 256), dtype=dtype, device=DEVICE)
    latent[1, 0, 0, 3], latent[2, 0, 0, 200] = float("nan"), float("-inf")
    k_rope = torch.ones((3, 1, 1, 64), dtype=dtype, device=DEVICE)
    k_rope[0, 0, 0, 5] = float("inf")
    slots = torch.tensor([[0], [64], [70]], device=DEVICE)
    flash_mla.append(pool, latent, k_rope, slots, backend=backend)
    found, rotated = decode_rows(pool[slots // 64, slots % 64, 0], 256, 64, torch.float32)
    assert found[:, 0].isfinite().all(-1).tolist() == [True, False, False]
    assert bool(found[1, 0, :128].isnan().all() and found[2, 0, 128:].isnan().all())
    assert torch.isposinf(rotated[0, 0, 5])


FP8_CASES = tuple(dataclasses.replace(case, fp8=True) for case in CASES)


@BY_BACKEND
@pytest.mark.parametrize("case", FP8_CASES, ids=[case.why for case in FP8_CASES])
def test_decode(case: Case, backend: str, dtype: torch.dtype) -> None:
    problem = make(case, dtype)
    out, lse = flash_mla.decode(*problem.arguments(), **problem.options(), backend=backend)
    assert_right(problem, out, lse)


@BY_BACKEND
@pytest.mark.parametrize("code", [0x7F, 0xFF])
def test_a_code_that_is_no_number_is_not_read_as_480(code: int, backend: str, dtype: torch.dtype) -> None:
    """0x7f and 0xff are NaN in e4m3, whoever wrote them."""
    problem = make(Case("NaN code", (70, 3), fp8=True), dtype)
    problem.kv_cache[int(problem.block_table[0, 1]), 2, 0, 17] = code
    out, _ = flash_mla.decode(*problem.arguments(), **problem.options(), backend=backend)
    assert bool(out[0].isnan().any())
    assert bool(out[1].isfinite().all())


@BY_BACKEND
@pytest.mark.parametrize("typed", [torch.int8, torch.float8_e4m3fn], ids=str)
def test_rows_may_be_typed_otherwise(typed: torch.dtype, backend: str, dtype: torch.dtype) -> None:
    """FlashMLA's users hold them as float8_e4m3fn."""
    problem = make(Case("typed", (70, 3), fp8=True), dtype)
    viewed = dataclasses.replace(problem, kv_cache=problem.kv_cache.view(typed))
    wanted = flash_mla.decode(*problem.arguments(), **problem.options(), backend=backend)
    found = flash_mla.decode(*viewed.arguments(), **viewed.options(), backend=backend)
    assert torch.equal(found[0], wanted[0])
    assert torch.equal(found[1], wanted[1])


@BY_BACKEND
@pytest.mark.parametrize("block_size", [64, 48])
def test_a_layer_of_a_larger_pool(block_size: int, backend: str, dtype: torch.dtype) -> None:
    problem = make(Case("strides", (400, 1, 65), seqlen_q=2, block_size=block_size, fp8=True), dtype)
    pool = problem.kv_cache
    layers = torch.full((pool.shape[0], 3, *pool.shape[1:]), 0xFF, dtype=torch.uint8, device=DEVICE)
    layers[:, 1] = pool
    arranged = dataclasses.replace(problem, kv_cache=layers[:, 1])
    out, lse = flash_mla.decode(*arranged.arguments(), **arranged.options(), backend=backend)
    assert_right(problem, out, lse)


def test_rows_that_kernels_cannot_walk_are_refused() -> None:
    problem = make(Case("odd", (70,), fp8=True), torch.float16)
    pool = problem.kv_cache
    wide = torch.zeros((*pool.shape[:3], pool.shape[3] + 8), dtype=torch.uint8, device=DEVICE)
    wide[..., :-8] = pool
    arranged = dataclasses.replace(problem, kv_cache=wide[..., :-8])
    with pytest.raises(flash_mla.UnsupportedError, match=r"triton: .*FP8 rows that begin at multiples of 16 bytes"):
        flash_mla.decode(*arranged.arguments(), **arranged.options(), backend="triton")
    out, _ = flash_mla.decode(*arranged.arguments(), **arranged.options(), backend="torch")
    wanted, _ = flash_mla.decode(*problem.arguments(), **problem.options(), backend="torch")
    assert torch.equal(out, wanted)
