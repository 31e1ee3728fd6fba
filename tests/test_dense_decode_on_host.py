"""The decode kernels themselves, compiled for the host against an emulation of what they use of Hopper.

See `hopper_on_host.h`: swizzles, matrix descriptors, fragments and barriers are taken apart as the PTX ISA defines
them, so the kernels' own addresses, layouts and protocols are what is tested here, without a GPU.
"""

from __future__ import annotations

import ctypes
import dataclasses
import shutil
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from cases import Case, Problem
from fake_cuda import Launch
from numerics import assert_right
from test_cuda_decode import (  # noqa: F401
    SOURCES,
    Plan,
    Recorded,
    cubins,
    decode,
    instantiations,
    plan_of,
    recorded,
    small,
)

from flash_mla import _build

HEADERS = Path(__file__).parent
PREFIX = "flash_fwd_splitkv_mla_kernel_"


def replaced(text: str, old: str, new: str) -> str:
    assert text.count(old) == 1, f"not once in the source any more: {old}"
    return text.replace(old, new)


def host_source(file: str, text: str) -> str:
    """A kernel file's source without its instantiations, and a function that runs those of fp16 on the host."""
    text = text.partition("#define DECODE_KERNEL")[0]
    text = replaced(text, "extern __shared__ __align__(1024) uint8_t dynamic_shared[];", "")
    text = replaced(text, 'asm volatile("mov.u32 %0, dynamic_shared;" : "=r"(base));', "base = SHARED_BASE;")
    runs = "".join(
        f'  if (!strcmp(kernel, "{PREFIX}{name}"))\n'
        f"    return launch_on_host(decode<Shape<{', '.join(arguments)}>>, aligned, {{blocks, 1, 1}}, 384);\n"
        for name, arguments in instantiations(file).items()
        if arguments[-1] == "false"  # not of bf16
    )
    return (
        f'{text}\nextern "C" int run(const char* kernel, const void* params, int blocks, int late, int on_fibers) {{\n'
        f"  DecodeParams aligned;\n  memcpy(&aligned, params, sizeof aligned);\n  loads_are_late = late;\n"
        f"  are_fibers = on_fibers;\n"
        f"{runs}  return 0;\n}}\n"
    )


def compiled(
    file: str, text: str, folder: Path, changed: Mapping[str, Callable[[str], str]] | None = None
) -> ctypes.CDLL:
    """A host library of `text`, which is kernels/<file>.cu with a function that runs its kernels.

    `changed`: headers that the host wants in other words.
    """
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++")
    for header in _build.KERNELS.glob("*.cuh"):
        shutil.copy(header, folder)
    for name, change in (changed or {}).items():
        (folder / name).write_text(change((folder / name).read_text()))
    shutil.copy(HEADERS / "hopper_on_host.h", folder / "ptx.cuh")
    # Descriptors are the kernel's own; the instructions below them are the emulation's.
    wgmma, fence, _ = (
        (_build.KERNELS / "wgmma.cuh").read_text().partition("__device__ __forceinline__ void wgmma_fence")
    )
    assert fence
    (folder / "wgmma.cuh").write_text(wgmma)
    (folder / f"{file}.cpp").write_text(text)
    # Each library has variables of its own, which -fno-gnu-unique is for. Fibers jump from one stack to another, which
    # checks of longjmp take for a fault.
    unusual = ["-fno-strict-aliasing", "-fno-gnu-unique", "-U_FORTIFY_SOURCE"]
    options = ["-std=c++17", "-O2", *unusual, "-pthread", "-shared", "-fPIC"]
    output = folder / f"{file}.so"
    command = [compiler, *options, f"-I{folder}", "-o", str(output), str(folder / f"{file}.cpp")]
    subprocess.run(command, check=True)
    return ctypes.CDLL(str(output))


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ctypes.CDLL]:
    """Of each kernel file."""
    folder = tmp_path_factory.mktemp("host")
    return {file: compiled(file, host_source(file, source.read_text()), folder) for file, source in SOURCES.items()}


