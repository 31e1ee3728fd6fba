"""The append kernels themselves, compiled for the host: the bytes that they write, and that no access is misaligned.

FP8 rows are compared with `codec.encode_rows`, bit by bit. Conversions are the PTX ISA's and OCP's definitions, written
down here; an access at an address that its width does not divide is counted by the compiler's own check.
"""

from __future__ import annotations

import ctypes
import itertools
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from fake_cuda import FakeDriver, Launch
from test_cuda_append import append as append_rows
from test_cuda_append import make as make_rows
from test_cuda_append import on_hopper

from flash_mla import _build
from flash_mla.backends.cuda import append as cuda_append
from flash_mla.backends.cuda import append_refusals, driver
from flash_mla.codec import LARGEST, SMALLEST_SCALE, decode_rows, encode_rows, row_layout
from flash_mla.contract import check_append

host = sys.modules["flash_mla.backends.cuda.append"]  # the package has the function of this name

BEFORE = """
#include "hopper_on_host.h"

// As on the device, where an access must be aligned to its width.
struct alignas(8) Units2 { unsigned x, y; };
struct alignas(16) Units4 { unsigned x, y, z, w; };
#define uint2 Units2
#define uint4 Units4
extern "C" void __ubsan_handle_type_mismatch_v1(void*, uintptr_t) {
  is_stuck = true;
  fibers[threadIdx.x].has_ended = true;
  _longjmp(scheduler, 1);  // the access itself would end the process
}

inline struct { unsigned x; } blockDim;
inline unsigned __float_as_uint(float value) { return __float_as_int(value); }
inline float __uint_as_float(unsigned bits) { return __int_as_float(bits); }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __frcp_rn(float a) { return 1 / a; }

// By the definition: the nearest of 127 magnitudes, ties to the even code.
inline unsigned e4m3(float value) {
  static const std::vector<double> magnitudes = [] {
    std::vector<double> of_codes;
    for (int code = 0; code < 127; ++code) {
      of_codes.push_back(code < 8 ? ldexp(code, -9) : ldexp(8 + code % 8, code / 8 - 10));
    }
    return of_codes;
  }();
  if (std::isnan(value)) return 0x7f;
  const double magnitude = std::min(std::fabs(double(value)), 448.0);
  unsigned nearest = 0;
  for (unsigned code = 1; code < 127; ++code) {
    const double ours = std::fabs(magnitudes[code] - magnitude), best = std::fabs(magnitudes[nearest] - magnitude);
    if (ours < best || (ours == best && code % 2 == 0)) nearest = code;
  }
  return nearest | (std::signbit(value) ? 0x80 : 0);
}
// Likewise: of the two bf16 around a number the nearer, ties to the even one; NaN is 0x7fff.
inline unsigned bf16(float value) {
  if (std::isnan(value)) return 0x7fff;
  const unsigned below = __float_as_uint(value) >> 16, rest = __float_as_uint(value) & 0xffff;
  return below + (rest > 0x8000 || (rest == 0x8000 && below % 2));
}
"""

CONVERSIONS = {
    'asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(codes) : "f"(high), "f"(low));': (
        "codes = e4m3(high) << 8 | e4m3(low);"
    ),
    'asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));': "both = bf16(high) << 16 | bf16(low);",
    'asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(half));': "value = ::half(&half);",
}

