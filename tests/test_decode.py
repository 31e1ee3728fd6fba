"""Decode: right numbers for every shape, layout and plan, on each backend."""

from __future__ import annotations

import dataclasses
import types
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from cases import BACKENDS, CASES, DEVICE, KERNELS, TRITON_DTYPES, Case, Problem, make, needs_gpu
from numerics import OneByOne, assert_right, reference

import flash_mla
from flash_mla import SplitPlan, ops
from flash_mla.backends import torch as torch_backend
from flash_mla.backends import triton as triton_backend
from flash_mla.contract import DecodeCall, fixed_slots

BY_BACKEND = pytest.mark.parametrize(
    ("backend", "dtype"), BACKENDS, ids=[f"{backend}-{str(dtype)[6:]}" for backend, dtype in BACKENDS]
)
BY_KERNEL = pytest.mark.parametrize(("backend", "dtype"), KERNELS, ids=[backend for backend, _ in KERNELS])
SPLIT = Case("split, ragged, causal", (400, 1, 65), seqlen_q=2)


def run(problem: Problem, backend: str, **options: object) -> tuple[torch.Tensor, torch.Tensor]:
    return flash_mla.decode(*problem.arguments(), **{**problem.options(), **options}, backend=backend)


@BY_BACKEND
@pytest.mark.parametrize("case", CASES, ids=[case.why for case in CASES])
def test_result(case: Case, backend: str, dtype: torch.dtype) -> None:
    problem = make(case, dtype)
    assert_right(problem, *run(problem, backend))


