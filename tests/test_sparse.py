"""Sparse decode: each query attends to the rows that it names, and to no other."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import pytest
import torch
from cases import BACKENDS, DEVICE, needs_hopper
from numerics import LSE_ERROR

import flash_mla
from flash_mla import ops
from flash_mla.backends import equal_lengths
from flash_mla.codec import decode_rows, encode_rows

SPARSE_BACKENDS = [(backend, dtype) for backend, dtype in BACKENDS if backend != "cuda"]
BY_BACKEND = pytest.mark.parametrize(
    ("backend", "dtype"), SPARSE_BACKENDS, ids=[f"{backend}-{str(dtype)[6:]}" for backend, dtype in SPARSE_BACKENDS]
)


@dataclass(frozen=True)
class Case:
    """One sparse call; `visible` is how many of a query's indices name a row, the others are -1 or past the pool."""

    why: str
    topk: int
    batch: int = 2
    seqlen_q: int = 1
    num_heads: int = 4
    visible: float = 0.8
    block_size: int = 64
    num_blocks: int = 5
    kv_lora_rank: int = 128
    qk_rope_head_dim: int = 32
    topk_length: tuple[int, ...] | None = None
    sinks: bool = False
    fp8: bool = False
    softmax_scale: float = 0.11


CASES = (
    Case("one index", 1, visible=1.0),
    Case("a multiple of 64", 128),
    Case("not a multiple of 64: padded inside", 100),
    Case("every index is -1", 64, visible=0.0),
    Case("long enough to be cut and merged", 2048, batch=1),
    Case("more queries than processors", 96, batch=5, seqlen_q=4),
    Case("20 heads", 128, num_heads=20),
    Case("40 heads: 64-row tiles", 70, num_heads=40),
    Case("128 heads", 64, num_heads=128),
    Case("sinks", 128, sinks=True, num_heads=20),
    Case("sinks, cut and merged", 2048, batch=1, seqlen_q=2, sinks=True),
    Case("sinks, nothing visible", 64, visible=0.0, sinks=True),
    Case("lengths, 0 and all among them", 128, batch=4, seqlen_q=2, topk_length=(0, 1, 70, 128)),
    Case("lengths and sinks", 128, batch=3, topk_length=(0, 65, 128), sinks=True),
    Case("pages of 16", 70, block_size=16, num_blocks=20),
    Case("pages of one row, as a prompt's", 70, block_size=1, num_blocks=300),
    Case("256 + 64 columns", 70, kv_lora_rank=256, qk_rope_head_dim=64),
    Case("DeepSeek's shape", 130, kv_lora_rank=512, qk_rope_head_dim=64, num_heads=16),
    Case("a negative scale", 70, softmax_scale=-0.2),
)
CASES += tuple(dataclasses.replace(case, fp8=True) for case in CASES)
IDS = [case.why + (", FP8" if case.fp8 else "") for case in CASES]


