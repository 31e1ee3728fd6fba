"""The compiled decode on a GPU: numbers for every way to cut and merge, bits, streams, graphs, and what lies around."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import threading

import pytest
import torch
from cases import ON_HOPPER, Case, Problem, make
from numerics import assert_right

import flash_mla
from flash_mla import SplitPlan
from flash_mla.backends import cuda as cuda_backend
from flash_mla.backends.cuda import driver
from flash_mla.contract import check_decode
from flash_mla.interface import flash_mla_with_kvcache, get_mla_metadata

if not ON_HOPPER:
    pytest.skip("needs Hopper: the compiled kernels are for nothing else", allow_module_level=True)

host = importlib.import_module("flash_mla.backends.cuda.decode")  # `cuda.decode` is the function
DeepSeek = functools.partial(Case, num_heads=16, kv_lora_rank=512, qk_rope_head_dim=64, softmax_scale=576**-0.5)
RAGGED = (0, 1, 64, 65, 700, 5000, 2560, 0)
needs_two = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs 2 GPUs: a device that is not the first")


def run(problem: Problem, **options: object) -> tuple[torch.Tensor, torch.Tensor]:
    return flash_mla.decode(*problem.arguments(), **{**problem.options(), **options}, backend="cuda")


def plan_of(problem: Problem, num_slots: int | None = None, deterministic: bool = False) -> SplitPlan:
    """The plan for a problem, in as many slots as asked for or as the backend would take."""
    q, kv_cache, block_table, lengths = problem.arguments()
    if num_slots is None:
        options = {"kv_lora_rank": problem.case.kv_lora_rank, "deterministic": deterministic, "backend": "cuda"}
        return flash_mla.plan_splits(q, kv_cache, block_table, lengths, **options)
    items, splits = cuda_backend.plan(lengths, num_slots, deterministic)
    batch, seqlen_q, num_heads, _ = q.shape
    return SplitPlan(items, splits, batch, seqlen_q, num_heads, problem.case.h_kv, deterministic)


def at(problem: Problem, lengths: tuple[int, ...]) -> Problem:
    """The same tensors, but the requests have other lengths, in a tensor of their own."""
    case = dataclasses.replace(problem.case, lengths=lengths)
    device = problem.cache_seqlens.device
    return dataclasses.replace(
        problem, case=case, cache_seqlens=torch.tensor(lengths, dtype=torch.int32, device=device)
    )


def only(problem: Problem, requests: list[int]) -> Problem:
    """Some requests of a problem in any order, in the same pool."""
    case = dataclasses.replace(problem.case, lengths=tuple(problem.case.lengths[request] for request in requests))
    index = torch.tensor(requests, device=problem.q.device)
    tensors = {name: getattr(problem, name)[index] for name in ("q", "block_table", "cache_seqlens")}
    return dataclasses.replace(problem, case=case, **tensors)


def assert_same_bits(result: tuple[torch.Tensor, ...], other: tuple[torch.Tensor, ...]) -> None:
    for ours, theirs in zip(result, other, strict=True):
        integers = {2: torch.int16, 4: torch.int32}[ours.element_size()]
        assert torch.equal(ours.view(integers), theirs.view(integers))


@pytest.fixture
def workspaces(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """Partial results of each call from here on; all NaN before the call uses them, and not given back."""
    allocate = host._workspace
    made: list[torch.Tensor] = []

    def poisoned(*arguments: object) -> torch.Tensor:
        made.append(allocate(*arguments).fill_(255))
        return made[-1]

    monkeypatch.setattr(host, "_workspace", poisoned)
    return made


# --- ways to cut ------------------------------------------------------------------------------------------------------

SHAPES = {
    "one tile, some rows of it": DeepSeek("slots", RAGGED),
    "several tiles, two queries": DeepSeek("slots", RAGGED, num_heads=64, seqlen_q=2),
    "128 heads x 2: in 132 slots the partial results take more than 64 MiB": DeepSeek(
        "slots", RAGGED, num_heads=128, seqlen_q=2
    ),
    "two latent heads": DeepSeek("slots", RAGGED, num_heads=40, h_kv=2, seqlen_q=3),
}


@pytest.mark.parametrize("num_slots", [1, 2, 3, 7, 66, 132])
@pytest.mark.parametrize("case", SHAPES.values(), ids=list(SHAPES))
def test_any_number_of_slots(case: Case, num_slots: int) -> None:
    problem = make(case, torch.bfloat16)
    plan = plan_of(problem, num_slots)
    assert num_slots == 1 or int(plan.splits[:, 1].max()) > 1, "nothing is cut, so nothing is tested"
    assert_right(problem, *run(problem, plan=plan))


# Requests of 16 rows that each of the merge's forms is chosen for.
FORM_LIMITS = (host.MERGED_BY_64, host.MERGED_BY_128, host.MERGED_BY_ROW)
FORMS = {
    "64 columns per CTA": FORM_LIMITS[0] // 16,
    "128 columns per CTA": FORM_LIMITS[1] // 16,
    "a CTA per row": FORM_LIMITS[2] // 16,
    "a warp per row": FORM_LIMITS[2] // 16 + 1,
}


@pytest.mark.parametrize("batch", FORMS.values(), ids=list(FORMS))
@pytest.mark.parametrize("shape", [(512, 64), (256, 32), (128, 32)], ids=str)
def test_every_form_of_the_merge(batch: int, shape: tuple[int, int]) -> None:
    """One part and many, and requests of nothing."""
    rank, rope = shape
    lengths = tuple((0, 2100, 9000, 20_000)[request % 4] for request in range(batch))
    problem = make(
        Case("merged", lengths, num_heads=8, seqlen_q=2, kv_lora_rank=rank, qk_rope_head_dim=rope), torch.float16
    )
    plan = plan_of(problem, 4 * batch)  # not a deterministic one: that has one form for any number of rows
    assert int(plan.splits[:, 1].max()) > 4
    assert_right(problem, *run(problem, plan=plan))


@pytest.mark.parametrize("batch", [rows // 66 for rows in FORM_LIMITS] + [FORM_LIMITS[-1] // 66 + 1])
def test_every_form_of_the_merge_of_tiles_of_64_rows(batch: int) -> None:
    """At 512 + 64, whose partial results lie in another order than those of few rows: 66 rows per request."""
    lengths = tuple((20_000, 0, 9000, 2100)[request % 4] for request in range(batch))
    problem = make(DeepSeek("merged", lengths, num_heads=33, seqlen_q=2), torch.bfloat16)
    plan = plan_of(problem, 66)
    assert int(plan.splits[:, 1].max()) > 4
    assert_right(problem, *run(problem, plan=plan))


@pytest.mark.parametrize("planned_for", [1, 64, 4000])
@pytest.mark.parametrize("num_heads", [16, 128])
def test_a_plan_for_other_lengths_loses_no_token(planned_for: int, num_heads: int) -> None:
    problem = make(DeepSeek("stale", (4001, 1, 65, 0, 640), num_heads=num_heads, seqlen_q=2), torch.bfloat16)
    for deterministic in (False, True):
        plan = plan_of(at(problem, (planned_for, 500, 64, 4000, planned_for)), deterministic=deterministic)
        assert_right(problem, *run(problem, plan=plan))


def test_many_items_per_slot() -> None:
    """700 requests, every third empty, for 132 CTAs: ring slots change hands between requests all the time."""
    lengths = tuple((0, request % 130, 64 * (request % 5) + 1)[request % 3] for request in range(700))
    problem = make(DeepSeek("back to back", lengths), torch.bfloat16)
    first = run(problem)
    assert_right(problem, *first)
    for _ in range(20):
        assert_same_bits(run(problem), first)


def test_twelve_thousand_requests() -> None:
    lengths = tuple(request * 7 % 33 for request in range(12_000))
    problem = make(DeepSeek("many", lengths, block_size=16), torch.bfloat16)
    assert_right(problem, *run(problem))


# --- the same bits ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", SHAPES.values(), ids=list(SHAPES))
def test_again_and_again_the_same_bits(case: Case) -> None:
    problem = make(case, torch.bfloat16)
    plan = plan_of(problem)
    first = run(problem, plan=plan)
    for _ in range(10):
        assert_same_bits(run(problem, plan=plan), first)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(DeepSeek("", ()), id="16 heads: the forms of the merge change with the batch"),
        pytest.param(DeepSeek("", (), num_heads=8, h_kv=2, seqlen_q=2), id="two latent heads"),
        pytest.param(DeepSeek("", (), num_heads=128), id="128 heads: a large batch is run in pieces"),
    ],
)
def test_deterministic_results_do_not_depend_on_the_batch(case: Case, dtype: torch.dtype) -> None:
    """A request of one, two, five and eight parts: alone, first, last and in the middle of others."""
    watched = [70, 2200, 9000, 20_000]
    lengths = (*watched, *(request * 131 % 3000 for request in range(40)))
    problem = make(dataclasses.replace(case, why="among others", lengths=lengths), dtype)
    alone = []
    for request, num_parts in enumerate((1, 2, 5, 8)):
        single = only(problem, [request])
        plan = plan_of(single, deterministic=True)
        assert plan.splits[:, 1].tolist() == [num_parts]
        alone.append(run(single, plan=plan))
        assert_right(single, *alone[-1])
    others = list(range(4, len(lengths)))
    for order in ([0, 1, 2, 3, *others[:6]], [*others, 3, 2, 1, 0], [*others[:9], 2, 0, 3, 1, *others[9:]]):
        batch = only(problem, order)
        out, lse = run(batch, plan=plan_of(batch, deterministic=True))
        for request in range(4):
            at_row = order.index(request)
            assert_same_bits((out[at_row : at_row + 1], lse[at_row : at_row + 1]), alone[request])


# --- graphs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("planned", ["in the graph", "once, outside", "by decode itself"])
@pytest.mark.parametrize("num_heads", [16, 128])
def test_graph_replay_while_lengths_grow(planned: str, num_heads: int) -> None:
    """Over page boundaries, for a ragged batch, each step compared; `make` has real tokens up to the last lengths."""
    steps = [
        (60, 126, 700, 0),
        (63, 127, 703, 1),
        (64, 128, 704, 2),
        (65, 129, 705, 3),
        (640, 1500, 1000, 64),
        (1, 0, 0, 5),
    ]
    most = tuple(max(lengths) for lengths in zip(*steps, strict=True))
    problem = make(DeepSeek("growing", most, num_heads=num_heads, seqlen_q=2), torch.bfloat16)
    lengths = problem.cache_seqlens
    lengths.copy_(torch.tensor(steps[0], dtype=torch.int32))
    outside = plan_of(problem)

    def step() -> tuple[torch.Tensor, torch.Tensor]:
        plan = {"in the graph": lambda: plan_of(problem), "once, outside": lambda: outside}.get(planned, lambda: None)()
        return run(problem, plan=plan)

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = step()
    for now in steps:
        lengths.copy_(torch.tensor(now, dtype=torch.int32))
        run(problem)  # an eager call in between must not share memory with the graph
        graph.replay()
        run(problem)
        torch.cuda.synchronize()
        assert_right(at(problem, now), out, lse)


def test_two_graphs_replayed_in_turn() -> None:
    problems = [make(DeepSeek("graph", lengths), torch.bfloat16) for lengths in ((5000, 3), (70, 4000, 900))]
    for problem in problems:
        run(problem)
    torch.cuda.synchronize()
    graphs, results = [], []
    for problem in problems:
        graphs.append(torch.cuda.CUDAGraph())
        with torch.cuda.graph(graphs[-1]):
            results.append(run(problem))
    for _ in range(5):
        for graph in graphs:
            graph.replay()
    torch.cuda.synchronize()
    for problem, result in zip(problems, results, strict=True):
        assert_right(problem, *result)


# --- streams, threads, devices ----------------------------------------------------------------------------------------


def test_two_streams_at_once() -> None:
    """Both are kept busy while the other's partial results are in use."""
    problems = [
        make(DeepSeek("stream", lengths, seqlen_q=2), torch.bfloat16, seed)
        for seed, lengths in enumerate(((5000, 64), (3, 4000)))
    ]
    streams = [torch.cuda.Stream() for _ in problems]
    results: list[list[tuple[torch.Tensor, torch.Tensor]]] = [[], []]
    torch.cuda.synchronize()
    for _ in range(25):
        for problem, stream, found in zip(problems, streams, results, strict=True):
            with torch.cuda.stream(stream):
                found.append(run(problem))
    torch.cuda.synchronize()
    for problem, found in zip(problems, results, strict=True):
        assert_right(problem, *found[0])
        for again in found[1:]:
            assert_same_bits(again, found[0])


