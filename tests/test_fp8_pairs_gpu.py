"""Pairs of CTAs over FP8 rows on a GPU (kernels/dense_decode_fp8_pair.cu), which no call chooses by itself yet."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Iterator

import pytest
import torch
from cases import ON_HOPPER, Case, make
from numerics import assert_right

if not ON_HOPPER:
    pytest.skip("needs Hopper: the compiled kernels are for nothing else", allow_module_level=True)

import test_fp8_gpu
import test_sparse
from test_fp8_gpu import CASES, SHAPE, run

import flash_mla
from flash_mla import ops
from flash_mla.backends.cuda import driver

host = importlib.import_module("flash_mla.backends.cuda.decode")  # the package has the function of this name


@pytest.fixture(autouse=True)
def in_pairs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Tiles of 64 rows however few indices there are, in pairs; what is yielded are the kernels that were launched."""
    launched: list[str] = []
    function = driver.function

    def recorded(device_index: int, cubin: str, name: str, shared_memory: int = 0) -> int:
        launched.append(name)
        return function(device_index, cubin, name, shared_memory)

    monkeypatch.setattr(host, "PAIRS", True)
    monkeypatch.setattr(host, "FEWEST_WIDE_UNITS", 0)
    monkeypatch.setattr(driver, "function", recorded)
    driver.memo.clear()  # of calls that were prepared without
    yield launched
    driver.memo.clear()
    assert any("_pair_" in name for name in launched)


PAIR_CASES = (
    *(case for case in CASES if case.num_heads in (100, 128)),
    Case("66 rows", (200, 129), num_heads=66, **SHAPE),
    Case("four tiles, causal", (129, 67, 130, 4000), num_heads=64, seqlen_q=4, **SHAPE),
    Case("two latent heads", (70, 3, 900), num_heads=160, h_kv=2, **SHAPE),
    Case("pages of 16", (70, 3, 1000), num_heads=128, block_size=16, **SHAPE),
    Case("pages of 48", (49, 100, 1000), num_heads=80, block_size=48, **SHAPE),
    Case("pages of 128", (129, 3000), num_heads=128, block_size=128, **SHAPE),
    Case("large scores", (7000,), num_heads=128, q_factor=6.0, **SHAPE),
    Case("long", (100_000, 7), num_heads=128, **SHAPE),
    Case("nothing", (0, 0), num_heads=128, **SHAPE),
)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("case", PAIR_CASES, ids=[case.why for case in PAIR_CASES])
def test_decode(case: Case, seed: int) -> None:
    problem = make(case, torch.bfloat16, seed=seed)
    assert_right(problem, *run(problem))


@pytest.mark.parametrize("num_slots", [1, 3, 66])
def test_any_number_of_slots(num_slots: int) -> None:
    problem = make(Case("slots", (0, 1, 64, 65, 700, 5000, 2560, 0), num_heads=128, **SHAPE), torch.bfloat16)
    items, splits = ops.BACKENDS["cuda"].plan(problem.cache_seqlens, num_slots)
    plan = flash_mla.SplitPlan(items, splits, 8, 1, 128, 1)
    assert_right(problem, *run(problem, plan=plan))


def test_the_same_bits_every_time() -> None:
    """A race would show as other bits, now and then."""
    problem = make(Case("again", tuple(range(1, 4000, 61)), num_heads=128, **SHAPE), torch.bfloat16)
    first = run(problem)
    for _ in range(300):
        again = run(problem)
        assert torch.equal(again[0].view(torch.int16), first[0].view(torch.int16))
        assert torch.equal(again[1].view(torch.int32), first[1].view(torch.int32))


def test_launches_back_to_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing between them: a launch begins in shared memory that the one before has just left, in pairs or not, and
    short ones end while others still arrive."""
    cases = (
        Case("short", (1, 0, 65), num_heads=128, **SHAPE),
        Case("one tile", (70, 3), num_heads=64, **SHAPE),
        Case("long", (3000, 64, 129), num_heads=128, **SHAPE),
    )
    problems = [make(case, torch.bfloat16, seed=seed) for seed, case in enumerate(cases)]
    right = [run(problem) for problem in problems]
    for problem, result in zip(problems, right, strict=True):
        assert_right(problem, *result)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = [run(problem) for _ in range(30) for problem in problems]
    eager = [run(problem) for _ in range(100) for problem in problems]
    for _ in range(10):
        graph.replay()
    for results in (eager, captured):
        for number, (out, lse) in enumerate(results):
            assert torch.equal(out.view(torch.int16), right[number % 3][0].view(torch.int16))
            assert torch.equal(lse.view(torch.int32), right[number % 3][1].view(torch.int32))


def test_in_a_graph_over_growing_lengths() -> None:
    test_fp8_gpu.test_in_a_graph_over_growing_lengths(128)


SPARSE_CASES = tuple(
    dataclasses.replace(case, num_heads=128) for case in test_sparse.HOPPER_CASES if case.kv_lora_rank == 512
)


@pytest.mark.parametrize("case", SPARSE_CASES, ids=[case.why for case in SPARSE_CASES])
def test_rows_by_index(case: test_sparse.Case) -> None:
    problem = test_sparse.make(case, torch.bfloat16)
    test_sparse.assert_right(problem, *problem.run("cuda"))
    test_sparse.assert_right(problem, *problem.run("cuda"))


@pytest.mark.parametrize("has_lengths", [True, False], ids=["lengths", "all"])
@pytest.mark.parametrize(("batch", "topk"), [(3, 300), (16, 300), (26, 2048)])
def test_rows_by_index_in_a_graph(batch: int, topk: int, has_lengths: bool) -> None:
    test_sparse.test_the_compiled_kernel_in_a_graph(128, batch, topk, has_lengths)