AFTER = """
extern "C" int run(void (*kernel)(AppendParams), const void* params, int blocks, int threads) {
  AppendParams aligned;
  memcpy(&aligned, params, sizeof aligned);
  are_fibers = true;
  blockDim.x = threads;
  return launch_on_host(kernel, aligned, {blocks, 1, 1}, threads);
}

// Of the first 1,024 mantissas of a scale with this exponent, and of every `step`th, the quotients that lie on another
// side of a tie than IEEE's: up to five numbers to either side of each odd multiple of 2^tie up to the 31st. Of either
// sign.
extern "C" long other_sides(int exponent, int tie, int step) {
  long found = 0;
  for (unsigned mantissa = 0; mantissa < 1u << 23; mantissa += mantissa < 1024 ? 1 : step) {
    const float scale = std::ldexp(__uint_as_float(0x3f800000u | mantissa), exponent);
    const Divisor by = divisor_of(scale);
    for (int odd = 1; odd < 32; odd += 2) {
      const float at = std::ldexp(float(odd), tie);
      const unsigned middle = __float_as_uint(at * scale);
      for (unsigned bits = middle - 5; bits <= middle + 5; ++bits) {
        const float x = __uint_as_float(bits), right = x / scale, ours = quotient(x, by);
        found += (ours > at) - (ours < at) != (right > at) - (right < at) || quotient(-x, by) != -ours;
      }
    }
  }
  return found;
}
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++")
    folder = tmp_path_factory.mktemp("append")
    text = (_build.KERNELS / "append.cu").read_text()
    for instruction, on_host in CONVERSIONS.items():
        assert text.count(instruction) == 1, f"not once in the source any more: {instruction}"
        text = text.replace(instruction, on_host)
    (folder / "append.cpp").write_text(BEFORE + text + AFTER)
    shutil.copy(Path(__file__).parent / "hopper_on_host.h", folder)
    # Fibers jump from one stack to another, which checks of longjmp take for a fault.
    unusual = ["-fno-strict-aliasing", "-fno-gnu-unique", "-U_FORTIFY_SOURCE", "-ffp-contract=off"]
    options = ["-std=c++17", "-O2", *unusual, "-pthread", "-fPIC"]
    # Linked without it: the check calls the handler above.
    compiling = [*options, "-fsanitize=alignment", "-c", str(folder / "append.cpp"), "-o", str(folder / "append.o")]
    subprocess.run([compiler, *compiling], check=True)
    subprocess.run(
        [compiler, "-pthread", "-shared", str(folder / "append.o"), "-o", str(folder / "append.so")], check=True
    )
    return ctypes.CDLL(str(folder / "append.so"))


@pytest.fixture
def on_host(
    fake_driver: Callable[..., FakeDriver], library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch
) -> FakeDriver:
    def run(launch: Launch) -> None:
        kernel = getattr(library, launch.kernel)
        assert launch.grid[1:] == launch.block[1:] == (1, 1)
        assert library.run(kernel, launch.params, launch.grid[0], launch.block[0]) == 1, "misaligned, or lanes missing"

    monkeypatch.setattr(driver, "raw_stream", lambda device_index: 0)
    return fake_driver(on_launch=run)


DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=lambda d: str(d)[6:])
UNTOUCHED = 0xAB
KERNELS = {torch.bfloat16: "append_fp8_bf16", torch.float16: "append_fp8_fp16", torch.float32: "append_fp8_fp32"}


def groups_of(dtype: torch.dtype) -> torch.Tensor:
    """`[kinds, 128]`: columns that share a scale, each row hard in its own way."""
    generator = torch.Generator().manual_seed(1)
    random = torch.randn(128, generator=generator)
    count = torch.arange(128)
    ties = (count % 64 + 0.5) / 8 * (1 - count % 3)
    small_ties = (count % 16 + 0.5) * 2**-9  # of codes without leading one
    ties[0] = small_ties[0] = LARGEST  # the scale is 1
    least = LARGEST * SMALLEST_SCALE
    kinds = [
        random,
        random * torch.logspace(-6, 6, 128),
        ties,
        small_ties,
        torch.zeros(128),
        -torch.zeros(128),
        torch.full((128,), -3.25),
        random * 1e-40,  # no normal number
        random * least,  # columns whose scale is about the smallest, on either side
        small_ties * 2.0**-100,
        small_ties * 2.0**-100 * 1.37,
        random * 1e-22,
        torch.linspace(-1, 1, 128) * torch.finfo(dtype).max,
        torch.where(count == 77, torch.finfo(dtype).max, random),
        torch.where(count == 77, torch.finfo(dtype).max, random * 1e-38),  # quotients of fp32 and bf16 underflow
    ]
    return torch.stack(kinds).to(dtype)


def latents(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """Every kind of group in every place of a row, as far as rows last."""
    groups = groups_of(dtype)
    count = torch.Size(shape).numel() // 128
    chosen = (torch.arange(count) + torch.arange(count) // len(groups)) % len(groups)
    return groups[chosen].view(shape)


def pool_of(batch: int, seqlen_q: int, h_kv: int, rank: int, rope: int, block_size: int) -> torch.Tensor:
    num_blocks = -(-batch * seqlen_q // block_size) + 2
    shape = (num_blocks, block_size, h_kv, row_layout(rank, rope).row_bytes)
    return torch.full(shape, UNTOUCHED, dtype=torch.uint8)


def slots_of(pool: torch.Tensor, batch: int, seqlen_q: int) -> torch.Tensor:
    order = torch.randperm(pool.shape[0] * pool.shape[1], generator=torch.Generator().manual_seed(2))
    return order[: batch * seqlen_q].view(batch, seqlen_q)


def keys(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """Random ones, and as fp32 some halfway between two bf16."""
    key = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    key[..., ::3] = (torch.arange(key[..., ::3].numel()).view(key[..., ::3].shape) % 256 + 0.5) / 128 + 1
    return key.to(dtype)


def append(
    pool: torch.Tensor, latent: torch.Tensor, k_rope: torch.Tensor, slots: torch.Tensor, *queries: torch.Tensor
) -> None:
    """Append, and compare every byte of the pool with rows encoded one by one; padding stays as it was."""
    right = pool.clone()
    end = row_layout(latent.shape[-1], k_rope.shape[-1]).end
    for request, token_slots in enumerate(slots.tolist()):
        for token, slot in enumerate(token_slots):
            rows = encode_rows(latent[request, token], k_rope[request, token])
            right[slot // pool.shape[1], slot % pool.shape[1], :, :end] = rows[..., :end]
    call = on_hopper(check_append(pool, latent, k_rope, slots, *queries))
    assert append_refusals(call) == []
    cuda_append(call, pool, latent, k_rope, slots, *queries)
    assert torch.equal(pool, right)


# --- FP8 rows ---------------------------------------------------------------------------------------------------------


@DTYPES
@pytest.mark.parametrize(
    ("batch", "seqlen_q", "h_kv", "rank", "rope", "block_size"),
    [
        pytest.param(70, 1, 1, 512, 64, 64, id="DeepSeek's shape, one token each"),
        pytest.param(7, 3, 2, 512, 64, 64, id="DeepSeek's shape, two latent heads"),
        pytest.param(13, 3, 2, 256, 32, 48, id="two latent heads"),
        pytest.param(20, 4, 1, 256, 64, 16, id="small pages"),
        pytest.param(3, 347, 1, 128, 32, 64, id="prefill: eight rows per CTA, the last one not full"),
        pytest.param(9, 3, 1, 384, 6, 16, id="lanes without columns, few rotated ones"),
        pytest.param(9, 2, 1, 1152, 130, 64, id="more columns than a pass over a row takes"),
        pytest.param(9, 2, 1, 128, 0, 16, id="no rotated columns"),
    ],
)
def test_fp8_rows(
    batch: int,
    seqlen_q: int,
    h_kv: int,
    rank: int,
    rope: int,
    block_size: int,
    dtype: torch.dtype,
    on_host: FakeDriver,
) -> None:
    pool = pool_of(batch, seqlen_q, h_kv, rank, rope, block_size)
    latent, k_rope = latents(batch, seqlen_q, h_kv, rank, dtype=dtype), keys(batch, seqlen_q, h_kv, rope, dtype=dtype)
    append(pool, latent, k_rope, slots_of(pool, batch, seqlen_q))
    assert [launch.kernel for launch in on_host.launches] == [KERNELS[dtype]]
    rows = batch * seqlen_q * h_kv
    expected = (rows, 32) if rows <= 1024 else (-(-rows // 8), 256)
    assert (on_host.launches[0].grid[0], on_host.launches[0].block[0]) == expected


@DTYPES
def test_every_number_of_16_bits(dtype: torch.dtype, on_host: FakeDriver) -> None:
    """Each finite one that there is, among 127 others, sorted, so that few are far below their scale."""
    bits = torch.arange(2**16).to(torch.int16)
    every = (bits.view(torch.float16) if dtype == torch.float32 else bits.view(dtype)).to(dtype)
    every = every[every.isfinite()]
    every = every[every.float().abs().argsort()]
    every = every[: every.numel() // 512 * 512].view(-1, 1, 1, 512)
    pool = pool_of(len(every), 1, 1, 512, 64, 64)
    append(pool, every, keys(len(every), 1, 1, 64, dtype=dtype), slots_of(pool, len(every), 1))


def test_scales_of_every_magnitude(on_host: FakeDriver) -> None:
    """fp32 of every exponent: the largest of a group is 2^e times something."""
    generator = torch.Generator().manual_seed(4)
    bits = torch.arange(1, 255).view(-1, 1) << 23 | torch.randint(0, 2**23, (254, 1), generator=generator)
    largest = bits.to(torch.int32).view(torch.float32)
    fractions = torch.rand((254, 512), generator=generator) * 2 - 1
    fractions[:, ::128] = 1
    fractions[:, 1::2] *= torch.logspace(-5, 0, 256)
    latent = (fractions * largest).view(254, 1, 1, 512)
    pool = pool_of(254, 1, 1, 512, 64, 64)
    append(pool, latent, keys(254, 1, 1, 64, dtype=torch.float32), slots_of(pool, 254, 1))


@pytest.mark.parametrize(
    ("exponent", "tie"),
    [
        pytest.param(0, 0, id="scale about 1"),
        pytest.param(-100, -10, id="the smallest scale, codes without leading one"),
        pytest.param(-61, -10, id="the largest that is scaled up"),
        pytest.param(-60, -10, id="the smallest that is not"),
        pytest.param(118, 4, id="the largest"),
    ],
)
def test_quotients_are_on_the_right_side_of_a_tie(exponent: int, tie: int, library: ctypes.CDLL) -> None:
    """For every 63rd mantissa of a scale, in a quarter of a second; none is found with all of them either, in 16 s.

    Remainders that underflow show for the first few: about the smallest scale 132 of 1.5e9 quotients are wrong then.
    """
    library.other_sides.restype = ctypes.c_long
    assert library.other_sides(exponent, tie, 63) == 0


@DTYPES
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_is_its_groups_alone(value: float, dtype: torch.dtype, on_host: FakeDriver) -> None:
    """In one column, in each place of a lane and of a group."""
    columns = (0, 15, 130, 255, 256 + 77, 511)
    latent = torch.randn(len(columns) + 1, 1, 1, 512, generator=torch.Generator().manual_seed(5)).to(dtype)
    k_rope = torch.randn(len(columns) + 1, 1, 1, 64).to(dtype)
    for request, column in enumerate(columns):
        latent[request, 0, 0, column] = value
        k_rope[request, 0, 0, request * 7 % 64] = value
    pool = pool_of(len(latent), 1, 1, 512, 64, 64)
    slots = slots_of(pool, len(latent), 1)
    cuda_append(on_hopper(check_append(pool, latent, k_rope, slots)), pool, latent, k_rope, slots)
    rows = pool.flatten(0, 1)[slots.flatten(), 0]
    found, rotated = decode_rows(rows, 512, 64, torch.float32)
    wanted, wanted_rotated = decode_rows(encode_rows(latent, k_rope)[:, 0, 0], 512, 64, torch.float32)
    for request, column in enumerate(columns):
        group = slice(column // 128 * 128, column // 128 * 128 + 128)
        assert bool(found[request, group].isnan().all())
        assert int(found[request].isnan().sum()) == 128
    torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(rotated, wanted_rotated, rtol=0, atol=0, equal_nan=True)


@DTYPES
def test_of_projections_and_layers(dtype: torch.dtype, on_host: FakeDriver) -> None:
    """Tokens before requests, slots out of a wider table, one layer's pool; columns of other things in between."""
    projected = torch.full((4, 2, 1, 304), 7.0, dtype=dtype)  # [256 latent | 16 other | 32 key]
    projected[..., :256], projected[..., 272:] = latents(4, 2, 1, 256, dtype=dtype), keys(4, 2, 1, 32, dtype=dtype)
    projected = projected.transpose(0, 1)
    layers = torch.full((3, 2, 64, 1, 336), UNTOUCHED, dtype=torch.uint8)
    slots = torch.randperm(128)[:24].view(2, 4, 3)[..., 1]
    append(layers[:, 1], projected[..., :256], projected[..., 272:], slots)
    assert bool((layers[:, 0] == UNTOUCHED).all())
    assert [launch.kernel for launch in on_host.launches] == [KERNELS[dtype]]