class OnHost:
    """A recorder that runs the kernels' own source in place of the model of them."""

    def __init__(self, recorded: Recorded, libraries: dict[str, ctypes.CDLL]) -> None:  # noqa: F811
        self.recorded = recorded
        self.libraries = libraries
        self.loads_are_late = False
        self.are_fibers = False
        self.model, recorded.run_decode = recorded.run_decode, self.run

    def run(self, launch: Launch) -> None:
        name = launch.kernel.encode()
        library = self.libraries["dense_decode_few" if b"_few" in name else "dense_decode"]
        ended = library.run(name, launch.params, launch.grid[0], self.loads_are_late, self.are_fibers)
        assert ended == 1, "a wait without an end, too many arrivals, a wrong address, or no such kernel"

    def kernels(self) -> set[str]:
        return {launch.kernel.removeprefix(PREFIX) for launch in self.recorded.launches("splitkv")}


@pytest.fixture
def on_host(recorded: Recorded, libraries: dict[str, ctypes.CDLL]) -> OnHost:  # noqa: F811
    return OnHost(recorded, libraries)


def whole(problem: Problem) -> Plan:
    """Every request whole, in one slot."""
    return plan_of(problem, 1)


LARGE = {"kv_lora_rank": 512, "qk_rope_head_dim": 64}  # the shape of the few-row kernels

ON_HOST = (
    Case("DeepSeek's shape: Q in registers, one step without swizzle, four of the rotated columns; an odd row count",
         (130,), num_heads=41, **LARGE),
    Case("256 + 64", (70, 0, 65), num_heads=3, kv_lora_rank=256, qk_rope_head_dim=64),
    Case("256 + 32: the last tile reaches past the row", (70,), num_heads=40, kv_lora_rank=256, qk_rope_head_dim=32),
    Case("128 + 32, two row tiles, causal", (66, 3, 1), num_heads=36, seqlen_q=2),
    Case("two latent heads", (65,), num_heads=8, h_kv=2),
    Case("pages of 48: boxes of 16 rows", (49, 100), block_size=48),
    Case("pages of 128: a unit begins inside one", (129,), block_size=128),
    Case("large scores: O is rescaled", (400,), num_heads=40, q_factor=6.0),
    Case("more queries than tokens", (2, 0), num_heads=16, seqlen_q=4),
    Case("few: one head, 15 rows of nothing", (130,), num_heads=1, **LARGE),
    Case("few: 16 rows, one consumer has all, one token, none", (64, 1, 0), num_heads=16, **LARGE),
    Case("few: 32 rows, the tail is the other consumer's", (65, 129), num_heads=32, **LARGE),
    Case("few: 5 rows", (200, 17), num_heads=5, **LARGE),
    Case("few: 20 rows", (130,), num_heads=20, **LARGE),
    Case("few: 25 rows, not causal, 5 queries", (66, 3), num_heads=5, seqlen_q=5, causal=False, **LARGE),
    Case("few: causal, 16 rows, the second unit is one token that one query sees", (65, 66), num_heads=8, seqlen_q=2,
         **LARGE),
    Case("few: causal, 32 rows, whole units that some queries do not see", (129, 67, 130), num_heads=8, seqlen_q=4,
         **LARGE),
    Case("few: more queries than tokens, 20 rows", (2, 0, 3), num_heads=5, seqlen_q=4, **LARGE),
    Case("few: two latent heads, two queries", (70, 3), num_heads=20, h_kv=2, seqlen_q=2, **LARGE),
    Case("few: pages of 16", (70, 3), num_heads=20, block_size=16, **LARGE),
    Case("few: pages of 48: boxes of 16 rows", (49, 100), block_size=48, **LARGE),
    Case("few: pages of 128: a unit begins inside one", (129,), num_heads=20, block_size=128, **LARGE),
    Case("few: large scores: both consumers rescale", (700,), num_heads=16, q_factor=6.0, **LARGE),
    Case("few: large scores, 32 rows", (400,), num_heads=32, q_factor=6.0, **LARGE),
    Case("few: a negative scale", (90,), num_heads=20, softmax_scale=-0.2, **LARGE),
)  # fmt: skip


