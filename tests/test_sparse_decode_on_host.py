"""The sparse kernel of bf16 and fp16 rows, compiled for the host against the emulation of `hopper_on_host.h`."""

from __future__ import annotations

import ctypes
import dataclasses
from pathlib import Path

import pytest
import test_sparse
import torch
from test_cuda_decode import Recorded, cubins, host, recorded  # noqa: F401
from test_dense_decode_on_host import compiled
from test_fp8_decode_on_host import CHANGED, SPARSE_CASES, OnHost, check_rows_by_index, host_source, run_sparse

from flash_mla import _build
from flash_mla.contract import check_sparse

SOURCE = _build.KERNELS / "sparse_decode.cu"
KERNEL = "flash_fwd_splitkv_mla_sparse_kernel_"
CASES = tuple(dataclasses.replace(case, fp8=False) for case in SPARSE_CASES)
WARPGROUPS = 4  # score, two of values, bring
BOTH_DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    folder = tmp_path_factory.mktemp("sparse_decode")
    return compiled("sparse_decode", host_source(SOURCE, KERNEL), folder, CHANGED)


@pytest.fixture
def on_host(
    recorded: Recorded,  # noqa: F811
    library: ctypes.CDLL,
    monkeypatch: pytest.MonkeyPatch,
) -> OnHost:
    monkeypatch.setattr(host, "SPARSE_ROWS", True)
    return OnHost(recorded, {"sparse_decode": library})