def one_off(tensor: torch.Tensor) -> torch.Tensor:
    """The same one element further in memory than a multiple of 16 bytes."""
    return torch.cat((tensor.flatten()[:1], tensor.flatten()))[1:].view(tensor.shape)


def apart(tensor: torch.Tensor) -> torch.Tensor:
    """The same with columns that are not adjacent."""
    return tensor.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)


def rows_apart(tensor: torch.Tensor) -> torch.Tensor:
    """The same with one element between rows."""
    return torch.nn.functional.pad(tensor, (0, 1))[..., :-1]


MOVES = {"one off": one_off, "columns apart": apart, "rows one more apart": rows_apart}


@DTYPES
@pytest.mark.parametrize("how", MOVES)
@pytest.mark.parametrize("what", ["latent", "k_rope", "both"])
def test_what_is_not_aligned_is_copied(what: str, how: str, dtype: torch.dtype, on_host: FakeDriver) -> None:
    latent, k_rope = latents(5, 2, 2, 256, dtype=dtype), keys(5, 2, 2, 32, dtype=dtype)
    if what != "k_rope":
        latent = MOVES[how](latent)
    if what != "latent":
        k_rope = MOVES[how](k_rope)
    pool = pool_of(5, 2, 2, 256, 32, 64)
    append(pool, latent, k_rope, slots_of(pool, 5, 2))
    assert len(on_host.launches) == 1