def test_a_fresh_thread() -> None:
    """It has no current context yet."""
    problem = make(DeepSeek("thread", (700, 1)), torch.bfloat16)
    found: list[tuple[torch.Tensor, torch.Tensor]] = []
    torch.cuda.synchronize()
    thread = threading.Thread(target=lambda: found.append(run(problem)))
    thread.start()
    thread.join()
    torch.cuda.synchronize()
    assert_right(problem, *found[0])


@needs_two
def test_a_device_that_is_not_the_current_one() -> None:
    problem = make(DeepSeek("elsewhere", (5000, 1, 70)), torch.bfloat16, device="cuda:1")
    assert torch.cuda.current_device() == 0
    for _ in range(2):
        out, lse = run(problem)
        assert out.device == lse.device == torch.device("cuda:1")
        torch.cuda.synchronize(1)
        assert_right(problem, out, lse)
    assert torch.cuda.current_device() == 0


@needs_two
def test_the_first_device_while_another_is_current() -> None:
    problems = [make(DeepSeek("both", (5000, 1)), torch.bfloat16, device=f"cuda:{device}") for device in (0, 1)]
    with torch.cuda.device(1):
        results = [run(problem) for problem in problems]
    for device, (problem, result) in enumerate(zip(problems, results, strict=True)):
        torch.cuda.synchronize(device)
        assert_right(problem, *result)


