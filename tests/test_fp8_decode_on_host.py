"""The decode kernels of FP8 rows, compiled for the host against the emulation of `hopper_on_host.h`: fragments of code,
the order of their columns, scales, boxes and barriers are the kernel's own."""

from __future__ import annotations

import ctypes
import dataclasses
import importlib
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import test_sparse
import torch
from cases import Case, Problem, make
from device_code import assert_mirrors
from fake_cuda import Launch
from numerics import assert_right, reference
from test_cuda_decode import (  # noqa: F401
    Plan,
    Recorded,
    cubins,
    decode,
    host,
    on_hopper,
    plan_of,
    recorded,
)
from test_dense_decode_on_host import compiled, replaced

from flash_mla import _build
from flash_mla.backends import equal_lengths
from flash_mla.backends import torch as definition
from flash_mla.backends.cuda.params import (
    DECODE,
    FP8_DECODE,
    FP8_DECODE_FIELDS,
    GATHER,
    GATHER_FIELDS,
    TENSOR_MAP_BYTES,
)
from flash_mla.codec import decode_rows
from flash_mla.contract import ITEM_COST, check_sparse

FILES = ("dense_decode_fp8", "dense_decode_fp8_wide", "dense_decode_fp8_pair")
SOURCES = {file: _build.KERNELS / f"{file}.cu" for file in FILES}
KERNEL = "flash_fwd_splitkv_mla_fp8_kernel_"
SHAPE = {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "fp8": True}


def instantiations(source: Path) -> dict[str, tuple[str, str]]:
    """Name -> struct of its parameters and its shape, of the kernels of a file."""
    found = re.findall(r"^DECODE_KERNEL\((\w+), (\w+), ([^)]*)\)$", source.read_text(), re.MULTILINE)
    return {name: (params, f"Shape<{arguments}>") for name, params, arguments in found}


def host_source(source: Path, prefix: str = KERNEL) -> str:
    """The kernels of a file and `run`, which runs one of them by its name."""
    text = source.read_text().partition("#define DECODE_KERNEL")[0]
    runs = "".join(
        f'  if (!strcmp(kernel, "{prefix}{name}")) {{\n    {params} aligned;\n'
        f"    memcpy(&aligned, params, sizeof aligned);\n"
        f"    const auto kernel = [](const {params}& params) {{ decode<{shape}>(params); }};\n"
        f"    return launch_on_host(kernel, aligned, {{blocks, 1, 1}}, NUM_THREADS, cluster);\n  }}\n"
        for name, (params, shape) in instantiations(source).items()
    )
    return text + (
        '\nextern "C" int run(const char* kernel, const void* params, int blocks, int cluster, int late, '
        f"int on_fibers, int ahead, int behind, uint32_t left) {{\n"
        "  loads_are_late = late;\n  are_fibers = on_fibers;\n  favoured = ahead;\n  delayed = behind;\n"
        "  garbage = left;\n"
        f"{runs}  return 0;\n}}\n"
    )


def on_host_header(text: str) -> str:
    """A source with shared memory where the emulation has it."""
    text = replaced(text, "extern __shared__ __align__(1024) uint8_t dynamic_shared[];", "")
    return replaced(text, 'asm volatile("mov.u32 %0, dynamic_shared;" : "=r"(base));', "base = SHARED_BASE;")


CHANGED = dict.fromkeys(("fp8_units.cuh", "four_roles.cuh"), on_host_header)


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ctypes.CDLL]:
    """Of each kernel file."""
    return {
        file: compiled(file, host_source(source), tmp_path_factory.mktemp(file), CHANGED)
        for file, source in SOURCES.items()
    }


class OnHost:
    """A recorder that runs the kernel's own source."""

    def __init__(self, recorded: Recorded, libraries: dict[str, ctypes.CDLL]) -> None:  # noqa: F811
        self.recorded = recorded
        self.libraries = libraries
        self.loads_are_late = False
        self.are_fibers = True
        self.favoured = -1
        self.delayed = -1
        self.garbage = 0xFFFFFFFF
        recorded.run_decode = self.run

    def run(self, launch: Launch) -> None:
        name = launch.kernel.encode()
        file = "dense_decode_fp8" + ("" if b"_few" in name else "_pair" if b"_pair" in name else "_wide")
        if b"_fp8_" not in name:
            file = "sparse_decode"
        how = (self.loads_are_late, self.are_fibers, self.favoured, self.delayed, ctypes.c_uint32(self.garbage))
        cluster = 2 if file == "dense_decode_fp8_pair" else 1
        assert launch.grid[0] % cluster == 0
        ended = self.libraries[file].run(name, launch.params, launch.grid[0], cluster, *how)
        assert ended == 1, "a wait without an end, too many arrivals, a wrong address, or no such kernel"


@pytest.fixture
def on_host(
    recorded: Recorded,  # noqa: F811
    libraries: dict[str, ctypes.CDLL],
    monkeypatch: pytest.MonkeyPatch,
) -> OnHost:
    monkeypatch.setattr(host, "PAIRS", True)
    return OnHost(recorded, libraries)


