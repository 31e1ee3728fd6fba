"""FlashMLA's functions beyond dense attention: rows named by index, FP8 rows, a second cache, sinks, sparse prompts."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

import cases
import pytest
import torch
from cases import BACKENDS, DEVICE
from numerics import LSE_ERROR, OneByOne

import flash_mla
from flash_mla import flash_mla_sparse_fwd, flash_mla_with_kvcache, get_mla_metadata, ops
from flash_mla.codec import decode_rows, encode_rows
from flash_mla.contract import UnsupportedError

OURS = dict(ops.BACKENDS)
INF = float("inf")


def only(monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    """The functions have no argument for the backend: leave them one."""
    monkeypatch.setattr(ops, "BACKENDS", {backend: OURS[backend]})
    ops._choose.cache_clear()


@pytest.fixture(autouse=True)
def definition_only(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    only(monkeypatch, "torch")
    yield
    ops._choose.cache_clear()


@pytest.fixture(
    params=[(backend, dtype) for backend, dtype in BACKENDS if backend != "cuda"],
    ids=lambda param: f"{param[0]}-{str(param[1])[6:]}",
)
def dtype(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, definition_only: None) -> torch.dtype:
    """Of the queries, on the one backend that is left."""
    backend, dtype = request.param
    only(monkeypatch, backend)
    return dtype


@dataclass(frozen=True)
class Case:
    """One sparse call; `visible` is how many of a query's indices name a row, the others are -1 or past the pool."""

    why: str
    topk: int = 70
    extra_topk: int | None = None
    batch: int = 2
    seqlen_q: int = 1
    num_heads: int = 4
    visible: float = 0.8
    extra_visible: float = 0.8
    topk_length: tuple[int, ...] | None = None
    extra_topk_length: tuple[int, ...] | None = None
    sinks: bool = False
    block_size: int = 64
    extra_block_size: int = 24
    kv_lora_rank: int = 128
    qk_rope_head_dim: int = 32
    softmax_scale: float | None = 0.11
    fp8: bool = False


CASES = (
    Case("one cache"),
    Case("FlashMLA's scale", softmax_scale=None),
    Case("sinks", sinks=True, num_heads=20),
    Case("lengths, 0 and all among them", batch=4, seqlen_q=2, topk_length=(0, 1, 50, 70)),
    Case("two caches", extra_topk=33),
    Case("two caches, sinks", extra_topk=33, sinks=True, num_heads=5),
    Case("two caches, nothing visible in the first", visible=0.0, extra_topk=20),
    Case("two caches, nothing visible in the second", extra_topk=20, extra_visible=0.0, sinks=True),
    Case("two caches, nothing visible in either", visible=0.0, extra_topk=20, extra_visible=0.0),
    Case("two caches, nothing visible in either, sinks", visible=0.0, extra_topk=9, extra_visible=0.0, sinks=True),
    Case("two caches, no index into the second", extra_topk=0),
    Case("two caches, one long enough to be cut", topk=5, extra_topk=1500, batch=1),
    Case(
        "all together",
        batch=5,
        seqlen_q=2,
        num_heads=40,
        extra_topk=130,
        topk_length=(70, 0, 0, 9, 33),
        extra_topk_length=(1, 0, 130, 77, 0),
        sinks=True,
    ),
    Case("256 + 64 columns", kv_lora_rank=256, qk_rope_head_dim=64, extra_topk=20, sinks=True),
    Case("DeepSeek's shape", kv_lora_rank=512, qk_rope_head_dim=64, num_heads=16, extra_topk=65, sinks=True),
)
CASES += tuple(dataclasses.replace(case, fp8=True) for case in CASES)
IDS = [case.why + (", FP8" if case.fp8 else "") for case in CASES]


@dataclass(frozen=True)
class Part:
    """A cache and what is named in it."""

    cache: torch.Tensor
    indices: torch.Tensor
    topk_length: torch.Tensor | None

    @property
    def num_rows(self) -> int:
        return self.cache.shape[0] * self.cache.shape[1]