# --- what lies around -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_heads", [16, 100])
def test_what_the_workspace_held_does_not_matter(num_heads: int, workspaces: list[torch.Tensor]) -> None:
    """All NaN: also the rows of a tile beyond the heads, parts that see nothing, and slots without work."""
    problem = make(DeepSeek("poisoned", (5000, 1, 0, 66), num_heads=num_heads, seqlen_q=3), torch.bfloat16)
    for plan in (plan_of(problem), plan_of(at(problem, (1, 4000, 4000, 1))), plan_of(problem, deterministic=True)):
        assert_right(problem, *run(problem, plan=plan))
    assert len(workspaces) == 3


def test_whole_requests_leave_the_workspace_alone(workspaces: list[torch.Tensor]) -> None:
    problem = make(DeepSeek("whole", (64,) * driver.num_sms(0)), torch.bfloat16)
    plan = plan_of(problem)
    assert plan.splits[:, 1].tolist() == [1] * driver.num_sms(0)
    assert_right(problem, *run(problem, plan=plan))
    (workspace,) = workspaces
    assert bool((workspace == 255).all())


def test_pages_beyond_four_gigabytes() -> None:
    """From page 58,255 on a page's first element is past 2^31; the pool is 4.4 GB."""
    problem = make(DeepSeek("far", (700, 65, 1)), torch.bfloat16)
    pages, far = problem.kv_cache.shape[0], 60_000
    pool = torch.full((far, *problem.kv_cache.shape[1:]), float("nan"), dtype=torch.bfloat16, device="cuda")
    first = far - pages
    assert first * pool.stride(0) > 2**31
    pool[first:] = problem.kv_cache
    used = problem.block_table < pages
    table = torch.where(used, problem.block_table + first, problem.block_table)
    assert_right(problem, *run(dataclasses.replace(problem, kv_cache=pool, block_table=table)))