def fp8(case: Case) -> Problem:
    return make(case, torch.bfloat16, device="cpu")


def whole(problem: Problem) -> Plan:
    """Every request whole, in one slot."""
    return plan_of(problem, 1)


CASES = (
    Case("one head, 15 rows of nothing", (130,), num_heads=1, **SHAPE),
    Case("32 rows", (65, 129, 0, 64), num_heads=32, **SHAPE),
    Case("20 rows: the last ones of the second 16 are nothing", (200,), num_heads=20, **SHAPE),
    Case("causal, 32 rows, whole units that some queries do not see", (129, 67, 130), num_heads=8, seqlen_q=4, **SHAPE),
    Case("large scores, 32 rows", (400,), num_heads=32, q_factor=6.0, **SHAPE),
    Case("32 rows, pages of 48", (49, 100), num_heads=20, block_size=48, **SHAPE),
    Case("64 rows", (65, 129, 0, 64), num_heads=64, **SHAPE),
    Case("100 rows: two tiles, a pair", (200, 3, 0, 129), num_heads=100, **SHAPE),
    Case("130 rows: three tiles, no pair", (70, 3), num_heads=130, **SHAPE),
    Case("a pair, pages of 16, two latent heads", (70, 3), num_heads=140, h_kv=2, block_size=16, **SHAPE),
    Case("a pair, causal, whole units that some queries do not see", (129, 67), num_heads=32, seqlen_q=4, **SHAPE),
    Case("a pair, large scores", (400,), num_heads=70, q_factor=6.0, **SHAPE),
    Case(
        "causal, 64 rows, whole units that some queries do not see", (129, 67, 130), num_heads=16, seqlen_q=4, **SHAPE
    ),
    Case("64 rows, pages of 48", (49, 100), num_heads=40, block_size=48, **SHAPE),
    Case("64 rows, two latent heads, pages of 16", (70, 3), num_heads=80, h_kv=2, block_size=16, **SHAPE),
    Case("large scores, 64 rows", (400,), num_heads=64, q_factor=6.0, **SHAPE),
    Case("16 rows, one consumer has all, one token, none", (64, 1, 0), num_heads=16, **SHAPE),
    Case("the tail is the other consumer's", (65, 129), num_heads=16, **SHAPE),
    Case("5 rows", (200, 17), num_heads=5, **SHAPE),
    Case("15 rows, not causal, 5 queries", (66, 3), num_heads=3, seqlen_q=5, causal=False, **SHAPE),
    Case("causal, the second unit is one token that one query sees", (65, 66), num_heads=8, seqlen_q=2, **SHAPE),
    Case("causal, whole units that some queries do not see", (129, 67, 130), num_heads=4, seqlen_q=4, **SHAPE),
    Case("more queries than tokens", (2, 0, 3), num_heads=4, seqlen_q=4, **SHAPE),
    Case("two latent heads, two queries", (70, 3), num_heads=16, h_kv=2, seqlen_q=2, **SHAPE),
    Case("pages of 16", (70, 3), num_heads=16, block_size=16, **SHAPE),
    Case("pages of 48: boxes of 16 rows", (49, 100), block_size=48, **SHAPE),
    Case("pages of 128: a unit begins inside one", (129,), num_heads=16, block_size=128, **SHAPE),
    Case("large scores: both consumers rescale", (700,), num_heads=16, q_factor=6.0, **SHAPE),
    Case("a negative scale", (90,), num_heads=16, softmax_scale=-0.2, **SHAPE),
)


@pytest.mark.parametrize("case", CASES, ids=[case.why for case in CASES])
def test_result(case: Case, on_host: OnHost) -> None:
    """Whole, and with every request in parts: each writes other memory. Bytes past the lengths are NaN of all kinds."""
    problem = fp8(case)
    assert_right(problem, *decode(problem, whole(problem)))
    longer = dataclasses.replace(problem, cache_seqlens=problem.cache_seqlens * 100 + 1000)
    plan = plan_of(longer, 4)
    assert int(plan[1][:, 1].max()) > 1
    assert_right(problem, *decode(problem, plan))


def test_no_call_is_given_to_a_pair_until_they_are_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """And then those with an even number of tiles."""

    def files() -> list[str]:
        heads = (32, 64, 100, 128, 130, 256)
        calls = [on_hopper(fp8(Case("form", (70,), num_heads=number, **SHAPE))) for number in heads]
        return [host._form(call).file.removeprefix("dense_decode_fp8") for call in calls]

    assert files() == ["", "_wide", "_wide", "_wide", "_wide", "_wide"]
    monkeypatch.setattr(host, "PAIRS", True)
    assert files() == ["", "_wide", "_pair", "_pair", "_wide", "_pair"]


def test_two_tiles_without_a_pair(on_host: OnHost, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "PAIRS", False)
    problem = fp8(Case("two tiles", (200, 3, 0, 129), num_heads=100, **SHAPE))
    assert_right(problem, *decode(problem, whole(problem)))
    case = test_sparse.Case("two tiles", 70, 3, 2, 70, kv_lora_rank=512, qk_rope_head_dim=64, fp8=True)
    assert check_rows_by_index(case, on_host, monkeypatch, 3) == "sparse_bf16_512_64"


