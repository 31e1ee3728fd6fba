"""kernels/dense_decode.cu itself, compiled for the host against an emulation of what it uses of Hopper.

See `hopper_on_host.h`: swizzles, matrix descriptors, fragments and barriers are taken apart as the PTX ISA defines
them, so the kernel's own addresses, layouts and protocol are what is tested here, without a GPU.
"""

from __future__ import annotations

import ctypes
import dataclasses
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from cases import Case
from fake_cuda import Launch
from numerics import assert_right
from test_cuda_decode import Recorded, cubins, decode, plan_of, recorded, small  # noqa: F401

from flash_mla import _build
from flash_mla.contract import LATENT_SHAPES

SOURCE = _build.KERNELS / "dense_decode.cu"
HEADERS = Path(__file__).parent


def replaced(text: str, old: str, new: str) -> str:
    assert text.count(old) == 1, f"not once in the source any more: {old}"
    return text.replace(old, new)


def host_source(text: str) -> str:
    """The kernel's source without its instantiations, and a function that runs it on the host."""
    stages = dict(re.findall(r"^DECODE_KERNEL\(fp16_(\w+), \d+, \d+, (\d+), false\)$", text, re.MULTILINE))
    text = text.partition("#define DECODE_KERNEL")[0]
    text = replaced(text, "extern __shared__ __align__(1024) uint8_t dynamic_shared[];", "")
    text = replaced(text, 'asm volatile("mov.u32 %0, dynamic_shared;" : "=r"(base));', "base = SHARED_BASE;")
    runs = "".join(
        f"  if (rank == {rank} && rope == {rope}) "
        f"return launch_on_host(decode<Shape<{rank}, {rope}, {stages[f'{rank}_{rope}']}, false>>, aligned, blocks);\n"
        for rank, rope in LATENT_SHAPES
    )
    return (
        f'{text}\nextern "C" int run(int rank, int rope, const void* params, int blocks) {{\n'
        f"  DecodeParams aligned;\n  memcpy(&aligned, params, sizeof aligned);\n{runs}  return 0;\n}}\n"
    )


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++")
    return compiled(SOURCE.read_text(), tmp_path_factory.mktemp("host"), compiler)


def compiled(text: str, folder: Path, compiler: str) -> ctypes.CDLL:
    """A host library of `text`, which is kernels/dense_decode.cu."""
    shutil.copy(_build.KERNELS / "params.cuh", folder)
    shutil.copy(HEADERS / "hopper_on_host.h", folder / "ptx.cuh")
    # Descriptors are the kernel's own; the instructions below them are the emulation's.
    wgmma, fence, _ = (
        (_build.KERNELS / "wgmma.cuh").read_text().partition("__device__ __forceinline__ void wgmma_fence")
    )
    assert fence
    (folder / "wgmma.cuh").write_text(wgmma)
    (folder / "decode.cpp").write_text(host_source(text))
    options = ["-std=c++17", "-O2", "-fno-strict-aliasing", "-pthread", "-shared", "-fPIC", f"-I{folder}"]
    subprocess.run([compiler, *options, "-o", str(folder / "decode.so"), str(folder / "decode.cpp")], check=True)
    return ctypes.CDLL(str(folder / "decode.so"))


@pytest.fixture
def on_host(recorded: Recorded, library: ctypes.CDLL) -> Recorded:  # noqa: F811
    """A recorder that runs the kernel's own source in place of the model of it."""

    def run(launch: Launch) -> None:
        rank, rope = map(int, launch.kernel.split("_")[-2:])
        assert library.run(rank, rope, launch.params, launch.grid[0]) == 1, "a wait without an end, or a wrong address"

    recorded.run_decode = run
    return recorded


ON_HOST = (
    Case("DeepSeek's shape: Q in registers, one step without swizzle, four of the rotated columns; an odd row count",
         (130,), num_heads=20, kv_lora_rank=512, qk_rope_head_dim=64),
    Case("256 + 64", (70, 0, 65), num_heads=3, kv_lora_rank=256, qk_rope_head_dim=64),
    Case("256 + 32: the last tile reaches past the row", (70,), num_heads=40, kv_lora_rank=256, qk_rope_head_dim=32),
    Case("128 + 32, two row tiles, causal", (66, 3, 1), num_heads=36, seqlen_q=2),
    Case("two latent heads", (65,), num_heads=8, h_kv=2),
    Case("pages of 48: boxes of 16 rows", (49, 100), block_size=48),
    Case("pages of 128: a unit begins inside one", (129,), block_size=128),
    Case("large scores: O is rescaled", (400,), num_heads=40, q_factor=6.0),
    Case("more queries than tokens", (2, 0), num_heads=16, seqlen_q=4),
)  # fmt: skip


@pytest.mark.parametrize("case", ON_HOST, ids=[case.why for case in ON_HOST])
def test_result(case: Case, on_host: Recorded) -> None:
    """Whole, and with every request in parts: each writes other memory."""
    problem = small(case)
    assert_right(problem, *decode(problem, plan_of(problem, 1)))
    longer = dataclasses.replace(problem, cache_seqlens=problem.cache_seqlens * 100 + 1000)
    plan = plan_of(longer, 4)
    assert int(plan[1][:, 1].max()) > 1
    assert_right(problem, *decode(problem, plan))


@pytest.mark.parametrize("num_slots", [1, 3])
def test_items_back_to_back(num_slots: int, on_host: Recorded) -> None:
    """Ring slots go from request to request, over empty ones; whole requests and parts follow one another."""
    problem = small(Case("items", (65, 0, 1, 200, 0, 0, 64, 128, 3, 1800), num_heads=2))
    plan = plan_of(problem, num_slots)
    assert num_slots == 1 or int(plan[1][:, 1].max()) > 1
    assert_right(problem, *decode(problem, plan))


def test_a_ring_of_three_slots_many_times_around(on_host: Recorded) -> None:
    problem = small(Case("ring", (64, 65, 0, 300, 1), num_heads=1, kv_lora_rank=512, qk_rope_head_dim=64))
    assert_right(problem, *decode(problem, plan_of(problem, 1)))
