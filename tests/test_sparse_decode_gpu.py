"""Sparse decode over bf16 and fp16 rows on a GPU (kernels/sparse_decode.cu), which no call chooses by itself yet."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Iterator

import pytest
import torch
from cases import ON_HOPPER

if not ON_HOPPER:
    pytest.skip("needs Hopper: the compiled kernels are for nothing else", allow_module_level=True)

import test_sparse

from flash_mla import ops
from flash_mla.backends.cuda import driver

host = importlib.import_module("flash_mla.backends.cuda.decode")  # the package has the function of this name
SHAPE = {"kv_lora_rank": 512, "qk_rope_head_dim": 64}
BOTH_DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])


@pytest.fixture(autouse=True)
def rows_by_index(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    launched: list[str] = []
    function = driver.function

    def recorded(device_index: int, cubin: str, name: str, shared_memory: int = 0) -> int:
        launched.append(name)
        return function(device_index, cubin, name, shared_memory)

    monkeypatch.setattr(host, "SPARSE_ROWS", True)
    monkeypatch.setattr(driver, "function", recorded)
    for forget in (driver.memo.clear, ops._choose.cache_clear):  # calls that were prepared and chosen without
        forget()
    yield
    for forget in (driver.memo.clear, ops._choose.cache_clear):
        forget()
    assert any("mla_sparse_kernel" in name for name in launched)


OF_SHAPE = (dataclasses.replace(case, **SHAPE) for case in test_sparse.CASES if not case.fp8)
CASES = (
    *OF_SHAPE,
    test_sparse.Case("many queries", 700, 40, 2, 128, num_blocks=60, **SHAPE),
    test_sparse.Case("16 heads, many queries", 2048, 100, num_heads=16, num_blocks=60, **SHAPE),
    test_sparse.Case("lengths, many units", 700, 8, 2, 128, num_blocks=60, topk_length=(0, 1, 65, 700) * 2, **SHAPE),
    test_sparse.Case("large scores", 2000, num_heads=64, num_blocks=60, softmax_scale=0.4, **SHAPE),
)


@BOTH_DTYPES
@pytest.mark.parametrize("case", CASES, ids=[case.why for case in CASES])
def test_result(case: test_sparse.Case, dtype: torch.dtype) -> None:
    problem = test_sparse.make(case, dtype)
    test_sparse.assert_right(problem, *problem.run("cuda"))
    test_sparse.assert_right(problem, *problem.run("cuda"))  # lengths and plan are kept


@pytest.mark.parametrize(("num_heads", "topk"), [(16, 2048), (128, 2048), (128, 70)])
def test_the_same_bits_every_time(num_heads: int, topk: int) -> None:
    """A race would show as other bits, now and then; a graph has launches back to back."""
    case = test_sparse.Case("again", topk, 33, num_heads=num_heads, num_blocks=60, **SHAPE)
    problem = test_sparse.make(case, torch.bfloat16)
    out, lse = problem.run("cuda")
    test_sparse.assert_right(problem, out, lse)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = [problem.run("cuda") for _ in range(50)]
    for _ in range(4):
        graph.replay()
        for again_out, again_lse in captured:
            assert torch.equal(again_out.view(torch.int16), out.view(torch.int16))
            assert torch.equal(again_lse.view(torch.int32), lse.view(torch.int32))