@pytest.mark.parametrize("num_slots", [1, 3])
@pytest.mark.parametrize("num_heads", [2, 20, 40, 70], ids=["16 rows", "32 rows", "64 rows", "a pair"])
def test_items_back_to_back(num_heads: int, num_slots: int, on_host: OnHost) -> None:
    """Ring slots go from request to request, over empty ones; whole requests and parts follow one another."""
    problem = fp8(Case("items", (65, 0, 1, 200, 0, 0, 64, 128, 3, 1800), num_heads=num_heads, **SHAPE))
    plan = plan_of(problem, num_slots)
    assert num_slots == 1 or int(plan[1][:, 1].max()) > 1
    assert_right(problem, *decode(problem, plan))


def test_a_ring_many_times_around(on_host: OnHost) -> None:
    """2,200 tokens are 35 units: pages are looked up for 32 at a time."""
    problem = fp8(Case("ring", (64, 65, 0, 2200, 1), num_heads=1, **SHAPE))
    assert_right(problem, *decode(problem, whole(problem)))


@pytest.mark.parametrize(("num_heads", "block_size"), [(5, 64), (5, 32), (32, 64), (40, 64), (40, 16), (70, 64)])
def test_loads_may_come_in_any_order(num_heads: int, block_size: int, on_host: OnHost) -> None:
    on_host.loads_are_late = True
    problem = fp8(Case("late", (577, 1, 130), num_heads=num_heads, block_size=block_size, **SHAPE))
    assert_right(problem, *decode(problem, whole(problem)))


@pytest.mark.parametrize("num_heads", [16, 32, 64, 128])
def test_threads_in_any_order(num_heads: int, on_host: OnHost) -> None:
    """A thread of the host for each of the kernel's, which run as they come."""
    on_host.are_fibers = False
    problem = fp8(Case("threads", (200, 0, 1, 0, 130), num_heads=num_heads, **SHAPE))
    assert_right(problem, *decode(problem, whole(problem)))


# Warpgroups: of up to 32 query rows two consumers and who loads; beyond, score, two of values and who converts, and of
# a pair those of either CTA.
WARPGROUPS = {5: 3, 20: 3, 40: 4, 70: 8}
AHEAD = [(num_heads, ahead) for num_heads, number in WARPGROUPS.items() for ahead in range(number)]


@pytest.mark.parametrize(("num_heads", "ahead"), AHEAD)
def test_one_warpgroup_may_be_ahead(num_heads: int, ahead: int, on_host: OnHost) -> None:
    """As far as barriers let it be: nothing that others still read is overwritten. Requests without tokens have the
    shortest way to the next item."""
    on_host.favoured = ahead
    problem = fp8(Case("ahead", (70, 0, 3, 0, 0, 130, 0), num_heads=num_heads, **SHAPE))
    assert_right(problem, *decode(problem, whole(problem)))


@pytest.mark.parametrize(
    ("num_heads", "warp"),
    [(heads, 4 * warpgroup) for heads, number in WARPGROUPS.items() for warpgroup in range(number)],
)
def test_one_warp_may_be_behind(num_heads: int, warp: int, on_host: OnHost) -> None:
    """The first of its warpgroup, as far as barriers let it be: what it still reads is not overwritten, and what it has
    yet to make ready is not used."""
    on_host.delayed = warp
    problem = fp8(Case("behind", (0, 200, 3, 0, 130), num_heads=num_heads, **SHAPE))
    assert_right(problem, *decode(problem, whole(problem)))


@pytest.mark.parametrize("garbage", [0xFF800000, 0x7F7F7F7F], ids=["-inf", "3e38"])
@pytest.mark.parametrize("num_heads", WARPGROUPS)
def test_what_shared_memory_held_before(num_heads: int, garbage: int, on_host: OnHost) -> None:
    """The first request has no tokens: nothing is computed before its zeros are stored."""
    on_host.garbage = garbage
    problem = fp8(Case("garbage", (0, 70, 0), num_heads=num_heads, **SHAPE))
    assert_right(problem, *decode(problem, whole(problem)))


@pytest.mark.parametrize("num_heads", [4, 40, 70])
def test_every_code_and_scales_far_apart(num_heads: int, on_host: OnHost) -> None:
    """All numbers of e4m3, subnormal ones among them, under scales of 2^-40 to 2^20, small and large in one warp."""
    problem = fp8(Case("codes", (128,), num_heads=num_heads, softmax_scale=2.0**-24, **SHAPE))
    codes = torch.arange(256, dtype=torch.uint8)
    codes = codes[(codes & 0x7F) != 0x7F]
    generator = torch.Generator().manual_seed(3)
    for page in problem.block_table[0, :2].tolist():
        rows = problem.kv_cache[page]
        rows[..., :512] = codes[torch.randint(len(codes), (64, 1, 512), generator=generator)]
        exponents = torch.randint(-40, 21, (64, 1, 4), generator=generator)
        rows[..., 512:528] = (torch.rand(64, 1, 4, generator=generator) + 1).ldexp(exponents).view(torch.uint8)
    assert_right(problem, *decode(problem, whole(problem)))