def test_what_is_aligned_is_not_copied(on_host: FakeDriver) -> None:
    """A rotated key only needs two columns at once; a stride that is never walked may be anything."""
    latent = latents(1, 1, 1, 256, dtype=torch.bfloat16).as_strided((1, 1, 1, 256), (1, 3, 5, 1))
    projected = torch.cat((torch.zeros(1, 1, 1, 2), keys(1, 1, 1, 32, dtype=torch.float32)), -1).bfloat16()
    k_rope = projected[..., 2:]
    pool = pool_of(1, 1, 1, 256, 32, 64)
    append(pool, latent, k_rope, slots_of(pool, 1, 1))
    p = host.AppendParams.from_buffer_copy(on_host.launches[0].params)
    assert (p.latent, p.k_rope) == (latent.data_ptr(), k_rope.data_ptr())


def test_no_rotated_columns_wherever_they_are(on_host: FakeDriver) -> None:
    latent, k_rope = latents(3, 2, 1, 128, dtype=torch.bfloat16), torch.zeros(3, 2, 1, 7).bfloat16()[..., 7:]
    pool = pool_of(3, 2, 1, 128, 0, 16)
    append(pool, latent, k_rope, slots_of(pool, 3, 2))
    assert len(on_host.launches) == 1


@DTYPES
@pytest.mark.parametrize(
    ("what", "rows"),
    [
        ("nothing", 4),
        ("nothing", 520),
        ("q", 4),
        ("q_rope", 4),
        ("rows of q", 4),
        ("columns of q", 4),
        ("columns of q_rope", 4),
    ],
)
def test_queries_are_placed_too(what: str, rows: int, dtype: torch.dtype, on_host: FakeDriver) -> None:
    """In the same launch, by 16 bytes; by torch what cannot be moved so."""
    latent, k_rope = latents(rows, 2, 1, 128, dtype=dtype), keys(rows, 2, 1, 32, dtype=dtype)
    q = torch.full((rows, 2, 3, 160), 3.0, dtype=dtype)
    q_rope = torch.randn(rows, 3, 2, 32, generator=torch.Generator().manual_seed(6)).to(dtype).transpose(1, 2)
    if what == "q":
        q = one_off(q)
    elif what == "q_rope":
        q_rope = one_off(q_rope)
    elif what == "rows of q":
        q = rows_apart(q)
    elif what == "columns of q":
        q = apart(q)
    elif what == "columns of q_rope":
        q_rope = apart(q_rope)
    pool = pool_of(rows, 2, 1, 128, 32, 64)
    append(pool, latent, k_rope, slots_of(pool, rows, 2), q, q_rope)
    assert torch.equal(q[..., 128:], q_rope)
    assert bool((q[..., :128] == 3).all())
    (launch,) = on_host.launches
    placed = host.AppendParams.from_buffer_copy(launch.params).q_rows
    assert placed == (rows * 6 if what in ("nothing", "columns of q_rope") else 0)
    warps = 1 if rows * 2 <= 1024 else 8
    units = placed * 32 * dtype.itemsize // 16
    assert launch.grid[0] == -(-rows * 2 // warps) + -(-units // (32 * warps))


def test_queries_without_even_columns(on_host: FakeDriver) -> None:
    """Six rotated columns are 12 bytes: torch's."""
    latent, k_rope = latents(3, 1, 1, 128, dtype=torch.bfloat16), keys(3, 1, 1, 6, dtype=torch.bfloat16)
    q, q_rope = torch.zeros(3, 1, 4, 134).bfloat16(), torch.randn(3, 1, 4, 6).bfloat16()
    pool = pool_of(3, 1, 1, 128, 6, 16)
    append(pool, latent, k_rope, slots_of(pool, 3, 1), q, q_rope)
    assert torch.equal(q[..., 128:], q_rope)
    assert len(on_host.launches) == 1


# --- rows as they come ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("off", [0, 1])
@pytest.mark.parametrize(("batch", "rank", "rope"), [(3, 512, 64), (1025, 128, 32), (2, 1500, 100)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_rows(batch: int, rank: int, rope: int, off: int, dtype: torch.dtype, on_host: FakeDriver) -> None:
    """Units of 16 bytes where they can be, else of one element."""
    pool, latent, k_rope, slots = make_rows(batch, 1, 1, rank, rope, dtype)
    append_rows(pool, one_off(latent) if off else latent, k_rope, slots)
    sizes = [size for size in (16, 8, 4, 2) if rank * dtype.itemsize % size == 0 and rope * dtype.itemsize % size == 0]
    unit = dtype.itemsize if off else sizes[0]
    assert [launch.kernel for launch in on_host.launches] == [f"append_rows_{unit}"]


def test_a_kernel_at_an_odd_address_is_seen(library: ctypes.CDLL) -> None:
    """Of every kernel, so that nothing above passes because misaligned accesses are let through."""
    memory = torch.zeros(2**16, dtype=torch.uint8)
    slots = torch.zeros(1, dtype=torch.int64)
    begin = memory.data_ptr() + -memory.data_ptr() % 16
    for kernel, off in itertools.product([*host.KERNELS.values(), *host.FP8_KERNELS.values()], (0, 1)):
        p = host.AppendParams(
            kv_cache=begin,
            latent=begin + 2**14 + off,
            k_rope=begin + 2**15,
            slots=slots.data_ptr(),
            num_rows=1,
            seqlen_q=1,
            h_kv=1,
            block_size=1,
            latent_bytes=512,
            row_bytes=512 + 64,
            num_heads=1,
        )
        assert library.run(getattr(library, kernel), bytes(p), 1, 32) == 1 - off, kernel