@dataclass(frozen=True)
class Problem:
    case: Case
    q: torch.Tensor
    parts: tuple[Part, ...]
    attn_sink: torch.Tensor | None

    def options(self) -> dict[str, object]:
        """Arguments of `flash_mla_with_kvcache` from `softmax_scale` on."""
        part, *extra = self.parts
        options = {
            "softmax_scale": self.case.softmax_scale,
            "is_fp8_kvcache": self.case.fp8,
            "indices": part.indices,
            "attn_sink": self.attn_sink,
            "topk_length": part.topk_length,
        }
        if extra:
            options["extra_k_cache"] = extra[0].cache
            options["extra_indices_in_kvcache"] = extra[0].indices
            options["extra_topk_length"] = extra[0].topk_length
        return options

    def run(self, *metadata: object) -> tuple[torch.Tensor, torch.Tensor]:
        """Neither table nor lengths: sparse attention has no use for them."""
        cache = self.parts[0].cache
        return flash_mla_with_kvcache(self.q, cache, None, None, self.case.kv_lora_rank, *metadata, **self.options())


def make(case: Case, dtype: torch.dtype, seed: int = 0) -> Problem:
    """Half of the rows are NaN: no index that counts names them. What does not count names them, or lies outside."""
    generator = torch.Generator().manual_seed(seed)
    d_qk = case.kv_lora_rank + case.qk_rope_head_dim

    def part(topk: int, visible: float, block_size: int, lengths: tuple[int, ...] | None) -> Part:
        num_rows = 5 * block_size
        rows = torch.randn((num_rows, d_qk), generator=generator)
        order = torch.randperm(num_rows, generator=generator)
        good, bad = order[: num_rows // 2], order[num_rows // 2 :]
        rows[bad] = float("nan")
        if case.fp8:
            rows = encode_rows(rows[:, : case.kv_lora_rank], rows[:, case.kv_lora_rank :])
        shape = (case.batch, case.seqlen_q, topk)
        indices = good[torch.randint(len(good), shape, generator=generator)]
        outside = torch.tensor([-1, -7, num_rows, 2**31 - 1])[torch.randint(4, shape, generator=generator)]
        indices = torch.where(torch.rand(shape, generator=generator) < visible, indices, outside)
        if lengths is not None:
            past = torch.arange(topk) >= torch.tensor(lengths)[:, None, None]
            indices = torch.where(past, bad[torch.randint(len(bad), shape, generator=generator)], indices)
        return Part(
            rows.view(5, block_size, 1, -1).to(DEVICE, torch.uint8 if case.fp8 else dtype),
            indices.to(DEVICE, torch.int32),
            None if lengths is None else torch.tensor(lengths, dtype=torch.int32, device=DEVICE),
        )

    parts = [part(case.topk, case.visible, case.block_size, case.topk_length)]
    if case.extra_topk is not None:
        parts.append(part(case.extra_topk, case.extra_visible, case.extra_block_size, case.extra_topk_length))
    sinks = torch.randn(case.num_heads, generator=generator) * 3 if case.sinks else None
    if sinks is not None:
        sinks[0], sinks[1] = INF, -INF
    q = torch.randn((case.batch, case.seqlen_q, case.num_heads, d_qk), generator=generator)
    return Problem(case, q.to(DEVICE, dtype), tuple(parts), None if sinks is None else sinks.to(DEVICE))


def plain(problem: Problem, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Query by query, the rows of both caches in one row of keys, the sink as one more column; every step in `dtype`.

    Returns out, lse and the largest score; where nothing is visible 0, inf and -inf.
    """
    case, d_qk = problem.case, problem.q.shape[3]
    scale = d_qk**-0.5 if case.softmax_scale is None else case.softmax_scale
    out = torch.zeros((*problem.q.shape[:3], case.kv_lora_rank), dtype=dtype, device=DEVICE)
    lse = torch.full(problem.q.shape[:3], INF, dtype=dtype, device=DEVICE)
    largest = torch.full_like(lse, -INF)
    pools = []
    for part in problem.parts:
        rows = part.cache.flatten(0, 2)
        if case.fp8:
            rows = torch.cat(decode_rows(rows, case.kv_lora_rank, case.qk_rope_head_dim, dtype), -1)
        pools.append(rows.to(dtype))
    for request in range(case.batch):
        for query in range(case.seqlen_q):
            keys = []
            for part, pool in zip(problem.parts, pools, strict=True):
                named = part.indices[request, query].tolist()
                if part.topk_length is not None:
                    named = named[: int(part.topk_length[request])]
                keys.append(pool[[index for index in named if 0 <= index < part.num_rows]])
            k = torch.cat(keys)
            if len(k) == 0:
                continue
            scores = problem.q[request, query].to(dtype) @ k.T * scale
            lse[request, query] = scores.logsumexp(-1)
            largest[request, query] = scores.amax(-1)
            if problem.attn_sink is not None:
                scores = torch.cat((scores, problem.attn_sink.to(dtype)[:, None]), -1)
            probability = scores.softmax(-1)[:, : len(k)]
            if problem.attn_sink is not None:  # inf - inf
                probability = torch.where(torch.isposinf(problem.attn_sink)[:, None], 0, probability)
            out[request, query] = probability @ k[:, : case.kv_lora_rank]
    return out, lse.transpose(1, 2), largest.transpose(1, 2)


def assert_right(problem: Problem, out: torch.Tensor, lse: torch.Tensor, largest: torch.Tensor | None = None) -> None:
    """No further from fp64 than twice what plain torch in the same dtype is; infinities and zeros in their places."""
    right_out, right_lse, right_largest = plain(problem, torch.float64)
    assert out.shape == right_out.shape
    assert out.dtype == problem.q.dtype
    empty = torch.isinf(right_lse)
    assert not out.transpose(1, 2)[empty].any()
    for found, right, of_empty in ((lse, right_lse, INF), (largest, right_largest, -INF)):
        if found is None:
            continue
        assert found.shape == right.shape
        assert torch.equal(found == of_empty, empty)
        allowed = LSE_ERROR + 2**-22 * right.abs()
        if problem.case.fp8:  # a latent may be rounded to the dtype of the queries: every product is off by as much
            most = problem.q.double().abs().sum(-1).max() * (problem.case.softmax_scale or problem.q.shape[3] ** -0.5)
            allowed += torch.finfo(problem.q.dtype).eps / 2 * most
        error = (found.double() - right)[~empty].abs()
        assert bool((error <= allowed[~empty]).all()), f"off by {error.max().item():.1e}"
    yardstick = (plain(problem, problem.q.dtype)[0].double() - right_out).norm().item()
    distance = (out.double() - right_out).norm().item()
    assert distance <= 2 * yardstick, f"error {distance:.2e}, plain torch in {out.dtype} has {yardstick:.2e}"


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_rows_named_by_index(case: Case, dtype: torch.dtype) -> None:
    problem = make(case, dtype)
    assert_right(problem, *problem.run())


@pytest.mark.parametrize(
    "case",
    [Case("narrow", batch=4, topk=9), Case("wide", batch=3, kv_lora_rank=512, qk_rope_head_dim=64)],
    ids=lambda case: case.why,
)
def test_sums_in_fp32_wherever_they_are_made(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """As exact as plain torch also where a batched product rounds more than that of two matrices."""
    problem = make(case, torch.float32)
    monkeypatch.setattr(OURS["torch"], "_adds_one_by_one", lambda device: True)
    with OneByOne():
        results = problem.run()
    assert_right(problem, *results)


@pytest.mark.parametrize("fp8", [False, True])
def test_two_caches_are_one_cut_in_two(fp8: bool) -> None:
    """The witness in fp64: the same rows in one pool, named by one list, give the same to the last bits."""
    problem = make(Case("two", extra_topk=40, extra_block_size=64, sinks=True, fp8=fp8), torch.float64)
    first, second = problem.parts
    moved = second.indices.long() + first.num_rows
    moved = torch.where((second.indices >= 0) & (second.indices < second.num_rows), moved, -1).int()
    hidden = torch.where(first.indices < first.num_rows, first.indices, -1)
    both = Part(torch.cat((first.cache, second.cache)), torch.cat((hidden, moved), -1), None)
    wanted = dataclasses.replace(problem, parts=(both,)).run()
    for ours, theirs in zip(problem.run(), wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("scale", [1.0, -1.0], ids=["the second far above", "the first far above"])
def test_caches_of_very_different_scores(scale: float) -> None:
    """One log-sum is 300 above the other, more than exp holds in fp32: the lower cache counts for nothing."""
    problem = make(Case("apart", visible=1.0, extra_topk=20, extra_visible=1.0, softmax_scale=1.0), torch.float32)
    problem.q.fill_(1.0)
    first, second = problem.parts
    first.cache.nan_to_num_()[:, :, :, 128:] = -5.0 * scale
    second.cache.nan_to_num_()[:, :, :, 128:] = 5.0 * scale
    alone = second if scale > 0 else first
    wanted = dataclasses.replace(problem, parts=(alone,)).run()
    for ours, theirs in zip(problem.run(), wanted, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("pool_dtype", [torch.uint8, torch.int8, torch.float8_e4m3fn])
def test_fp8_rows_of_every_one_byte_type(pool_dtype: torch.dtype, dtype: torch.dtype) -> None:
    problem = make(Case("types", extra_topk=9, fp8=True), dtype)
    typed = tuple(dataclasses.replace(part, cache=part.cache.view(pool_dtype)) for part in problem.parts)
    for ours, theirs in zip(dataclasses.replace(problem, parts=typed).run(), problem.run(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("fp8", [False, True], ids=["", "fp8"])
@pytest.mark.parametrize("causal", [False, True], ids=["", "causal"])
def test_dense_with_a_sink(fp8: bool, causal: bool, dtype: torch.dtype) -> None:
    """As sparse attention to every row that is visible, which `plain` computes with the sink as a column."""
    dense = cases.make(cases.Case("sink", (70, 0, 1), seqlen_q=2, causal=causal, fp8=fp8), dtype)
    place = torch.arange(128, device=DEVICE)
    slots = dense.block_table[:, :2].repeat_interleave(64, 1) * 64 + place % 64
    seen = dense.cache_seqlens[:, None] - torch.tensor([1, 0], device=DEVICE) * int(causal)
    indices = torch.where(place < seen[:, :, None], slots[:, None], -1).int()
    attn_sink = torch.tensor([INF, -INF, 2.0, 4.0], device=DEVICE)
    named = Case("the same", batch=3, seqlen_q=2, fp8=fp8)
    problem = Problem(named, dense.q, (Part(dense.kv_cache, indices, None),), attn_sink)
    out, lse = flash_mla_with_kvcache(
        *dense.arguments(), 128, softmax_scale=0.11, causal=causal, is_fp8_kvcache=fp8, attn_sink=attn_sink
    )
    assert_right(problem, out, lse)
    assert bool((out[0, 0, 0] == 0).all())
    assert bool(torch.isposinf(lse[1]).all())


# --- metadata ---------------------------------------------------------------------------------------------------------


def test_call_forms_of_every_generation() -> None:
    problem = make(Case("forms", fp8=True, num_heads=16, seqlen_q=2), torch.float32)
    q, part, wanted = problem.q, problem.parts[0], problem.run()
    lengths = torch.tensor([70, 40], dtype=torch.int32, device=DEVICE)
    table = torch.tensor([[0, 1], [2, 3]], dtype=torch.int32, device=DEVICE)
    generation_2 = get_mla_metadata(lengths, 2 * 16, 1, 16, True, 70)
    metadata, _ = get_mla_metadata()
    for found in (
        # Generation 2: tensors, everything by position up to `indices`.
        flash_mla_with_kvcache(q, part.cache, table, lengths, 128, *generation_2, 0.11, False, True, part.indices),
        # Generation 3: an object, no table.
        flash_mla_with_kvcache(
            q, part.cache, None, None, 128, metadata, None, 0.11, False, True, part.indices, None, None, None, None
        ),
        problem.run(None, None),
        problem.run(*generation_2),  # as generation 1 passes them
    ):
        assert torch.equal(found[0], wanted[0])
        assert torch.equal(found[1], wanted[1])


def test_sparse_calls_leave_a_metadata_object_as_it_is() -> None:
    sparse = [make(Case("sparse", batch=batch, topk=9), torch.float32) for batch in (3, 4)]
    dense = cases.make(cases.Case("dense", (70, 5), num_heads=8), torch.float32)
    metadata, _ = get_mla_metadata()
    sparse[0].run(metadata)
    assert "not planned" in repr(metadata)
    wanted = flash_mla_with_kvcache(*dense.arguments(), 128)
    device = dense.q.device
    plans = set()
    for _ in range(2):
        found = flash_mla_with_kvcache(*dense.arguments(), 128, metadata)
        assert torch.equal(found[0], wanted[0])
        assert "batch=2, seqlen_q=1, num_heads=8" in repr(metadata)
        plans.add(id(metadata._plan(device, None)))
        assert_right(sparse[1], *sparse[1].run(metadata))
    assert len(plans) == 1


def test_what_is_no_metadata_is_refused_in_sparse_mode_too() -> None:
    problem = make(Case("wrong", topk=9), torch.float32)
    items, num_splits = get_mla_metadata(torch.ones(2, dtype=torch.int32), 4, 1)
    for wrong, named in (
        (("auto",), "tile_scheduler_metadata must be what get_mla_metadata returned"),
        ((items, None), "num_splits must be the tensor that came with"),
        ((None, num_splits), "num_splits must be None unless"),
    ):
        with pytest.raises(ValueError, match=named):
            problem.run(*wrong)


# --- a sparse prompt --------------------------------------------------------------------------------------------------

# Queries are requests and rows are pages: `make` has all of it in that form.
PROMPTS = (
    Case("one query", batch=1, block_size=40),
    Case("many queries", batch=37, block_size=20, num_heads=3),
    Case("128 heads", batch=2, num_heads=128, topk=33),
    Case("more indices than rows", batch=2, topk=700, visible=0.3),
    Case("nothing visible", batch=3, visible=0.0),
    Case("nothing visible, sinks", batch=3, visible=0.0, sinks=True),
    Case("sinks", batch=6, sinks=True, num_heads=20),
    Case("lengths per query", batch=5, topk_length=(0, 1, 69, 70, 12)),
    Case("lengths and sinks", batch=3, topk_length=(64, 0, 65), sinks=True),
    Case("no index", batch=2, topk=0),
    Case("DeepSeek's shape", batch=3, kv_lora_rank=512, qk_rope_head_dim=64, num_heads=16, topk=130),
    Case("a negative scale", batch=2, softmax_scale=-0.2),
)


def prompt_arguments(problem: Problem) -> tuple[object, ...]:
    part = problem.parts[0]
    kv = part.cache.flatten(0, 1)
    return (
        problem.q.squeeze(1), kv, part.indices, problem.case.softmax_scale, problem.case.kv_lora_rank,
        problem.attn_sink, part.topk_length,
    )  # fmt: skip


def assert_prompt_right(problem: Problem, results: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
    out, max_logits, lse = results
    assert lse.is_contiguous()
    assert max_logits.is_contiguous()
    assert_right(problem, out.unsqueeze(1), lse.unsqueeze(2), max_logits.unsqueeze(2))


@pytest.mark.parametrize("case", PROMPTS, ids=[case.why for case in PROMPTS])
def test_a_sparse_prompt(case: Case, dtype: torch.dtype) -> None:
    problem = make(case, dtype)
    assert_prompt_right(problem, flash_mla_sparse_fwd(*prompt_arguments(problem)))


def test_a_sparse_prompt_by_flash_mlas_own_arguments() -> None:
    """`d_v` is 512 and there are neither sinks nor lengths; kv and q come out of wider tensors."""
    problem = make(Case("defaults", batch=3, kv_lora_rank=512, qk_rope_head_dim=64), torch.float32)
    q, kv, indices, scale = prompt_arguments(problem)[:4]
    wide = torch.full((kv.shape[0], 2, 600), float("nan"), device=DEVICE)
    wide[:, 1:, :576] = kv
    q = q.transpose(0, 1).contiguous().transpose(0, 1)
    assert_prompt_right(problem, flash_mla_sparse_fwd(q=q, kv=wide[:, 1:, :576], indices=indices, sm_scale=scale))


@pytest.mark.parametrize(("s_q", "s_kv"), [(0, 5), (2, 0)], ids=["no query", "no row"])
def test_an_empty_prompt(s_q: int, s_kv: int, dtype: torch.dtype) -> None:
    q, kv = (torch.ones(shape, dtype=dtype, device=DEVICE) for shape in ((s_q, 4, 160), (s_kv, 1, 160)))
    indices = torch.zeros((s_q, 1, 6), dtype=torch.int32, device=DEVICE)
    out, max_logits, lse = flash_mla_sparse_fwd(q, kv, indices, 0.1, d_v=128)
    assert out.shape == (s_q, 4, 128)
    assert not out.any()
    assert max_logits.shape == lse.shape == (s_q, 4)
    assert bool(torch.isneginf(max_logits).all())
    assert bool(torch.isposinf(lse).all())


# --- wrong arguments --------------------------------------------------------------------------------------------------

INT32 = torch.int32
WRONG = {
    "two latent heads": (
        {"k_cache": torch.zeros(2, 64, 2, 160)},
        r"k_cache must be of one latent head \(h_kv=1\) with indices, got torch.float32 \(2, 64, 2, 160\)",
    ),
    "two latent heads in the second cache": (
        {"extra_k_cache": torch.zeros(2, 64, 2, 160)},
        "extra_k_cache must be of one latent head .* with extra_indices_in_kvcache",
    ),
    "a second cache of another dtype": (
        {"extra_k_cache": torch.zeros(2, 64, 1, 160, dtype=torch.float16)},
        "extra_k_cache must be torch.float32 like k_cache, got torch.float16",
    ),
    "a second cache of FP8 rows beside one of fp32": (
        {"extra_k_cache": torch.zeros(2, 64, 1, 208, dtype=torch.uint8)},
        "extra_k_cache must be torch.float32 like k_cache, got torch.uint8",
    ),
    "a second cache of fp32 beside one of FP8 rows": (
        {"k_cache": torch.zeros(2, 64, 1, 208, dtype=torch.uint8), "is_fp8_kvcache": True},
        "extra_k_cache must be of one-byte elements like k_cache, got torch.float32",
    ),
    "a second cache of another width": (
        {"extra_k_cache": torch.zeros(2, 64, 1, 96)},
        r"q must be \[batch, seqlen_q >= 1, num_heads, d_qk=96\]",
    ),
    "indices of int64": ({"indices": torch.zeros(2, 1, 8, dtype=torch.int64)}, r": indices must be int32 .*int64"),
    "indices into the second cache of another batch": (
        {"extra_indices_in_kvcache": torch.zeros(3, 1, 8, dtype=INT32)},
        r"extra_indices_in_kvcache must be int32 \[batch=2, seqlen_q=1, topk\].*\(3, 1, 8\)",
    ),
    "lengths per query": ({"topk_length": torch.zeros(2, 1, dtype=INT32)}, r": topk_length must be int32 \[batch=2\]"),
    "lengths of the second as fp32": (
        {"extra_topk_length": torch.zeros(2)},
        r"extra_topk_length must be int32 \[batch=2\].*got torch.float32",
    ),
    "a sink in bf16": (
        {"attn_sink": torch.zeros(4, dtype=torch.bfloat16)},
        r"attn_sink must be float32 \[num_heads=4\]",
    ),
    "a sink elsewhere": (
        {"attn_sink": torch.zeros(4, device="meta")},
        r"attn_sink must be float32 \[num_heads=4\] on cpu like q, got .* on meta",
    ),
    "a wider value than the row": ({"head_dim_v": 200}, r"head_dim_v must be in 1\.\.d_qk=160, got 200"),
    "FP8 rows of 656 bytes for 128 + 32 columns": (
        {"k_cache": torch.zeros(2, 64, 1, 656, dtype=torch.uint8), "is_fp8_kvcache": True, "extra": False},
        r"k_cache must be of FP8 rows of 208 bytes for \(128, 32\) columns",
    ),
    "one-byte rows without the word": (
        {"k_cache": torch.zeros(2, 64, 1, 208, dtype=torch.int8), "extra": False},
        "is_fp8_kvcache must be True for a k_cache of one-byte elements, got False and torch.int8",
    ),
    "the word without one-byte rows": (
        {"is_fp8_kvcache": True, "extra": False},
        r"k_cache must be .* one-byte elements \(uint8, int8, float8_e4m3fn\) with is_fp8_kvcache, got torch.float32",
    ),
    "bool rows": (
        {"k_cache": torch.zeros(2, 64, 1, 208, dtype=torch.bool), "is_fp8_kvcache": True, "extra": False},
        "k_cache must be .* one-byte elements .* got torch.bool",
    ),
    "causal": ({"causal": True}, "causal must be False with indices"),
    "a scale that is a word": ({"softmax_scale": "auto"}, "softmax_scale must be a number or None, got str"),
}


def right_arguments(extra: bool = True) -> dict[str, object]:
    arguments = {
        "q": torch.zeros(2, 1, 4, 160),
        "k_cache": torch.zeros(2, 64, 1, 160),
        "block_table": None,
        "cache_seqlens": None,
        "head_dim_v": 128,
        "indices": torch.zeros((2, 1, 8), dtype=INT32),
    }
    if extra:
        arguments["extra_k_cache"] = torch.zeros(2, 16, 1, 160)
        arguments["extra_indices_in_kvcache"] = torch.zeros((2, 1, 8), dtype=INT32)
    return arguments


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments(name: str) -> None:
    changes, message = WRONG[name]
    changes = dict(changes)
    arguments = right_arguments(changes.pop("extra", True))
    flash_mla_with_kvcache(**arguments)
    with pytest.raises(ValueError, match=f"flash_mla_with_kvcache: .*{message.removeprefix(': ')}") as caught:
        flash_mla_with_kvcache(**{**arguments, **changes})
    assert not isinstance(caught.value, UnsupportedError)
    if message.startswith(": "):
        assert f"flash_mla_with_kvcache{message.split(' must')[0]} must" in str(caught.value)


WRONG_PROMPT = {
    "two latent heads": ({"kv": torch.zeros(9, 2, 160)}, r"kv must be \[s_kv, 1, d_qk\]: .*one latent head, got"),
    "a batch": ({"q": torch.zeros(1, 3, 4, 160)}, r"q must be .* \[s_q, h_q, d_qk\], got .*\(1, 3, 4, 160\)"),
    "a query of integers": ({"q": torch.zeros(3, 4, 160, dtype=INT32)}, "q must be bfloat16, .* got torch.int32"),
    "kv of another dtype": (
        {"kv": torch.zeros(9, 1, 160, dtype=torch.float16)},
        r"kv must be float32 \[s_kv, h_kv=1, d_qk=160\] on cpu like q, got torch.float16",
    ),
    "kv of FP8 rows": ({"kv": torch.zeros(9, 1, 208, dtype=torch.uint8)}, "kv must be float32 .* got torch.uint8"),
    "kv of another width": ({"kv": torch.zeros(9, 1, 96)}, r"kv must be .*d_qk=160\].*\(9, 1, 96\)"),
    "indices per head": (
        {"indices": torch.zeros(3, 4, 8, dtype=INT32)},
        r"indices must be int32 \[s_q=3, h_kv=1, topk\].*\(3, 4, 8\)",
    ),
    "indices of int64": ({"indices": torch.zeros(3, 1, 8, dtype=torch.int64)}, "indices must be int32 .*torch.int64"),
    "a wider value than the row": ({"d_v": 161}, r"d_v must be in 1\.\.d_qk=160, got 161"),
    "a sink for other heads": ({"attn_sink": torch.zeros(3)}, r"attn_sink must be float32 \[h_q=4\]"),
    "one length": ({"topk_length": torch.ones(1, dtype=INT32)}, r"topk_length must be int32 \[s_q=3\]"),
    "no scale": ({"sm_scale": None}, "sm_scale must be a number, got NoneType"),
}


@pytest.mark.parametrize("name", WRONG_PROMPT)
def test_wrong_arguments_of_a_sparse_prompt(name: str) -> None:
    arguments = {
        "q": torch.zeros(3, 4, 160),
        "kv": torch.zeros(9, 1, 160),
        "indices": torch.zeros((3, 1, 8), dtype=INT32),
        "sm_scale": 0.1,
        "d_v": 128,
    }
    flash_mla_sparse_fwd(**arguments)
    changes, message = WRONG_PROMPT[name]
    with pytest.raises(ValueError, match=f"flash_mla_sparse_fwd: {message}") as caught:
        flash_mla_sparse_fwd(**{**arguments, **changes})
    assert not isinstance(caught.value, UnsupportedError)


def test_right_calls_that_no_backend_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    only(monkeypatch, "triton")
    problem = make(Case("fp64", topk=9), torch.float64)
    for function, call in (
        ("flash_mla_with_kvcache", problem.run),
        ("flash_mla_sparse_fwd", lambda: flash_mla_sparse_fwd(*prompt_arguments(problem))),
    ):
        with pytest.raises(UnsupportedError, match=rf"{function}: no backend accepts this call\n  triton: .*float64"):
            call()


def test_indices_past_the_end_under_the_debug_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt's are no tokens by FlashMLA's contract; a paged cache's are a mistake, named as the caller knows it."""
    monkeypatch.setenv("FLASH_MLA_DEBUG", "1")
    prompt = make(Case("past the end", batch=4), torch.float32)
    assert int((prompt.parts[0].indices >= prompt.parts[0].num_rows).sum()) > 0
    assert_prompt_right(prompt, flash_mla_sparse_fwd(*prompt_arguments(prompt)))
    arguments = right_arguments()
    arguments["extra_indices_in_kvcache"][1, 0, 3] = 32
    message = r"extra_indices_in_kvcache must be negative or below the 32 rows of extra_k_cache, got 32 at \[1, 0, 3\]"
    with pytest.raises(ValueError, match=message):
        flash_mla_with_kvcache(**arguments)


# --- in a compiled graph ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("extra_topk", [None, 20], ids=["one cache", "two caches"])
@pytest.mark.parametrize("fp8", [False, True], ids=["", "fp8"])
def test_a_sparse_call_in_a_compiled_graph(fp8: bool, extra_topk: int | None) -> None:
    case = Case("graph", extra_topk=extra_topk, topk_length=(70, 3), extra_topk_length=(0, 20), sinks=True, fp8=fp8)
    problem = make(case, torch.float32)
    metadata, _ = get_mla_metadata()
    torch._dynamo.reset()
    compiled = torch.compile(lambda p: p.run(metadata), fullgraph=True, backend="aot_eager")
    assert_right(problem, *compiled(problem))


def test_a_dense_call_with_a_sink_over_fp8_rows_in_a_compiled_graph() -> None:
    problem = cases.make(cases.Case("graph", (70, 0), fp8=True), torch.float32)
    attn_sink = torch.tensor([INF, -INF, 2.0, 4.0], device=DEVICE)

    def run() -> tuple[torch.Tensor, torch.Tensor]:
        return flash_mla_with_kvcache(*problem.arguments(), 128, is_fp8_kvcache=True, attn_sink=attn_sink)

    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(run, fullgraph=True, backend="aot_eager")(), run())


def test_a_sparse_prompt_in_a_compiled_graph() -> None:
    problem = make(Case("graph", batch=3, topk_length=(0, 5, 70), sinks=True), torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(flash_mla_sparse_fwd, fullgraph=True, backend="aot_eager")
    assert_prompt_right(problem, compiled(*prompt_arguments(problem)))
    torch.library.opcheck(torch.ops.flash_mla.sparse_fwd.default, prompt_arguments(problem))


def test_the_sparse_prompt_is_public() -> None:
    assert "flash_mla_sparse_fwd" in flash_mla.__all__