@dataclass(frozen=True)
class Problem:
    case: Case
    q: torch.Tensor
    kv_cache: torch.Tensor
    indices: torch.Tensor
    attn_sink: torch.Tensor | None
    topk_length: torch.Tensor | None

    def run(self, backend: str | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        return ops.sparse_decode(
            self.q,
            self.kv_cache,
            self.indices,
            kv_lora_rank=self.case.kv_lora_rank,
            softmax_scale=self.case.softmax_scale,
            attn_sink=self.attn_sink,
            topk_length=self.topk_length,
            backend=backend,
        )


def make(case: Case, dtype: torch.dtype, seed: int = 0) -> Problem:
    """Half of the rows are NaN: no index that counts names them. What does not count names them, or lies outside."""
    generator = torch.Generator().manual_seed(seed)
    d_qk, num_rows = case.kv_lora_rank + case.qk_rope_head_dim, case.num_blocks * case.block_size
    rows = torch.randn((num_rows, d_qk), generator=generator)
    order = torch.randperm(num_rows, generator=generator)
    good, bad = order[: num_rows // 2], order[num_rows // 2 :]
    rows[bad] = float("nan")
    if case.fp8:
        rows = encode_rows(rows[:, : case.kv_lora_rank], rows[:, case.kv_lora_rank :])
    kv_cache = rows.view(case.num_blocks, case.block_size, 1, -1)
    shape = (case.batch, case.seqlen_q, case.topk)
    indices = good[torch.randint(len(good), shape, generator=generator)]
    hidden = torch.rand(shape, generator=generator) >= case.visible
    outside = torch.tensor([-1, -7, num_rows, 2**31 - 1])[torch.randint(4, shape, generator=generator)]
    indices = torch.where(hidden, outside, indices)
    if case.topk_length is not None:
        past = torch.arange(case.topk) >= torch.tensor(case.topk_length)[:, None, None]
        indices = torch.where(past, bad[torch.randint(len(bad), shape, generator=generator)], indices)
    sinks = torch.randn(case.num_heads, generator=generator) * 3 if case.sinks else None
    if sinks is not None and case.num_heads >= 3:
        sinks[0], sinks[1] = float("inf"), float("-inf")
    return Problem(
        case,
        torch.randn((case.batch, case.seqlen_q, case.num_heads, d_qk), generator=generator).to(DEVICE, dtype),
        kv_cache.to(DEVICE) if case.fp8 else kv_cache.to(DEVICE, dtype),
        indices.to(DEVICE, torch.int32),
        None if sinks is None else sinks.to(DEVICE),
        None if case.topk_length is None else torch.tensor(case.topk_length, dtype=torch.int32, device=DEVICE),
    )


def plain(problem: Problem, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Query by query, every step in `dtype`: out, lse and largest score; where nothing is visible 0, inf and -inf."""
    case, num_rows = problem.case, problem.case.num_blocks * problem.case.block_size
    rows = problem.kv_cache.flatten(0, 2)
    if case.fp8:
        rows = torch.cat(decode_rows(rows, case.kv_lora_rank, case.qk_rope_head_dim, dtype), -1)
    rows, out = rows.to(dtype), torch.zeros((*problem.q.shape[:3], case.kv_lora_rank), dtype=dtype, device=DEVICE)
    lse = torch.full(problem.q.shape[:3], float("inf"), dtype=dtype, device=DEVICE)
    largest = torch.full_like(lse, float("-inf"))
    for request in range(case.batch):
        for query in range(case.seqlen_q):
            named = problem.indices[request, query].tolist()
            if case.topk_length is not None:
                named = named[: case.topk_length[request]]
            named = [index for index in named if 0 <= index < num_rows]
            if not named:
                continue
            k = rows[named]
            scores = problem.q[request, query].to(dtype) @ k.T * case.softmax_scale
            lse[request, query] = scores.logsumexp(-1)
            largest[request, query] = scores.amax(-1)
            if problem.attn_sink is not None:  # one more column, whose value is nothing
                scores = torch.cat((scores, problem.attn_sink.to(dtype)[:, None]), -1)
            probability = scores.softmax(-1)[:, : len(named)]
            if problem.attn_sink is not None:
                probability = torch.where(torch.isposinf(problem.attn_sink)[:, None], 0, probability)
            out[request, query] = probability @ k[:, : case.kv_lora_rank]
    return out, lse.transpose(1, 2), largest.transpose(1, 2)


def assert_right(problem: Problem, out: torch.Tensor, lse: torch.Tensor) -> None:
    right_out, right_lse, _ = plain(problem, torch.float64)
    assert out.shape == right_out.shape
    assert out.dtype == problem.q.dtype
    empty = torch.isinf(right_lse)
    assert torch.equal(torch.isposinf(lse), empty)
    assert not out.transpose(1, 2)[empty].any()
    allowed = LSE_ERROR + 2**-22 * right_lse.abs()
    if problem.case.fp8:  # a latent is rounded to the dtype of the queries: each of d_qk products is off by as much
        most = problem.q.double().abs().sum(-1).max() * abs(problem.case.softmax_scale)
        allowed += torch.finfo(problem.q.dtype).eps / 2 * most
    error = (lse.double() - right_lse)[~empty].abs()
    assert bool((error <= allowed[~empty]).all()), f"lse is off by {error.max().item():.1e}"
    yardstick = (plain(problem, problem.q.dtype)[0].double() - right_out).norm().item()
    distance = (out.double() - right_out).norm().item()
    assert distance <= 2 * yardstick, f"error {distance:.2e}, plain torch in {out.dtype} has {yardstick:.2e}"


@BY_BACKEND
@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_result(case: Case, backend: str, dtype: torch.dtype) -> None:
    problem = make(case, dtype)
    assert_right(problem, *problem.run(backend))


@pytest.mark.parametrize("fp8", [False, True])
def test_naming_every_row_in_order_is_dense_attention(fp8: bool) -> None:
    """The witness: `ops.decode`, itself tested against torch's SDPA, in fp64."""
    lengths, block_size = torch.tensor([70, 3], dtype=torch.int32), 64
    problem = make(Case("all", 128, visible=1.0, fp8=fp8), torch.float64)
    rows = torch.randn((5, block_size, 1, 160), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    pool = encode_rows(rows[..., :128], rows[..., 128:]) if fp8 else rows
    pool = pool.to(DEVICE)
    table = torch.tensor([[3, 1], [4, 0]], dtype=torch.int32, device=DEVICE)
    place = torch.arange(128, device=DEVICE)
    indices = table.repeat_interleave(block_size, 1) * block_size + place % block_size
    indices = torch.where(place < lengths.to(DEVICE)[:, None], indices, -1)[:, None].int()
    options = {"kv_lora_rank": 128, "softmax_scale": 0.11, "backend": "torch"}
    wanted = flash_mla.decode(problem.q, pool, table, lengths.to(DEVICE), **options)
    found = ops.sparse_decode(problem.q, pool, indices, **options)
    torch.testing.assert_close(found[0], wanted[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found[1], wanted[1], rtol=1e-12, atol=1e-12)


# The compiled kernel: FP8 rows of 512 + 64.
HOPPER_CASES = tuple(dataclasses.replace(case, kv_lora_rank=512, qk_rope_head_dim=64) for case in CASES if case.fp8)


@needs_hopper
@pytest.mark.parametrize("case", HOPPER_CASES, ids=[case.why for case in HOPPER_CASES])
def test_result_of_the_compiled_kernel(case: Case) -> None:
    problem = make(case, torch.bfloat16)
    assert_right(problem, *problem.run("cuda"))
    assert_right(problem, *problem.run("cuda"))  # lengths and plan are kept


@needs_hopper
@pytest.mark.parametrize("has_lengths", [True, False], ids=["lengths", "all"])
@pytest.mark.parametrize(
    ("num_heads", "batch", "topk"),
    # The last: 52 queries x 32 x 2 tiles = 3,328 units of work, enough for tiles of 64 query rows on 132 SMs.
    # The one before: 32 queries are 32 of 33 slots, whole.
    [(16, 3, 300), (32, 3, 300), (128, 3, 300), (128, 16, 300), (128, 26, 2048)],
    ids=["16 heads", "32 heads", "128 heads", "128 heads, whole queries", "128 heads, tiles of 64"],
)
def test_the_compiled_kernel_in_a_graph(num_heads: int, batch: int, topk: int, has_lengths: bool) -> None:
    """A replay attends to what the captured tensors hold then: other queries, rows, sinks, -1 and lengths.

    Catches what was read once, at capture, and kept: a plan of other lengths, a list that the host looked at, memory
    that the graph does not own (the calls between replays take it).
    """
    case = Case("graph", topk, batch, 2, num_heads, kv_lora_rank=512, qk_rope_head_dim=64, sinks=True, fp8=True)
    # By request: all, none, one, and around the 64 indices that the kernel takes at a time.
    turns = ((0.8, (topk, 0, 1)), (0.1, (65, topk, 63)), (1.0, (0, 64, topk)), (0.0, (topk, 7, 0)))
    others = []
    for seed, (visible, lengths) in enumerate(turns):
        of_requests = tuple(lengths[request % 3] for request in range(batch)) if has_lengths else None
        others.append(make(dataclasses.replace(case, visible=visible, topk_length=of_requests), torch.bfloat16, seed))
    problem = make(others[0].case, torch.bfloat16)
    problem.run("cuda")  # kernels are loaded
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = problem.run("cuda")
    for other in (*others, others[0]):
        for name in ("q", "kv_cache", "indices", "attn_sink", *(["topk_length"] if has_lengths else [])):
            getattr(problem, name).copy_(getattr(other, name))
        graph.replay()
        assert_right(other, out, lse)
        assert_right(other, *other.run("cuda"))


@BY_BACKEND
def test_a_row_named_twice_counts_twice(backend: str, dtype: torch.dtype) -> None:
    problem = make(Case("twice", 64, visible=1.0, batch=1), dtype)
    problem.indices[0, 0, 1:] = -1
    once = problem.run(backend)
    problem.indices[0, 0, 5] = problem.indices[0, 0, 0]
    twice = problem.run(backend)
    torch.testing.assert_close(twice[0], once[0])
    torch.testing.assert_close(twice[1], once[1] + torch.log(torch.tensor(2.0)), rtol=1e-5, atol=1e-5)


@BY_BACKEND
def test_a_length_past_topk_counts_all(backend: str, dtype: torch.dtype) -> None:
    """What lies behind a query's indices in memory, the next query's, is not taken for them."""
    problem = make(Case("past", 70, visible=1.0, topk_length=(70, 70)), dtype)
    wanted = problem.run(backend)
    longer = torch.tensor([200, 2**31 - 1], dtype=torch.int32, device=DEVICE)
    found = dataclasses.replace(problem, topk_length=longer).run(backend)
    assert torch.equal(found[0], wanted[0])
    assert torch.equal(found[1], wanted[1])


@BY_BACKEND
def test_strides(backend: str, dtype: torch.dtype) -> None:
    """Heads before tokens, a layer's pool, indices out of a wider tensor with requests last, an expanded length."""
    problem = make(Case("strides", 70, batch=3, seqlen_q=2, topk_length=(70, 70, 70)), dtype)
    pool, indices = problem.kv_cache, problem.indices
    layers = torch.full((pool.shape[0], 3, *pool.shape[1:]), float("nan"), dtype=dtype, device=DEVICE)
    layers[:, 1] = pool
    wide = torch.full((70, 2, 2, 3), 10**6, dtype=torch.int32, device=DEVICE)
    wide[:, :, 1] = indices.permute(2, 1, 0)
    arranged = dataclasses.replace(
        problem,
        q=problem.q.transpose(1, 2).contiguous().transpose(1, 2),
        kv_cache=layers[:, 1],
        indices=wide[:, :, 1].permute(2, 1, 0),
        topk_length=torch.tensor([70], dtype=torch.int32, device=DEVICE).expand(3),
    )
    assert_right(arranged, *arranged.run(backend))


@BY_BACKEND
@pytest.mark.parametrize("shape", [(0, 1, 64), (2, 1, 0)], ids=["no request", "no index"])
def test_nothing_to_do(shape: tuple[int, ...], backend: str, dtype: torch.dtype) -> None:
    q = torch.ones((*shape[:2], 4, 160), dtype=dtype, device=DEVICE)
    pool = torch.full((2, 64, 1, 160), float("nan"), dtype=dtype, device=DEVICE)
    indices = torch.zeros(shape, dtype=torch.int32, device=DEVICE)
    out, lse = ops.sparse_decode(q, pool, indices, kv_lora_rank=128, softmax_scale=0.1, backend=backend)
    assert not out.any()
    assert out.shape == (*shape[:2], 4, 128)
    assert bool(torch.isposinf(lse).all())


WRONG = {
    "indices of int64": (
        {"indices": torch.zeros(2, 1, 64, dtype=torch.int64)},
        r"indices must be int32 \[batch=2, seqlen_q=1, topk\].*int64",
    ),
    "indices of another batch": (
        {"indices": torch.zeros(3, 1, 64, dtype=torch.int32)},
        r"indices must be .* got .*\(3, 1, 64\)",
    ),
    "indices of rank 2": ({"indices": torch.zeros(2, 1, dtype=torch.int32)}, r"indices must be .*\(2, 1\)"),
    "two latent heads": ({"kv_cache": torch.zeros(2, 64, 2, 160)}, "kv_cache must be of one latent head"),
    "a sink for other heads": ({"attn_sink": torch.zeros(5)}, r"attn_sink must be float32 \[num_heads=4\]"),
    "a sink in fp64": ({"attn_sink": torch.zeros(4, dtype=torch.float64)}, "attn_sink must be float32"),
    "lengths per query": (
        {"topk_length": torch.zeros((2, 1), dtype=torch.int32)},
        r"topk_length must be int32 \[batch=2\]",
    ),
    "a query of another width": (
        {"q": torch.zeros(2, 1, 4, 96)},
        r"q must be \[batch, seqlen_q >= 1, num_heads, d_qk=160\]",
    ),
    "a wider latent than the row": ({"kv_lora_rank": 200}, r"kv_lora_rank must be in 1\.\.d_qk=160, got 200"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments(name: str) -> None:
    arguments = {
        "q": torch.zeros(2, 1, 4, 160),
        "kv_cache": torch.zeros(2, 64, 1, 160),
        "indices": torch.zeros((2, 1, 64), dtype=torch.int32),
        "kv_lora_rank": 128,
        "softmax_scale": 0.1,
    }
    changes, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        ops.sparse_decode(**{**arguments, **changes})


@BY_BACKEND
def test_opcheck(backend: str, dtype: torch.dtype) -> None:
    problem = make(Case("opcheck", 64, sinks=True, topk_length=(64, 3)), dtype)
    arguments = (problem.q, problem.kv_cache.nan_to_num(), problem.indices, problem.attn_sink, problem.topk_length)
    torch.library.opcheck(torch.ops.flash_mla.sparse_decode.default, (*arguments, 128, 0.1, backend))


def test_compiled_into_one_graph() -> None:
    problem = make(Case("compiled", 70, sinks=True), torch.float32)
    compiled = torch.compile(lambda p: p.run(), fullgraph=True, backend="aot_eager")
    wanted, found = problem.run(), compiled(problem)
    torch.testing.assert_close(found, wanted)


def test_a_plan_of_full_lengths_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """It depends on the shape alone, and is the same for every layer of every step."""
    from flash_mla.backends import triton as backend

    made = []
    original = backend.plan
    monkeypatch.setattr(backend, "plan", lambda *arguments: (made.append(1), original(*arguments))[1])
    monkeypatch.setattr(equal_lengths, "_kept", {})
    dtype = next(dtype for name, dtype in SPARSE_BACKENDS if name == "triton")
    problem = make(Case("kept", 2048, batch=1), dtype)
    for _ in range(3):
        assert_right(problem, *problem.run("triton"))
    assert len(made) == 1
    assert_right(make(Case("other", 64, batch=3), dtype), *make(Case("other", 64, batch=3), dtype).run("triton"))
    assert len(made) == 2