def test_strides_of_one_element_do_not_count(on_host: OnHost) -> None:
    """One page and one latent head, however far apart others would be."""
    problem = fp8(Case("one of each", (9,), num_heads=40, **SHAPE))
    page = int(problem.block_table[0, 0])
    pool = problem.kv_cache[page : page + 1]
    odd = dataclasses.replace(
        problem,
        kv_cache=pool.as_strided(pool.shape, (2**41, 656, 2**40, 1), page * 64 * 656),
        block_table=torch.zeros_like(problem.block_table),
    )
    assert_right(odd, *decode(odd, whole(odd)))


@pytest.mark.parametrize("number", [-1, 2**30])
@pytest.mark.parametrize("num_heads", [4, 40, 70])
def test_a_page_outside_the_pool_is_zeros(num_heads: int, number: int, on_host: OnHost) -> None:
    """And no address that is not the pool's: the other request's result is what it is."""
    problem = fp8(Case("a bad page", (70, 130), num_heads=num_heads, **SHAPE))
    right = decode(problem, whole(problem))
    problem.block_table[0, 1] = number
    out, lse = decode(problem, whole(problem))
    assert torch.equal(out[1], right[0][1])
    assert torch.equal(lse[1], right[1][1])
    assert bool(out[0].isfinite().all())


def test_pages_and_heads_may_lie_apart(on_host: OnHost) -> None:
    """Pages two apart, heads outermost: a view of the pool that no copy is made of."""
    problem = fp8(Case("a view", (70, 3), num_heads=80, h_kv=2, block_size=128, **SHAPE))
    num_blocks, block_size, h_kv, width = problem.kv_cache.shape
    wide = torch.full((h_kv, 2 * num_blocks, block_size, width), 0xFF, dtype=torch.uint8)
    view = wide[:, ::2].permute(1, 2, 0, 3)
    view.copy_(problem.kv_cache)
    apart = dataclasses.replace(problem, kv_cache=view)
    assert_right(apart, *decode(apart, whole(apart)))


@pytest.mark.parametrize(("num_heads", "smaller"), [(4, 2.0**-10), (40, 2.0**-40)])
def test_a_token_of_small_latents_may_have_the_largest_score(num_heads: int, smaller: float, on_host: OnHost) -> None:
    """Its rotated key takes all of the attention: its values are the result, whatever P and V are counted in. (P in
    e4m3 counts in one unit for all tokens, and what is 2^-17 of it is lost.)"""
    problem = fp8(Case("small", (70,), num_heads=num_heads, softmax_scale=1.0, **SHAPE))
    pages = problem.block_table[0, :2].tolist()
    for page in pages:
        rows = problem.kv_cache[page]
        rows[..., 512:528] = torch.full((4,), 2.0**-3).view(torch.uint8)
        rows[..., 528:] = 0
    small = problem.kv_cache[pages[1], 3, 0]
    small[512:528] = torch.full((4,), 2.0**-3 * smaller).view(torch.uint8)
    small[528:] = torch.full((64,), 4.0).bfloat16().view(torch.uint8)
    problem.q[..., :512] = 0
    problem.q[..., 512:] = 1
    out, lse = decode(problem, whole(problem))
    latent = decode_rows(small, 512, 64, torch.float32)[0]
    assert bool((lse - 256).abs().max() < 1e-2)
    torch.testing.assert_close(out[0, 0].float(), latent.expand(num_heads, 512), rtol=2**-7, atol=0)


@pytest.mark.parametrize(("num_heads", "exponent"), [(4, -30), (4, 30), (40, -30), (40, 60)])
def test_queries_and_latents_of_any_magnitude(num_heads: int, exponent: int, on_host: OnHost) -> None:
    """Rows of Q by a power of two, scales by one over it: the same scores, and values as much larger or smaller."""
    problem = fp8(Case("magnitudes", (70,), num_heads=num_heads, **SHAPE))
    out, lse = decode(problem, whole(problem))
    problem.q[..., :512] = problem.q[..., :512] * 2.0**exponent
    for page in problem.block_table[0, :2].tolist():
        scales = problem.kv_cache[page, :, :, 512:528].contiguous().view(torch.float32)
        problem.kv_cache[page, :, :, 512:528] = (scales * 2.0**-exponent).view(torch.uint8)
    other, other_lse = decode(problem, whole(problem))
    torch.testing.assert_close(other.float() * 2.0**exponent, out.float(), rtol=2**-6, atol=2**-6 * float(out.std()))
    torch.testing.assert_close(other_lse, lse, rtol=0, atol=2e-2)