@pytest.mark.parametrize("case", ON_HOST, ids=[case.why for case in ON_HOST])
def test_result(case: Case, on_host: OnHost) -> None:
    """Whole, and with every request in parts: each writes other memory."""
    problem = small(case)
    assert_right(problem, *decode(problem, whole(problem)))
    longer = dataclasses.replace(problem, cache_seqlens=problem.cache_seqlens * 100 + 1000)
    plan = plan_of(longer, 4)
    assert int(plan[1][:, 1].max()) > 1
    assert_right(problem, *decode(problem, plan))


def test_every_kernel_of_fp16_runs_here(on_host: OnHost) -> None:
    """By the names of what the cases launch: none of them is computed by another kernel than it was written for."""
    on_host.recorded.computes = False
    for case in ON_HOST:
        problem = small(case)
        decode(problem, whole(problem))
    assert on_host.kernels() == {name for file in SOURCES for name in instantiations(file) if "fp16" in name}


@pytest.mark.parametrize("num_slots", [1, 3])
@pytest.mark.parametrize(
    "options", [{"num_heads": 2}, {"num_heads": 2, **LARGE}, {"num_heads": 20, **LARGE}], ids=["128", "few16", "few32"]
)
def test_items_back_to_back(num_slots: int, options: dict[str, int], on_host: OnHost) -> None:
    """Ring slots go from request to request, over empty ones; whole requests and parts follow one another.

    In the few-row kernels items of one unit, which one consumer sits out, come to either consumer.
    """
    problem = small(Case("items", (65, 0, 1, 200, 0, 0, 64, 128, 3, 1800), **options))
    plan = plan_of(problem, num_slots)
    assert num_slots == 1 or int(plan[1][:, 1].max()) > 1
    assert_right(problem, *decode(problem, plan))


@pytest.mark.parametrize("num_heads", [1, 20, 40], ids=["few16", "few32", "64 rows"])
def test_a_ring_many_times_around(num_heads: int, on_host: OnHost) -> None:
    long = 300 if num_heads > 32 else 2200  # of few rows: pages are looked up for 32 units at a time
    problem = small(Case("ring", (64, 65, 0, long, 1), num_heads=num_heads, **LARGE))
    assert_right(problem, *decode(problem, whole(problem)))


@pytest.mark.parametrize("num_heads", [1, 20], ids=["few16", "few32"])
def test_a_request_has_the_same_bits_whichever_consumer_begins(num_heads: int, on_host: OnHost) -> None:
    """What a deterministic plan promises of a request whatever its batch mates are."""
    problem = small(Case("twice", (200, 1, 200), num_heads=num_heads, q_factor=6.0, **LARGE))
    for tensor in (problem.q, problem.block_table):
        tensor[2] = tensor[0]
    out, lse = decode(problem, whole(problem))  # the one unit between them turns the consumers round
    assert_right(problem, out, lse)
    assert torch.equal(out[0], out[2])
    assert torch.equal(lse[0], lse[2])


LATE = (
    Case("few: 16 rows", (577, 1, 130), num_heads=16, **LARGE),
    Case("few: 32 rows", (577, 1, 130), num_heads=32, **LARGE),
    Case("few: boxes of 32 tokens", (270, 64), num_heads=5, block_size=32, **LARGE),
    Case("64 rows", (300, 1, 130), num_heads=40, **LARGE),
    Case("128 + 32", (700, 1, 130), num_heads=40),
)


@pytest.mark.parametrize("case", LATE, ids=[case.why for case in LATE])
def test_loads_may_come_in_any_order(case: Case, on_host: OnHost) -> None:
    """TMA promises no order: each load comes when nothing else can go on, the last issued of them first.

    A wait for a phase tells it from its neighbours only. Whoever waits for a phase while the one before has not ended
    goes on with what is not there yet.
    """
    on_host.loads_are_late = True
    problem = small(case)
    assert_right(problem, *decode(problem, whole(problem)))