def test_a_pool_without_pages() -> None:
    """Nothing to see for anybody: there is not even an address."""
    problem = make(DeepSeek("no pages", (0, 0)), torch.bfloat16, spare_pages=0)
    assert problem.kv_cache.shape[0] == 0
    assert_right(problem, *run(problem))


REFUSED = {
    "columns apart": lambda pool: pool.transpose(2, 3).contiguous().transpose(2, 3),
    "rows 4 elements too wide": lambda pool: torch.nn.functional.pad(pool, (0, 4))[..., :-4],
    "one element off": lambda pool: torch.cat((pool.flatten()[:1], pool.flatten()))[1:].view(pool.shape),
}


@pytest.mark.parametrize("layout", REFUSED.values(), ids=list(REFUSED))
def test_a_pool_that_tma_cannot_walk_goes_to_another_backend(layout) -> None:  # type: ignore[no-untyped-def]
    problem = make(DeepSeek("odd", (65, 3), h_kv=2), torch.bfloat16)
    odd = dataclasses.replace(problem, kv_cache=layout(problem.kv_cache))
    before = flash_mla.backend_counts()
    with pytest.raises(flash_mla.UnsupportedError, match=r"needs (the last stride|strides|kv_cache to begin)"):
        run(odd)
    result = flash_mla.decode(*odd.arguments(), **odd.options())
    assert flash_mla.backend_counts().get(("decode", "cuda"), 0) == before.get(("decode", "cuda"), 0)
    assert_right(problem, *result)