@pytest.mark.parametrize("late", [False, True], ids=["", "late copies"])
@BOTH_DTYPES
@pytest.mark.parametrize("case", CASES, ids=[case.why for case in CASES])
def test_result(
    case: test_sparse.Case, dtype: torch.dtype, late: bool, on_host: OnHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On slots that cut and slots that do not."""
    on_host.loads_are_late = late
    name = check_rows_by_index(case, on_host, monkeypatch, 3, dtype)
    assert name == f"{KERNEL}{'bf16' if dtype == torch.bfloat16 else 'fp16'}_512_64"


def ring(num_heads: int) -> test_sparse.Case:
    lengths = (0, 577, 0, 64, 65, 0, 130)
    of_scores = {"visible": 0.8, "softmax_scale": 0.4}  # large enough for the reference to rise
    return dataclasses.replace(CASES[0], topk=577, batch=7, num_heads=num_heads, topk_length=lengths, **of_scores)


@pytest.mark.parametrize("late", [False, True], ids=["", "late copies"])
@pytest.mark.parametrize("ahead", range(-1, WARPGROUPS))
def test_a_ring_many_times_around(ahead: int, late: bool, on_host: OnHost, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one slot, over queries without rows, each warpgroup as far ahead as barriers let it be."""
    on_host.loads_are_late, on_host.favoured = late, ahead
    check_rows_by_index(ring(5), on_host, monkeypatch, 1)


@pytest.mark.parametrize("warp", range(0, 4 * WARPGROUPS, 4))
def test_one_warp_may_be_behind(warp: int, on_host: OnHost, monkeypatch: pytest.MonkeyPatch) -> None:
    on_host.delayed = warp
    check_rows_by_index(ring(40), on_host, monkeypatch, 1)


def test_threads_in_any_order(on_host: OnHost, monkeypatch: pytest.MonkeyPatch) -> None:
    on_host.are_fibers = False
    case = dataclasses.replace(CASES[0], topk=300, batch=3, num_heads=20, topk_length=(300, 0, 100), visible=0.3)
    check_rows_by_index(case, on_host, monkeypatch, 1)


@pytest.mark.parametrize("garbage", [0xFF800000, 0x7F7F7F7F], ids=["-inf", "3e38"])
def test_what_shared_memory_held_before(garbage: int, on_host: OnHost, monkeypatch: pytest.MonkeyPatch) -> None:
    on_host.garbage = garbage
    case = dataclasses.replace(CASES[0], topk=70, batch=3, num_heads=5, topk_length=(0, 70, 0), visible=0.5)
    check_rows_by_index(case, on_host, monkeypatch, 1)


@BOTH_DTYPES
def test_the_first_row_that_is_named_sets_the_reference(
    dtype: torch.dtype, on_host: OnHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    """64 indices that name nothing, and then one of a score so low that it is 0 beside anything above -126."""
    problem = test_sparse.make(dataclasses.replace(CASES[0], topk=70), dtype)
    index = int(problem.indices[0, 0, 0])
    key = problem.kv_cache.flatten(0, 2)[index].float()
    q = (-key * 200 / key.square().sum()).to(dtype).expand(1, 1, 5, 576).contiguous()
    indices = torch.full((1, 1, 70), -1, dtype=torch.int32)
    indices[0, 0, 66] = index
    out, lse = run_sparse(q, problem.kv_cache, indices, monkeypatch, 1.0)
    assert bool((lse + 200).abs().max() < 1)
    torch.testing.assert_close(out[0, 0].float(), key[:512].expand(5, 512), rtol=2**-8, atol=0)


def test_large_scores(on_host: OnHost, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference has to rise."""
    case = dataclasses.replace(CASES[0], topk=400, num_heads=20, visible=0.9, softmax_scale=0.4)
    check_rows_by_index(case, on_host, monkeypatch, 1)


def test_a_query_that_is_not_finite_is_nan_and_no_other_one(on_host: OnHost, monkeypatch: pytest.MonkeyPatch) -> None:
    case = dataclasses.replace(CASES[0], topk=70, num_heads=5, visible=0.5)
    make = test_sparse.make

    def with_nan(case: test_sparse.Case, dtype: torch.dtype, seed: int = 0) -> test_sparse.Problem:
        problem = make(case, dtype, seed)
        problem.q[0, 0, 2, 530] = float("nan")
        return problem

    seen = []

    def keep(problem: test_sparse.Problem, out: torch.Tensor, lse: torch.Tensor) -> None:
        seen.append((out, lse))

    monkeypatch.setattr(test_sparse, "make", with_nan)
    monkeypatch.setattr(test_sparse, "assert_right", keep)
    check_rows_by_index(case, on_host, monkeypatch, 1)
    ((out, lse),) = seen
    assert bool(out[0, 0, 2].isnan().all() and lse[0, 2].isnan().all())
    others = [head for head in range(5) if head != 2]
    assert bool(out[0, 0, others].isfinite().all() and lse[0, others].isfinite().all())


def test_refusals(on_host: OnHost, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = test_sparse.make(CASES[0], torch.bfloat16)
    call = check_sparse(
        problem.q, problem.kv_cache, problem.indices, 512, problem.attn_sink, problem.topk_length, "sparse_decode"
    )
    call = dataclasses.replace(call, device_type="cuda", capability=(9, 0))
    assert host.decode_refusals(call) == []
    far_apart = (
        "takes indices into a pool whose rows are all equally far apart, got 576 elements in blocks of 64 that are"
    )
    changes: tuple[tuple[dict[str, object], str], ...] = (
        (
            {"kv_lora_rank": 256},
            "takes rows by index of (kv_lora_rank, qk_rope_head_dim) in [(512, 64)], got (256, 64)",
        ),
        ({"num_blocks": 2**20}, f"takes rows by index within 64 GiB, got {2**26} of 1152 bytes"),
        ({"kv_cache_strides": (2 * 36864, 576, 576, 1)}, f"{far_apart} 73728 apart"),
    )
    for changed, reason in changes:
        assert host.decode_refusals(dataclasses.replace(call, **changed)) == [reason]
    monkeypatch.setattr(host, "SPARSE_ROWS", False)
    assert host.decode_refusals(call) == ["has no kernel for sparse attention over rows that are not FP8"]


def test_shared_memory_is_that_of_the_device_code(tmp_path: Path) -> None:
    for header in _build.KERNELS.glob("*.cuh"):
        (tmp_path / header.name).write_text(header.read_text())
    text = SOURCE.read_text().partition("#define DECODE_KERNEL")[0]
    text += f"static_assert(sizeof(Shape<true>::Memory) == {host.SPARSE_BYTES});\n"
    (tmp_path / "probe.cu").write_text(text + 'extern "C" __global__ void probe() {}')
    _build.build(["probe"], kernels=tmp_path, out=tmp_path / "out", lax=True)