@pytest.mark.parametrize("form", [0, 1, 2])
@pytest.mark.parametrize("dtype", TRITON_DTYPES, ids=str)
def test_every_form_computes_the_same_function(form: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    device = triton_backend.device_of(DEVICE, 0)
    if form and DEVICE == "cuda" and not device.has_wgmma:
        pytest.skip("needs Hopper: the other forms are written for wgmma")
    block_m, block_n = ((16, 32), (64, 64), (32, 64))[form]
    schedule = triton_backend.Schedule(block_m, block_n, form, 4 if form == 0 else 8, 2, 1)
    monkeypatch.setattr(triton_backend, "choose_schedule", lambda *_: schedule)
    problem = make(Case("rows masked, split, causal", (0, 65, 400), num_heads=9, seqlen_q=2), dtype)
    assert_right(problem, *run(problem, "triton"))


@pytest.mark.parametrize("h_kv", [1, 2])
def test_the_definition_sums_well_in_fp32_wherever_it_runs(h_kv: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As exact as plain torch also where a batched product rounds more than that of two matrices."""
    case = Case("wide", (70, 33), num_heads=16, h_kv=h_kv, seqlen_q=2, kv_lora_rank=512, qk_rope_head_dim=64)
    problem = make(case, torch.float32)
    monkeypatch.setattr(torch_backend, "_adds_one_by_one", lambda device: True)
    with OneByOne():
        results = flash_mla.decode(*problem.arguments(), **problem.options(), backend="torch")
    assert_right(problem, *results)


def test_definition_is_attention_over_expanded_keys_and_values() -> None:
    """Absorbed (over latents) == expanded (W_UK, W_UV applied to every token) == torch's own SDPA, in fp64."""
    heads, rank, rope, nope, v_dim, length, seqlen_q = 3, 24, 8, 10, 12, 37, 2
    generator = torch.Generator().manual_seed(0)

    def rand(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    w_uk, w_uv = rand(heads, nope, rank), rand(heads, v_dim, rank)
    q_nope, q_rope = rand(1, heads, seqlen_q, nope), rand(1, heads, seqlen_q, rope)
    latent, k_rope = rand(1, length, rank), rand(1, length, rope)
    scale = (nope + rope) ** -0.5

    k = torch.cat((torch.einsum("blr,hnr->bhln", latent, w_uk), k_rope[:, None].expand(-1, heads, -1, -1)), -1)
    v = torch.einsum("blr,hvr->bhlv", latent, w_uv)
    visible = torch.ones(seqlen_q, length, dtype=torch.bool).tril(length - seqlen_q)
    q = torch.cat((q_nope, q_rope), -1)
    sdpa = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, scale=scale)
    scores = (q @ k.transpose(-1, -2) * scale).masked_fill(~visible, float("-inf"))
    expanded = scores.softmax(-1) @ v

    absorbed_q = torch.cat((torch.einsum("bhsn,hnr->bshr", q_nope, w_uk), q_rope.transpose(1, 2)), -1)
    kv_cache = torch.full((2, 48, 1, rank + rope), float("nan"), dtype=torch.float64)
    kv_cache[1, :length, 0] = torch.cat((latent, k_rope), -1)[0]
    out, lse = flash_mla.decode(
        absorbed_q,
        kv_cache,
        torch.tensor([[1]], dtype=torch.int32),
        torch.tensor([length], dtype=torch.int32),
        kv_lora_rank=rank,
        softmax_scale=scale,
        backend="torch",
    )
    absorbed = torch.einsum("bshr,hvr->bhsv", out, w_uv)
    torch.testing.assert_close(expanded, sdpa, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(absorbed, sdpa, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(lse, scores.logsumexp(-1), rtol=1e-12, atol=1e-12)


def _heads_before_tokens(problem: Problem) -> Problem:
    return dataclasses.replace(problem, q=problem.q.transpose(1, 2).contiguous().transpose(1, 2))


def _query_out_of_a_wider_one(problem: Problem) -> Problem:
    q = problem.q
    wide = torch.full((*q.shape[:3], q.shape[3] + 24), float("nan"), dtype=q.dtype, device=q.device)
    wide[..., 8:-16] = q
    return dataclasses.replace(problem, q=wide[..., 8:-16])


def _query_columns_apart(problem: Problem) -> Problem:
    return dataclasses.replace(problem, q=problem.q.transpose(1, 3).contiguous().transpose(1, 3))


def _pool_of_a_layer(problem: Problem) -> Problem:
    pool = problem.kv_cache
    layers = torch.full((pool.shape[0], 3, *pool.shape[1:]), float("nan"), dtype=pool.dtype, device=pool.device)
    layers[:, 1] = pool
    return dataclasses.replace(problem, kv_cache=layers[:, 1])


def _rows_out_of_wider_ones(problem: Problem) -> Problem:
    pool = problem.kv_cache
    wide = torch.full((*pool.shape[:3], pool.shape[3] + 24), float("nan"), dtype=pool.dtype, device=pool.device)
    wide[..., :-24] = pool
    return dataclasses.replace(problem, kv_cache=wide[..., :-24])


def _tokens_before_pages(problem: Problem) -> Problem:
    pool = problem.kv_cache
    return dataclasses.replace(problem, kv_cache=pool.transpose(0, 1).contiguous().transpose(0, 1))


def _table_and_lengths_out_of_wider_ones(problem: Problem) -> Problem:
    table = torch.stack((problem.block_table, problem.block_table + 10**6), -1)
    lengths = torch.stack((problem.cache_seqlens, problem.cache_seqlens + 10**6), -1)
    return dataclasses.replace(problem, block_table=table[..., 0], cache_seqlens=lengths[..., 0])


def _one_query_for_all(problem: Problem) -> Problem:
    return dataclasses.replace(problem, q=problem.q[:1, :1].expand_as(problem.q))


LAYOUTS = (
    _heads_before_tokens,
    _query_out_of_a_wider_one,
    _query_columns_apart,
    _pool_of_a_layer,
    _rows_out_of_wider_ones,
    _tokens_before_pages,
    _table_and_lengths_out_of_wider_ones,
    _one_query_for_all,
)


@pytest.mark.parametrize("layout", LAYOUTS, ids=[layout.__name__.strip("_") for layout in LAYOUTS])
@pytest.mark.parametrize("block_size", [64, 48])
@pytest.mark.parametrize(("backend", "dtype"), [BACKENDS[0], *KERNELS], ids=str)
def test_strides(layout, block_size: int, backend: str, dtype: torch.dtype) -> None:  # type: ignore[no-untyped-def]
    problem = make(dataclasses.replace(SPLIT, block_size=block_size), dtype)
    arranged = layout(problem)
    assert_right(arranged, *run(arranged, backend))


@pytest.mark.parametrize("block_size", [64, 48])
@BY_KERNEL
def test_page_offset_beyond_int32(block_size: int, backend: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Page 2 at 2**30 elements per page: the offset is 2**31, one more than int32 holds, the stride is not."""
    case = Case("far page", (block_size + 3,), block_size=block_size)
    problem = make(case, dtype, spare_pages=1)
    stride, size = 2**30, 2**31 + block_size * case.d_qk
    if DEVICE == "cuda":
        memory = torch.empty(size, dtype=dtype, device=DEVICE)
    else:  # a sparse file: 4 GiB of address space, a few pages of disk
        memory = torch.from_file(str(tmp_path / "pool"), shared=True, size=size, dtype=dtype)
    pool = memory.as_strided(problem.kv_cache.shape, (stride, case.d_qk, case.d_qk, 1))
    pool.copy_(problem.kv_cache)
    problem.block_table[0, :2] = torch.tensor([1, 2], dtype=torch.int32)
    pool[1:, :, :, :] = torch.randn(pool[1:].shape, generator=torch.Generator().manual_seed(1)).to(pool)
    pool[2, 3:] = float("nan")
    out, lse = run(dataclasses.replace(problem, kv_cache=pool), backend)
    assert_right(dataclasses.replace(problem, kv_cache=pool.contiguous()), out, lse)


@BY_BACKEND
@pytest.mark.parametrize("planned_for", [1, 1000])
def test_a_plan_for_other_lengths_loses_no_token(planned_for: int, backend: str, dtype: torch.dtype) -> None:
    """Made for length 1 and used at 1000, and the other way round; ragged beside it."""
    used_at = 1001 - planned_for
    problem = make(Case("stale", (used_at, 70, 0), seqlen_q=2), dtype)
    old = torch.tensor([planned_for, 500, 64], dtype=torch.int32, device=DEVICE)
    q, kv_cache, block_table, _ = problem.arguments()
    plan = flash_mla.plan_splits(q, kv_cache, block_table, old, kv_lora_rank=128, backend=backend)
    assert_right(problem, *run(problem, backend, plan=plan))


def plan_of(lengths: tuple[int, ...], num_slots: int, problem: Problem, deterministic: bool = False) -> SplitPlan:
    """The definition's plan, made for these lengths, for the shape of a problem."""
    items, splits = torch_backend.plan(torch.tensor(lengths, dtype=torch.int32), num_slots, deterministic)
    batch, seqlen_q, num_heads, _ = problem.q.shape
    h_kv = problem.case.h_kv
    return SplitPlan(items.to(DEVICE), splits.to(DEVICE), batch, seqlen_q, num_heads, h_kv, deterministic)


@BY_KERNEL
def test_cases_are_split(backend: str, dtype: torch.dtype) -> None:
    """The cases' lengths are long enough for a plan to cut them: else the tests would not see a merge."""
    for why in ("ragged enough that", "causal, split", "causal, 64-row tiles", "two latent heads", "many rows"):
        case = next(case for case in CASES if case.why.startswith(why))
        q, kv_cache, block_table, lengths = make(case, dtype).arguments()
        plan = flash_mla.plan_splits(q, kv_cache, block_table, lengths, kv_lora_rank=case.kv_lora_rank, backend=backend)
        assert int(plan.splits[:, 1].max()) > 1, why


@pytest.mark.parametrize("num_slots", [1, 2, 4, 7, 40])
@pytest.mark.parametrize("seqlen_q", [1, 2])
@BY_KERNEL
def test_any_number_of_slots(num_slots: int, seqlen_q: int, backend: str, dtype: torch.dtype) -> None:
    """One slot needs no merge; two hold the end of one request and the beginning of another; 40 are not all used."""
    problem = make(Case("packed", (300, 700, 300), seqlen_q=seqlen_q), dtype)
    plan = plan_of(problem.case.lengths, num_slots, problem)
    if num_slots == 2:
        assert plan.items[:, 0].tolist() == [0, 1, -1, 1, 2]
    assert_right(problem, *run(problem, backend, plan=plan))


@BY_BACKEND
def test_a_slot_begins_and_ends_with_parts_of_cut_requests(backend: str, dtype: torch.dtype) -> None:
    """Both leave a partial result: at the slot's own index and at num_slots + slot."""
    problem = make(Case("packed", (700,) * 5, num_heads=20), dtype)
    plan = plan_of(problem.case.lengths, 4, problem)
    first, num_parts = plan.splits.T.tolist()
    ends = [slot + parts - 1 for slot, parts in zip(first, num_parts, strict=True)]
    assert any(num_parts[r] > 1 and num_parts[r + 1] > 1 and ends[r] == first[r + 1] for r in range(4))
    assert_right(problem, *run(problem, backend, plan=plan))


@BY_BACKEND
def test_deterministic_results_do_not_depend_on_the_batch(backend: str, dtype: torch.dtype) -> None:
    """The same request, alone and beside others, bit by bit; long enough to be cut in two."""
    problem = make(Case("beside others", (70, 2200, 0, 500), num_heads=2), dtype)
    q, kv_cache, block_table, lengths = problem.arguments()
    results = []
    for rows in (slice(None), slice(1, 2)):
        tensors = (q[rows], kv_cache, block_table[rows], lengths[rows])
        plan = flash_mla.plan_splits(*tensors, kv_lora_rank=128, deterministic=True, backend=backend)
        request = 1 if rows == slice(None) else 0
        assert int(plan.splits[request, 1]) == 2
        out, lse = flash_mla.decode(*tensors, **problem.options(), plan=plan, backend=backend)
        results.append((out[request], lse[request]))
        if request:
            assert_right(problem, out, lse)
    if backend != "torch":  # whose sums follow torch's own kernels
        for beside, alone in zip(*results, strict=True):
            assert torch.equal(beside, alone)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("deterministic", [False, True])
def test_backends_are_told_of_deterministic_plans(
    deterministic: bool, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the plan alone: its number of slots does not tell."""
    problem = make(SPLIT, torch.bfloat16)
    plan = plan_of(problem.case.lengths, fixed_slots(len(problem.case.lengths)), problem, deterministic)
    told = []

    def decode(call: DecodeCall, *arguments: object) -> tuple[torch.Tensor, torch.Tensor]:
        told.append(call.deterministic)
        return torch_backend.decode(call, *arguments)

    monkeypatch.setattr(ops, "BACKENDS", {"torch": types.SimpleNamespace(decode=decode, decode_refusals=lambda _: [])})

    def step(*tensors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return flash_mla.decode(*tensors, **problem.options(), plan=plan, backend="torch")

    if compiled:
        step = torch.compile(step, fullgraph=True, backend="eager")
    result = step(*problem.arguments())
    assert told == [deterministic]
    assert_right(problem, *result)


@BY_KERNEL
def test_parts_without_tokens(backend: str, dtype: torch.dtype) -> None:
    """A plan with more parts than the request has units now: the empty parts weigh nothing."""
    problem = make(Case("short", (5,)), dtype)
    plan = plan_of((64 * 16,), 16, problem)
    assert plan.splits.tolist() == [[0, 16]]
    assert_right(problem, *run(problem, backend, plan=plan))


@BY_BACKEND
def test_inputs_are_left_alone(backend: str, dtype: torch.dtype) -> None:
    problem = make(SPLIT, dtype)
    before = [tensor.clone() for tensor in problem.arguments()]
    run(problem, backend)
    for tensor, copy in zip(problem.arguments(), before, strict=True):
        assert torch.equal(tensor.nan_to_num(nan=7.0), copy.nan_to_num(nan=7.0))


@BY_BACKEND
def test_outputs_are_written_whole(backend: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every `torch.empty` of the package begins as NaN: what nobody writes shows."""
    empty = torch.empty

    def poisoned(*args: object, **kwargs: object) -> torch.Tensor:
        made = empty(*args, **kwargs)  # type: ignore[call-overload]
        if made.is_floating_point():
            return made.fill_(float("nan"))
        return made.fill_(255 if made.dtype == torch.uint8 else -7)  # bytes 255: NaN in every floating dtype

    problem = make(Case("split and whole, empty too", (400, 0, 3), num_heads=10, seqlen_q=2), dtype)
    monkeypatch.setattr(torch, "empty", poisoned)
    out, lse = run(problem, backend)
    monkeypatch.undo()
    assert_right(problem, out, lse)


@BY_BACKEND
def test_no_requests(backend: str, dtype: torch.dtype) -> None:
    q = torch.empty((0, 1, 4, 160), dtype=dtype, device=DEVICE)
    pool = torch.empty((2, 64, 1, 160), dtype=dtype, device=DEVICE)
    table = torch.empty((0, 3), dtype=torch.int32, device=DEVICE)
    lengths = torch.empty((0,), dtype=torch.int32, device=DEVICE)
    out, lse = flash_mla.decode(q, pool, table, lengths, kv_lora_rank=128, softmax_scale=0.1, backend=backend)
    assert out.shape == (0, 1, 4, 128)
    assert lse.shape == (0, 4, 1)


@BY_BACKEND
def test_opcheck(backend: str, dtype: torch.dtype) -> None:
    problem = make(SPLIT, dtype)
    problem.kv_cache.nan_to_num_(0.0)  # opcheck compares inputs before and after, and NaN differs from itself
    arguments = (*problem.arguments(), None, None, 128, 0.1, True, backend)
    torch.library.opcheck(torch.ops.flash_mla.decode.default, arguments)


@BY_BACKEND
def test_compiles_to_one_graph(backend: str, dtype: torch.dtype) -> None:
    """Append, plan and decode under torch.compile(fullgraph=True) give what they give without it."""
    problem = make(SPLIT, dtype)
    q, pool, table, lengths = problem.arguments()
    generator = torch.Generator().manual_seed(3)
    latent = torch.randn((3, 2, 1, 128), generator=generator).to(q)
    k_rope = torch.randn((3, 2, 1, 32), generator=generator).to(q)
    position = lengths[:, None].long() - 2 + torch.arange(2, device=DEVICE)
    position = position.clamp(min=0)
    slots = table.long().gather(1, position // 64) * 64 + position % 64
    slots[1, 0] = _free_slot(problem)

    def step(kv_cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        flash_mla.append(kv_cache, latent, k_rope, slots, backend=backend)
        plan = flash_mla.plan_splits(q, kv_cache, table, lengths, kv_lora_rank=128, backend=backend)
        return flash_mla.decode(
            q, kv_cache, table, lengths, kv_lora_rank=128, softmax_scale=0.1, plan=plan, backend=backend
        )

    eager_pool, compiled_pool = pool.clone(), pool.clone()
    eager = step(eager_pool)
    how = "inductor" if DEVICE == "cuda" else "aot_eager"
    compiled = torch.compile(step, fullgraph=True, backend=how)(compiled_pool)
    assert torch.equal(eager[0], compiled[0])
    assert torch.equal(eager[1], compiled[1])
    assert torch.equal(eager_pool.nan_to_num(nan=7.0), compiled_pool.nan_to_num(nan=7.0))


def _free_slot(problem: Problem) -> int:
    used = {page for page in problem.block_table.flatten().tolist() if page < problem.kv_cache.shape[0]}
    free = min(set(range(problem.kv_cache.shape[0])) - used)
    return free * problem.case.block_size


@needs_gpu
@pytest.mark.parametrize("num_heads", [16, 20, 128])
@pytest.mark.parametrize("backend", [backend for backend, _ in KERNELS])
def test_graph_replay_follows_the_lengths(backend: str, num_heads: int) -> None:
    """Captured at one set of lengths, replayed at another: the device decides, the plan is part of the graph."""
    case = Case("captured", (1, 700, 64), num_heads=num_heads, kv_lora_rank=512, qk_rope_head_dim=64)
    problem = make(case, torch.bfloat16)
    q, pool, table, lengths = problem.arguments()
    pool.nan_to_num_(0.5)
    table.clamp_(max=pool.shape[0] - 1)

    def step() -> tuple[torch.Tensor, torch.Tensor]:
        plan = flash_mla.plan_splits(q, pool, table, lengths, kv_lora_rank=512, backend=backend)
        return flash_mla.decode(
            q, pool, table, lengths, kv_lora_rank=512, softmax_scale=0.11, plan=plan, backend=backend
        )

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = step()
    for now in ((3, 5, 700), (640, 0, 65), (1, 700, 64)):
        lengths.copy_(torch.tensor(now, dtype=torch.int32))
        graph.replay()
        torch.cuda.synchronize()
        changed = dataclasses.replace(problem, case=dataclasses.replace(case, lengths=now))
        assert_right(changed, out, lse)


@needs_gpu
@pytest.mark.parametrize("num_heads", [16, 32, 64, 128])
@pytest.mark.parametrize(
    ("backend", "dtype"), [pair for pair in BACKENDS if pair[0] != "torch"], ids=lambda value: str(value)[-8:]
)
def test_a_real_size(num_heads: int, backend: str, dtype: torch.dtype) -> None:
    case = Case("long", (4096, 1, 8191, 777), num_heads=num_heads, kv_lora_rank=512, qk_rope_head_dim=64, seqlen_q=2)
    problem = make(case, dtype)
    assert_right(problem, *run(problem, backend))


def test_reference_notices_a_lost_token() -> None:
    """The yardstick itself: one token less than the length is an error far above what it allows."""
    problem = make(Case("lost", (65,)), TRITON_DTYPES[0])
    shorter = dataclasses.replace(problem, cache_seqlens=problem.cache_seqlens - 1)
    out, lse = reference(shorter)
    with pytest.raises(AssertionError, match="lse is off"):
        assert_right(problem, out.to(problem.q.dtype), lse)