# --- ways to call -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("generation", [1, 2, 3])
@pytest.mark.parametrize("seqlen_q", [1, 2])
def test_the_interface_of_flash_mla(generation: int, seqlen_q: int) -> None:
    problem = make(DeepSeek("interface", (5000, 64, 0, 65), num_heads=128, seqlen_q=seqlen_q), torch.bfloat16)
    q, kv_cache, block_table, lengths = problem.arguments()
    if generation == 1:
        metadata = get_mla_metadata(lengths, seqlen_q * 128, 1)
    elif generation == 2:
        metadata = get_mla_metadata(lengths, seqlen_q * 128, 1, num_heads_q=128)
    else:
        metadata = get_mla_metadata()
    before = flash_mla.backend_counts().get(("decode", "cuda"), 0)
    for _ in range(3):  # layers of a step
        result = flash_mla_with_kvcache(q, kv_cache, block_table, lengths, 512, *metadata, causal=True)
        assert_right(problem, *result)  # the default scale is the problem's
    assert flash_mla.backend_counts()["decode", "cuda"] == before + 3


def test_compiled_without_a_break() -> None:
    problem = make(DeepSeek("compiled", (700, 64), seqlen_q=2), torch.bfloat16)

    @torch.compile(fullgraph=True)
    def step(q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = flash_mla.decode(q * 1, *problem.arguments()[1:], **problem.options())
        return out + 0, lse

    step(problem.q)
    before = flash_mla.backend_counts()["decode", "cuda"]
    assert_right(problem, *step(problem.q))
    assert_right(problem, *step(problem.q))
    assert flash_mla.backend_counts()["decode", "cuda"] == before + 2


def test_the_compiled_kernel_is_the_first_choice() -> None:
    problem = make(DeepSeek("chosen", (65,)), torch.bfloat16)
    assert cuda_backend.decode_refusals(check_decode(*problem.arguments(), 512, True)) == []
    before = flash_mla.backend_counts().get(("decode", "cuda"), 0)
    assert_right(problem, *flash_mla.decode(*problem.arguments(), **problem.options()))
    assert flash_mla.backend_counts()["decode", "cuda"] == before + 1