@pytest.mark.parametrize("num_heads", [4, 40])
def test_subnormal_codes_lose_no_more_than_their_bits(num_heads: int, on_host: OnHost) -> None:
    """Latents of nothing but 2^-9, the smallest code, under scales of 2^9: all ones; see test_fp8_gpu.py."""
    for length, allowed in ((1, 0.0), (70, 32 * 2.0**-10)):
        problem = fp8(Case("subnormal", (length,), num_heads=num_heads, **SHAPE))
        for page in problem.block_table[0, : -(-length // 64)].tolist():
            problem.kv_cache[page, :, :, :512] = 1
            problem.kv_cache[page, :, :, 512:528] = torch.full((4,), 512.0).view(torch.uint8)
        out, lse = decode(problem, whole(problem))
        assert bool(((out - 1).abs() <= allowed).all())
        assert bool((lse.double() - reference(problem)[1]).abs().max() < 1e-3)


def test_scales_are_not_rounded_before_they_multiply(on_host: OnHost) -> None:
    """One token of 1.875 times 1.0036, which bf16 rounds to 1: their product is nearer to 1.8828 than to 1.875."""
    problem = fp8(Case("scales", (1,), num_heads=40, **SHAPE))
    row = problem.kv_cache[int(problem.block_table[0, 0]), 0, 0]
    row[:512] = 0x3F
    row[512:528] = torch.full((4,), 1.0036).view(torch.uint8)
    out, _ = decode(problem, whole(problem))
    assert bool((out == torch.tensor(1.875 * 1.0036).bfloat16()).all())
    assert out[0, 0, 0, 0] != 1.875


@pytest.mark.parametrize("num_heads", [4, 40, 70])
def test_what_is_not_finite_comes_out(num_heads: int, on_host: OnHost) -> None:
    """A scale that is NaN, which a writer gives to columns that are not finite, makes its request NaN and no other."""
    problem = fp8(Case("NaN", (70, 70), num_heads=num_heads, **SHAPE))
    page = int(problem.block_table[0, 1])
    problem.kv_cache[page, 2, 0, 516:520] = torch.tensor([float("nan")]).view(torch.uint8)
    out, lse = decode(problem, whole(problem))
    assert bool(out[0].isnan().all() and lse[0].isnan().all())
    assert bool(out[1].isfinite().all() and lse[1].isfinite().all())


@pytest.mark.parametrize("column", [5, 511, 530], ids=["latent", "last latent", "rotated"])
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("num_heads", [4, 40])
def test_a_query_that_is_not_finite_is_nan(num_heads: int, value: float, column: int, on_host: OnHost) -> None:
    """And no other one: it must not end at the largest code."""
    problem = fp8(Case("infinite query", (70,), num_heads=num_heads, **SHAPE))
    problem.q[0, 0, 2, column] = value
    out, lse = decode(problem, whole(problem))
    assert bool(out[0, 0, 2].isnan().all() and lse[0, 2].isnan().all())
    others = [head for head in range(num_heads) if head != 2]
    assert bool(out[0, 0, others].isfinite().all() and lse[0, others].isfinite().all())


@pytest.mark.parametrize("file", SOURCES)
def test_shared_memory_is_that_of_the_device_code(file: str, tmp_path: Path) -> None:
    for header in _build.KERNELS.glob("*.cuh"):
        shutil.copy(header, tmp_path)
    text = SOURCES[file].read_text().partition("#define DECODE_KERNEL")[0]
    tiles = {"_fp8": {"few16_": 16, "few32_": 32}, "_fp8_wide": {"": 64}, "_fp8_pair": {"pair_": 64}}
    names = tiles[file.removeprefix("dense_decode")]
    kernels = instantiations(SOURCES[file])
    assert set(kernels) == {f"{sort}{few}bf16_512_64" for sort in ("", "sparse_") for few in names}
    for name, (_, shape) in kernels.items():
        rows = names[name.removeprefix("sparse_").removesuffix("bf16_512_64")]
        size = host.FP8_PAIR_BYTES if "pair_" in name else host.FP8_ROWS[rows][name.startswith("sparse_")]
        text += f"static_assert(sizeof({shape}::Memory) == {size});\n"
        text += f"static_assert({shape}::TILE_ROWS == {rows});\n"
    (tmp_path / "probe.cu").write_text(text + 'extern "C" __global__ void probe() {}')
    _build.build(["probe"], kernels=tmp_path, out=tmp_path / "out", lax=True)


def test_the_struct_is_that_of_the_device_code(tmp_path: Path) -> None:
    offsets = {"decode": 0, "scale_map": DECODE.size}
    start = DECODE.size + TENSOR_MAP_BYTES
    for name, code in FP8_DECODE_FIELDS:
        offsets[name] = start
        start += struct.calcsize(f"={code}")
    assert_mirrors(tmp_path, "params.cuh", "Fp8DecodeParams", offsets, FP8_DECODE.size)


def test_the_gathering_kernels_struct_is_that_of_the_device_code(tmp_path: Path) -> None:
    offsets, start = {"decode": 0}, DECODE.size
    for name, code in GATHER_FIELDS:
        offsets[name] = start
        start += struct.calcsize(f"={code}")
    assert_mirrors(tmp_path, "params.cuh", "GatherParams", offsets, GATHER.size)


FAR_APART = (
    "takes indices into a pool whose rows are all equally far apart, got 656 bytes in blocks of 64 that are 83968 apart"
)


@pytest.mark.parametrize(
    ("changes", "reasons"),
    [
        ({}, []),
        ({"num_heads": 128}, []),
        ({"dtype": "float16"}, ["takes bfloat16 queries of FP8 rows, got float16"]),
        ({"kv_lora_rank": 256}, ["takes FP8 rows of (kv_lora_rank, qk_rope_head_dim) in [(512, 64)], got (256, 64)"]),
        ({"kv_cache_strides": (41992, 656, 656, 1)},
         ["needs strides of kv_cache that are not 0 and that 16 divides, got (41992, 656, 656, 1)"]),
        ({"num_blocks": 2**21},
         [f"takes FP8 rows within 64 GiB, got ({2**21}, 64, 1) rows with strides (41984, 656, 656) bytes"]),
        ({"sparse": True, "block_size": 1, "kv_cache_strides": (656, 656, 656, 1)}, []),
        ({"sparse": True, "kv_cache_strides": (2 * 41984, 656, 656, 1)},
         [FAR_APART]),
        ({"sparse": True, "wants_max": True}, ["does not return the largest score"]),
    ],
)  # fmt: skip
def test_refusals(changes: dict[str, object], reasons: list[str], on_host: OnHost) -> None:
    call = on_hopper(fp8(Case("refused", (70,), num_heads=4, **SHAPE)))
    assert host.decode_refusals(dataclasses.replace(call, **changes)) == reasons


# --- rows named by index ----------------------------------------------------------------------------------------------

SPARSE_CASES = tuple(
    dataclasses.replace(case, kv_lora_rank=512, qk_rope_head_dim=64, fp8=True)
    for case in (
        test_sparse.Case("one index", 1, visible=1.0),
        test_sparse.Case("a multiple of 64", 128, num_heads=64),
        test_sparse.Case("not a multiple of 64", 100, num_heads=16),
        test_sparse.Case("tiles of 32", 200, num_heads=20),
        test_sparse.Case("every index is -1", 64, visible=0.0),
        test_sparse.Case("queries back to back", 70, batch=3, seqlen_q=2, num_heads=70),
        test_sparse.Case("cut and merged", 700, batch=1),
        test_sparse.Case("sinks", 70, sinks=True, num_heads=5),
        test_sparse.Case("lengths, 0 and all among them", 128, batch=4, topk_length=(0, 1, 70, 128)),
        test_sparse.Case("pages of one row", 70, block_size=1, num_blocks=300),
        test_sparse.Case("pages of 16", 70, block_size=16, num_blocks=20),
    )
)


def check_rows_by_index(
    case: test_sparse.Case,
    on_host: OnHost,
    monkeypatch: pytest.MonkeyPatch,
    slots: int,
    dtype: torch.dtype = torch.bfloat16,
) -> str:
    """What the op hands to the backend, by the kernel's own source, in `slots` slots; returns the kernel's name. Tiles
    of 64 query rows from 33 rows on, however few indices there are."""
    problem = test_sparse.make(case, dtype)
    sparse = importlib.import_module("flash_mla.backends.cuda.sparse")
    monkeypatch.setattr(sparse, "plan", lambda lengths, _: definition.plan(lengths, slots))
    monkeypatch.setattr(host, "FEWEST_WIDE_UNITS", 0)
    batch, seqlen_q, num_heads, d_qk = problem.q.shape
    call = check_sparse(
        problem.q, problem.kv_cache, problem.indices, 512, problem.attn_sink, problem.topk_length, "sparse_decode"
    )
    call = dataclasses.replace(call, device_type="cuda", capability=(9, 0))
    assert host.decode_refusals(call) == []
    lengths = None if problem.topk_length is None else problem.topk_length.repeat_interleave(seqlen_q)
    with equal_lengths.nothing_kept():
        out, lse, _ = sparse.sparse_decode(
            call,
            problem.q.reshape(-1, 1, num_heads, d_qk),
            problem.kv_cache,
            problem.indices.reshape(-1, case.topk),
            lengths,
            case.softmax_scale,
            problem.attn_sink,
            False,
        )
    by_request = lse.view(batch, seqlen_q, num_heads).transpose(1, 2)
    test_sparse.assert_right(problem, out.view(batch, seqlen_q, num_heads, 512), by_request)
    return on_host.recorded.launches("splitkv")[-1].kernel.removeprefix(KERNEL)


@pytest.mark.parametrize("late", [False, True], ids=["", "late loads"])
@pytest.mark.parametrize("case", SPARSE_CASES, ids=[case.why for case in SPARSE_CASES])
def test_rows_named_by_index(
    case: test_sparse.Case, late: bool, on_host: OnHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On slots that cut and slots that do not."""
    on_host.loads_are_late = late
    check_rows_by_index(case, on_host, monkeypatch, 3)


TILES_BY_INDEX = {
    5: "sparse_few16_bf16_512_64",
    20: "sparse_few32_bf16_512_64",
    40: "sparse_bf16_512_64",
    70: "sparse_pair_bf16_512_64",
}


@pytest.mark.parametrize("late", [False, True], ids=["", "late loads"])
@pytest.mark.parametrize(("num_heads", "ahead"), [*((heads, -1) for heads in TILES_BY_INDEX), *AHEAD])
def test_rings_of_rows_by_index(
    num_heads: int, ahead: int, late: bool, on_host: OnHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many times around in one slot, over queries without rows, each warpgroup as far ahead as barriers let it be."""
    on_host.loads_are_late, on_host.favoured = late, ahead
    lengths = (0, 577, 0, 64, 65, 0, 130)
    case = dataclasses.replace(
        SPARSE_CASES[0], topk=577, batch=7, num_heads=num_heads, topk_length=lengths, visible=0.8
    )
    assert check_rows_by_index(case, on_host, monkeypatch, 1) == TILES_BY_INDEX[num_heads]


@pytest.mark.parametrize("num_heads", TILES_BY_INDEX)
def test_rows_by_index_with_threads_in_any_order(
    num_heads: int, on_host: OnHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_host.are_fibers, on_host.loads_are_late = False, True
    case = dataclasses.replace(
        SPARSE_CASES[0], topk=300, batch=3, num_heads=num_heads, topk_length=(300, 0, 100), visible=0.3
    )
    assert check_rows_by_index(case, on_host, monkeypatch, 1) == TILES_BY_INDEX[num_heads]


def test_few_indices_of_many_heads_are_shared_by_tiles_of_32(recorded: Recorded) -> None:  # noqa: F811
    def rows(num_heads: int, queries: int, topk: int) -> int:
        q = torch.zeros(queries, 1, num_heads, 576, dtype=torch.bfloat16)
        pool = torch.zeros(2, 64, 1, 656, dtype=torch.uint8)
        call = check_sparse(q, pool, torch.zeros(queries, 1, topk, dtype=torch.int32), 512, None, None)
        return host._fp8_rows(dataclasses.replace(call, device_type="cuda", capability=(9, 0)))

    units = host.FEWEST_WIDE_UNITS * 132
    assert [rows(128, queries, 64) for queries in (units // 2 - 1, units // 2)] == [32, 64]
    assert [rows(num_heads, 1, 64) for num_heads in (16, 17, 64)] == [16, 32, 32]


def plan_for_three_slots(lengths: torch.Tensor, slots: int) -> tuple[torch.Tensor, torch.Tensor]:
    return definition.plan(lengths, 3)


def run_sparse(
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    indices: torch.Tensor,
    monkeypatch: pytest.MonkeyPatch,
    scale: float,
    plan: Callable[[torch.Tensor, int], tuple[torch.Tensor, torch.Tensor]] = plan_for_three_slots,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`ops.sparse_decode` up to its backend, by the definition's plan; requests' queries one after the other."""
    sparse = importlib.import_module("flash_mla.backends.cuda.sparse")
    monkeypatch.setattr(sparse, "plan", plan)
    call = check_sparse(q, kv_cache, indices, 512, None, None)
    call = dataclasses.replace(call, device_type="cuda", capability=(9, 0))
    queries = q.reshape(-1, 1, *q.shape[2:])
    with equal_lengths.nothing_kept():
        out, lse, _ = sparse.sparse_decode(
            call, queries, kv_cache, indices.reshape(-1, indices.shape[2]), None, scale, None, False
        )
    return out, lse


@pytest.mark.parametrize(
    ("queries", "topk", "slots", "merges"),
    [(4, 130, 4, 0), (6, 130, 3, 0), (5, 130, 3, 1), (2, 130, 3, 0), (2, 1024, 3, 1)],
)
def test_slots_of_whole_queries_merge_nothing(
    queries: int, topk: int, slots: int, merges: int, on_host: OnHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Queries that fill the slots, or nearly, are not cut, and no second kernel is launched; others are."""
    case = dataclasses.replace(SPARSE_CASES[0], topk=topk, batch=queries, num_heads=4)
    problem = test_sparse.make(case, torch.bfloat16)
    sparse = importlib.import_module("flash_mla.backends.cuda.sparse")
    monkeypatch.setattr(sparse, "num_slots", lambda call: slots)
    before = len(on_host.recorded.combines())
    out, lse = run_sparse(
        problem.q, problem.kv_cache, problem.indices, monkeypatch, case.softmax_scale, definition.plan
    )
    test_sparse.assert_right(problem, out, lse.view(queries, 4, 1))
    assert len(on_host.recorded.combines()) - before == merges


@pytest.mark.parametrize("topk", [1, 64, 65, 130, 2048, 65536])
def test_plans_of_whole_queries_cut_nothing(topk: int) -> None:
    sparse = importlib.import_module("flash_mla.backends.cuda.sparse")
    units, found = -(-topk // 64), 0
    for most in (1, 2, 3, 33, 66, 132):
        for queries in range(1, 300):
            slots = sparse._slots_of_whole(queries, units, most)
            if slots is None:
                continue
            found += 1
            assert slots <= most
            assert queries % slots == 0
            # What idle slots cost is at most an item.
            assert queries // slots * units <= queries * units / most + ITEM_COST
            if queries < 150:
                _, splits = definition.plan(torch.full((queries,), topk, dtype=torch.int32), slots)
                assert bool((splits[:, 1] == 1).all())
    assert found > 300


def test_which_queries_are_left_whole() -> None:
    slots_of_whole = importlib.import_module("flash_mla.backends.cuda.sparse")._slots_of_whole
    queries = (0, 1, 57, 58, 66, 67, 128)
    assert [slots_of_whole(n, 32, 66) for n in queries] == [None, None, None, 58, 66, None, 64]
    # Of long lists idle slots cost more than a cut.
    assert [slots_of_whole(n, 1024, 66) for n in queries] == [None, None, None, None, 66, None, None]


def test_a_plan_that_cuts_is_not_taken_for_one_that_does_not(on_host: OnHost, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same queries in as many slots, without lengths and with them: what is kept of a call is for one of both."""
    case = dataclasses.replace(SPARSE_CASES[0], topk=1024, batch=3, num_heads=4)
    problem = test_sparse.make(case, torch.bfloat16)
    sparse = importlib.import_module("flash_mla.backends.cuda.sparse")
    monkeypatch.setattr(sparse, "plan", definition.plan)
    monkeypatch.setattr(sparse, "num_slots", lambda call: 3)
    some = torch.tensor((1024, 1, 1), dtype=torch.int32)
    for lengths in (None, some, None):
        of_lengths = None if lengths is None else tuple(lengths.tolist())
        wanted = dataclasses.replace(problem, case=dataclasses.replace(case, topk_length=of_lengths))
        call = check_sparse(problem.q, problem.kv_cache, problem.indices, 512, None, lengths)
        call = dataclasses.replace(call, device_type="cuda", capability=(9, 0))
        before = len(on_host.recorded.combines())
        with equal_lengths.nothing_kept():
            out, lse, _ = sparse.sparse_decode(
                call, problem.q, problem.kv_cache, problem.indices[:, 0], lengths, case.softmax_scale, None, False
            )
        assert len(on_host.recorded.combines()) - before == (lengths is not None)
        test_sparse.assert_right(wanted, out, lse.view(3, 4, 1))


@pytest.mark.parametrize("num_heads", [4, 20, 40, 70])
def test_the_first_row_that_is_named_sets_the_reference(
    num_heads: int, on_host: OnHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    """64 indices that name nothing, and then one of a score so low that it is 0 beside anything above -126."""
    monkeypatch.setattr(host, "FEWEST_WIDE_UNITS", 0)
    problem = test_sparse.make(dataclasses.replace(SPARSE_CASES[0], topk=70), torch.bfloat16)
    index = int(problem.indices[0, 0, 0])
    row = problem.kv_cache.flatten(0, 2)[index]
    latent, k_rope = decode_rows(row, 512, 64, torch.float32)
    key = torch.cat((latent, k_rope))
    q = (-key * 200 / key.square().sum()).bfloat16().expand(1, 1, num_heads, 576).contiguous()
    indices = torch.full((1, 1, 70), -1, dtype=torch.int32)
    indices[0, 0, 66] = index
    out, lse = run_sparse(q, problem.kv_cache, indices, monkeypatch, 1.0)
    assert bool((lse + 200).abs().max() < 1)
    torch.testing.assert_close(out[0, 0].float(), latent.expand(num_heads, 512), rtol=2**-8, atol=0)


def test_views_that_differ_in_nothing_but_a_folded_stride(on_host: OnHost, monkeypatch: pytest.MonkeyPatch) -> None:
    """Six requests of one query and one of six, from one address with the same strides: other queries."""
    problem = test_sparse.make(dataclasses.replace(SPARSE_CASES[0], topk=20, batch=6), torch.bfloat16)
    q = torch.randn(6, 6, 4, 576).bfloat16()
    requests = run_sparse(q[:, :1], problem.kv_cache, problem.indices, monkeypatch, 0.05)
    queries = run_sparse(q[:1], problem.kv_cache, problem.indices.view(1, 6, 20), monkeypatch, 0.05)
    again = run_sparse(q[:1].clone(), problem.kv_cache, problem.indices.view(1, 6, 20), monkeypatch, 0.05)
    assert torch.equal(queries[0], again[0])
    assert not torch.equal(requests[0], queries[0])


def test_what_is_kept_is_for_eager_calls_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(equal_lengths, "_kept", {})

    def lengths() -> torch.Tensor:
        return equal_lengths.equal_lengths(torch.device("cpu"), 3, 64, 2, definition.plan)[0]

    kept = lengths()
    assert lengths() is kept
    with equal_lengths.nothing_kept():
        assert lengths() is not kept
    monkeypatch.setattr(equal_lengths, "_may_keep", lambda device: False)
    assert lengths() is not kept
    assert len(equal_lengths._kept) == 1
