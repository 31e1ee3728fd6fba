"""FlashMLA's two functions, dense: three generations of signatures, metadata that is old, metadata that is wrong."""

from __future__ import annotations

import gc
import types
from dataclasses import dataclass

import pytest
import torch

from flash_mla import interface, ops
from flash_mla.backends import torch as definition
from flash_mla.codec import decode_rows, encode_rows
from flash_mla.contract import PLAN_BLOCK, DecodeCall, UnsupportedError
from flash_mla.interface import FlashMLASchedMeta, flash_mla_with_kvcache, get_mla_metadata

GARBAGE = 2147480000  # what a table entry past the length may hold


@dataclass
class Call:
    q: torch.Tensor
    k_cache: torch.Tensor
    block_table: torch.Tensor
    cache_seqlens: torch.Tensor
    head_dim_v: int

    def __call__(self, *metadata: object, **options: object) -> tuple[torch.Tensor, torch.Tensor]:
        if self.k_cache.dtype.itemsize == 1:
            options = {"is_fp8_kvcache": True, **options}
        return flash_mla_with_kvcache(
            self.q, self.k_cache, self.block_table, self.cache_seqlens, self.head_dim_v, *metadata, **options
        )

    def rows(self) -> torch.Tensor:
        """The pool in fp64 on the host, whatever its rows are made of."""
        pool = self.k_cache.cpu()
        if pool.dtype.itemsize > 1:
            return pool.double()
        return torch.cat(decode_rows(pool, self.head_dim_v, self.q.shape[3] - self.head_dim_v, torch.float64), -1)


def make(
    lengths: tuple[int, ...],
    *,
    seqlen_q: int = 1,
    num_heads: int = 4,
    h_kv: int = 1,
    head_dim_v: int = 16,
    rope: int = 8,
    block_size: int = 16,
    room: int = 0,
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
    fp8: bool = False,
) -> Call:
    """A call with pages in random order, NaN in every row past a length and garbage in every entry past it.

    `room`: tokens that the pages can hold beyond the longest length, their rows not NaN but real.
    """
    generator = torch.Generator().manual_seed(sum(lengths) + seqlen_q)
    batch, d_qk = len(lengths), head_dim_v + rope
    held = [length + room for length in lengths]
    pages = [-(-tokens // block_size) for tokens in held]
    order = (torch.randperm(sum(pages) + 1, generator=generator)).tolist()
    k_cache = torch.randn(sum(pages) + 1, block_size, h_kv, d_qk, generator=generator, dtype=torch.float64)
    block_table = torch.full((batch, max([*pages, 1]) + 2), GARBAGE, dtype=torch.int32)
    for request in range(batch):
        taken = [order.pop() for _ in range(pages[request])]
        block_table[request, : len(taken)] = torch.tensor(taken, dtype=torch.int32)
        if held[request] % block_size:
            k_cache[taken[-1], held[request] % block_size :] = float("nan")
    k_cache[order.pop()] = float("nan")
    q = torch.randn(batch, seqlen_q, num_heads, d_qk, generator=generator, dtype=torch.float64)
    k_cache = encode_rows(k_cache[..., :head_dim_v], k_cache[..., head_dim_v:]) if fp8 else k_cache.to(dtype)
    return Call(
        q.to(device, dtype),
        k_cache.to(device),
        block_table.to(device),
        torch.tensor(lengths, dtype=torch.int32, device=device),
        head_dim_v,
    )


def reference(call: Call, *, causal: bool = False, scale: float | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """One query row at a time in fp64, from the formula alone."""
    q, pool = call.q.cpu().double(), call.rows()
    batch, seqlen_q, num_heads, d_qk = q.shape
    h_kv, block_size = pool.shape[2], pool.shape[1]
    scale = d_qk**-0.5 if scale is None else scale
    out = torch.zeros(batch, seqlen_q, num_heads, call.head_dim_v, dtype=torch.float64)
    lse = torch.full((batch, num_heads, seqlen_q), float("inf"), dtype=torch.float64)
    for b, length in enumerate(call.cache_seqlens.tolist()):
        rows = [pool[call.block_table[b, t // block_size], t % block_size] for t in range(length)]
        for j in range(seqlen_q):
            visible = length - (seqlen_q - 1 - j) if causal else length
            for h in range(num_heads if visible > 0 else 0):
                keys = torch.stack(rows[:visible])[:, h // (num_heads // h_kv)]
                scores = keys @ q[b, j, h] * scale
                out[b, j, h] = scores.softmax(0) @ keys[:, : call.head_dim_v]
                lse[b, h, j] = scores.logsumexp(0)
    return out, lse


def planned_decode(
    call: DecodeCall,
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    cache_seqlens: torch.Tensor,
    softmax_scale: float,
    items: torch.Tensor | None = None,
    splits: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """A backend that does exactly what its plan says: every part by itself, then the merge of each request's parts.

    A part is units [units * begin >> 30, units * end >> 30) of the live length. Not causal.
    """
    assert items is not None
    assert splits is not None
    num_slots = items.shape[0] - call.batch
    out = q.new_full((*q.shape[:3], call.kv_lora_rank), float("nan"))
    lse = q.new_full((call.batch, call.num_heads, call.seqlen_q), float("nan"))
    for b in range(call.batch):
        parts = []
        first_slot, num_parts = splits[b].tolist()
        for slot in range(first_slot, first_slot + num_parts):
            # Part 0 is the slot's first item, or has a row of its own; later parts are first items.
            item = items[slot] if slot > first_slot or items[slot, 0] == b else items[num_slots + b]
            request, begin, end, _ = item.tolist()
            assert request == b
            units = -(-int(cache_seqlens[b]) // PLAN_BLOCK)
            first, last = ((units * cut >> 30) * PLAN_BLOCK for cut in (begin, end))
            tokens = range(first, min(last, int(cache_seqlens[b])))
            size = call.block_size
            rows = [kv_cache[block_table[b, t // size], t % size] for t in tokens]
            keys = torch.stack(rows) if rows else kv_cache.new_empty(0, call.h_kv, q.shape[3])
            keys = keys.repeat_interleave(call.num_heads // call.h_kv, dim=1)
            scores = torch.einsum("qhd,khd->qhk", q[b], keys) * softmax_scale
            mixed = torch.einsum("qhk,khd->qhd", scores.softmax(-1), keys[..., : call.kv_lora_rank])
            parts.append((scores.logsumexp(-1), mixed))
        part_lse = torch.stack([p[0] for p in parts])
        total = part_lse.logsumexp(0)
        weights = (part_lse - total).exp().nan_to_num(0.0)
        out[b] = (weights.unsqueeze(-1) * torch.stack([p[1] for p in parts])).sum(0)
        lse[b] = total.masked_fill(total == float("-inf"), float("inf")).T
    return out, lse


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> types.SimpleNamespace:
    """The only backend is one that follows its plan literally; it counts the plans and records what it was handed."""
    seen = types.SimpleNamespace(plans=0, items=[])
    # Cuts that cost nothing, so that requests of two or three pages are cut.
    monkeypatch.setattr(definition, "ITEM_COST", 1)
    monkeypatch.setattr(definition, "CUT_COST", 0)

    def plan(
        cache_seqlens: torch.Tensor, num_slots: int, deterministic: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        seen.plans += 1
        return definition.plan(cache_seqlens, num_slots, deterministic)

    def decode(call: DecodeCall, *args: object) -> tuple[torch.Tensor, torch.Tensor]:
        q, kv_cache, block_table, cache_seqlens, softmax_scale, items, splits = args
        if items is None:
            items, splits = plan(cache_seqlens, backend.num_slots(call))
        seen.items.append(items)
        return planned_decode(call, q, kv_cache, block_table, cache_seqlens, softmax_scale, items, splits)

    backend = types.SimpleNamespace(
        decode_refusals=lambda call: [],
        append_refusals=lambda call: [],
        num_slots=lambda call: call.batch + 4,
        plan=plan,
        decode=decode,
    )
    monkeypatch.setattr(ops, "BACKENDS", {"planned": backend})
    ops._choose.cache_clear()
    yield seen
    ops._choose.cache_clear()


@pytest.fixture(autouse=True)
def definition_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """fp64 calls, whatever other backends this machine has."""
    monkeypatch.setattr(ops, "BACKENDS", {"torch": definition})
    ops._choose.cache_clear()
    yield
    ops._choose.cache_clear()


def metadata_of(generation: str, call: Call) -> tuple[object, ...]:
    _, seqlen_q, num_heads, _ = call.q.shape
    h_kv = call.k_cache.shape[2]
    rows = seqlen_q * num_heads // h_kv
    return {
        "1": lambda: get_mla_metadata(call.cache_seqlens, rows, h_kv),
        "2": lambda: get_mla_metadata(call.cache_seqlens, rows, h_kv, num_heads, False, None),
        "2, FP8 and sparse": lambda: get_mla_metadata(call.cache_seqlens, rows, h_kv, num_heads, True, 2048),
        "2 by name": lambda: get_mla_metadata(
            cache_seqlens=call.cache_seqlens, num_q_tokens_per_head_k=rows, num_heads_k=h_kv, num_heads_q=num_heads
        ),
        "3": lambda: get_mla_metadata(),
        "none": lambda: (),
    }[generation]()


GENERATIONS = ("1", "2", "2 by name", "3", "none")
generations = pytest.mark.parametrize("generation", GENERATIONS)


def assert_same(result: tuple[torch.Tensor, torch.Tensor], expected: tuple[torch.Tensor, torch.Tensor]) -> None:
    # fp64 against fp64: what remains is the order of the sums.
    for ours, theirs in zip(result, expected, strict=True):
        torch.testing.assert_close(ours.double().cpu(), theirs, rtol=1e-12, atol=1e-12)


@generations
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("seqlen_q", [1, 2])
def test_every_generation_equals_the_formula(generation: str, causal: bool, seqlen_q: int) -> None:
    # 65: one token on another page; 0: nothing visible; 1: at seqlen_q 2 and causal, the first query sees nothing.
    call = make((65, 0, 1, 16, 40), seqlen_q=seqlen_q, h_kv=2)
    out, lse = call(*metadata_of(generation, call), causal=causal)
    assert_same((out, lse), reference(call, causal=causal))
    assert bool((lse[1] == float("inf")).all())
    assert bool((out[1] == 0).all())
    ours = ops.decode(
        call.q, call.k_cache, call.block_table, call.cache_seqlens,
        kv_lora_rank=call.head_dim_v, softmax_scale=call.q.shape[3] ** -0.5, causal=causal,
    )  # fmt: skip
    assert torch.equal(out, ours[0])
    assert torch.equal(lse, ours[1])


FP8_SHAPE = {"head_dim_v": 128, "rope": 32, "fp8": True}


@pytest.mark.parametrize("generation", [*GENERATIONS, "2, FP8 and sparse"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("pool_dtype", [torch.uint8, torch.int8, torch.float8_e4m3fn])
def test_every_generation_over_fp8_rows(generation: str, causal: bool, pool_dtype: torch.dtype) -> None:
    call = make((65, 0, 1, 16), seqlen_q=2, h_kv=2, **FP8_SHAPE)
    call.k_cache = call.k_cache.view(pool_dtype)
    assert_same(call(*metadata_of(generation, call), causal=causal), reference(call, causal=causal))


def test_one_metadata_object_serves_fp8_rows_and_others(planned: types.SimpleNamespace) -> None:
    # Layers of one step whose caches differ in format share its lengths, and so its plan.
    metadata, _ = get_mla_metadata()
    call = make((200, 3, 0, 130))
    assert_same(call(metadata), reference(call))
    items = metadata._plan(call.q.device, None).items
    call = make((200, 3, 0, 130), **FP8_SHAPE)
    with pytest.MonkeyPatch.context() as patch:
        handed: list[torch.Tensor | None] = []
        patch.setattr(ops, "BACKENDS", {"torch": recording(handed)})
        ops._choose.cache_clear()
        assert_same(call(metadata), reference(call))
    assert handed[0] is items
    assert planned.plans == 1


def recording(handed: list[torch.Tensor | None]) -> types.SimpleNamespace:
    """The definition, which keeps the plan items that it is handed."""

    def decode(*args: object) -> tuple[torch.Tensor, torch.Tensor]:
        handed.append(args[6])
        return definition.decode(*args)

    return types.SimpleNamespace(**{**vars(definition), "decode": decode})


@generations
def test_every_generation_follows_its_plan(generation: str, planned: types.SimpleNamespace) -> None:
    call = make((200, 3, 0, 130), seqlen_q=2)
    assert_same(call(*metadata_of(generation, call)), reference(call))
    assert planned.plans == 1


def test_softmax_scale_has_flash_mlas_default_and_is_obeyed() -> None:
    call = make((33,))
    assert_same(call(softmax_scale=0.3), reference(call, scale=0.3))
    assert_same(call(softmax_scale=None), reference(call, scale=24**-0.5))


@pytest.mark.parametrize("generation", ["1", "2", "3"])
def test_metadata_that_is_older_than_the_lengths_loses_no_token(
    generation: str, planned: types.SimpleNamespace
) -> None:
    # 63 -> 64 -> 65 crosses a unit of the plan, 16 -> 17 a page; 300 tokens later parts are many times longer.
    call = make((63, 16, 0, 128), room=300)
    metadata = metadata_of(generation, call)
    for growth in (0, 1, 1, 1, 61, 1, 235):
        call.cache_seqlens += growth
        assert_same(call(*metadata), reference(call))
    assert planned.plans == 1
    call.cache_seqlens -= 299  # a crop or another batch of requests: shorter than planned
    assert_same(call(*metadata), reference(call))


def test_lengths_may_be_another_tensor_of_the_same_batch(planned: types.SimpleNamespace) -> None:
    metadata, _ = get_mla_metadata()
    for lengths in ((70, 5), (5, 300), (0, 0)):
        call = make(lengths)
        assert_same(call(metadata), reference(call))
    assert planned.plans == 1


def test_metadata_object_is_planned_once_for_all_layers(planned: types.SimpleNamespace) -> None:
    call = make((100, 20))
    metadata, num_splits = get_mla_metadata()
    assert num_splits is None
    assert "not planned" in repr(metadata)
    for _ in range(3):
        call(metadata, None)
    assert planned.plans == 1
    assert len({id(items) for items in planned.items}) == 1
    assert "batch=2" in repr(metadata)


def test_a_failed_first_call_leaves_the_object_as_it_was(
    planned: types.SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    metadata, _ = get_mla_metadata()
    wrong = make((40, 50, 60))
    with pytest.raises(ValueError, match="block_table must be int32"):
        flash_mla_with_kvcache(wrong.q, wrong.k_cache, wrong.block_table.long(), wrong.cache_seqlens, 16, metadata)
    with monkeypatch.context() as patch:  # fails after planning, in the launch
        patch.setattr(ops.BACKENDS["planned"], "decode", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            wrong(metadata)
    assert "not planned" in repr(metadata)
    call = make((70, 5))
    assert_same(call(metadata), reference(call))


def test_plans_of_a_capture_stay_in_it(planned: types.SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    # What a capture computes exists only once its graph is replayed; eager plans are old inside a capture.
    call = make((100, 20))
    metadata, _ = get_mla_metadata()
    expected = 0
    for capture, new in ((None, 1), (7, 1), (7, 0), (None, 0), (8, 1), (8, 0), (-1, 1), (-1, 1), (None, 0), (7, 1)):
        monkeypatch.setattr(interface, "_capture_id", lambda device, capture=capture: capture)
        call(metadata)
        expected += new
        assert planned.plans == expected, f"in capture {capture}"
    monkeypatch.setattr(interface, "_capture_id", lambda device: 9)
    fresh, _ = get_mla_metadata()
    call(fresh)
    monkeypatch.setattr(interface, "_capture_id", lambda device: None)
    assert fresh._plan(call.q.device, None) is None  # an eager call after the capture plans for itself


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: CUDA graph capture")
@pytest.mark.parametrize("warm", [False, True], ids=["first call in the capture", "first call before it"])
def test_replay_with_longer_lengths(warm: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from flash_mla.backends import triton as triton_backend

    monkeypatch.setattr(ops, "BACKENDS", {"triton": triton_backend, "torch": definition})
    ops._choose.cache_clear()
    shape = {"head_dim_v": 512, "rope": 64, "block_size": 64, "num_heads": 16, "dtype": torch.bfloat16}
    call = make((63, 128, 1), room=2000, device="cuda", **shape)
    call(get_mla_metadata()[0])  # compiles the kernels
    metadata, _ = get_mla_metadata()
    if warm:
        call(metadata)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        first = call(metadata)
        second = call(metadata)
    for growth in (0, 1, 1, 1000, 997):
        call.cache_seqlens += growth
        graph.replay()
        _, exact = reference(call)
        for _, lse in (first, second, call(metadata)):
            # The contract of lse. One lost token of 3000 changes it by 3e-4, one of 64 by 0.016.
            assert (lse.double().cpu() - exact).abs().max() <= 1e-5
        torch.testing.assert_close(first[0], second[0], rtol=0, atol=0)


def test_batch_of_20000() -> None:
    lengths = tuple(1 + i % 7 for i in range(20000))
    call = make(lengths, num_heads=1, head_dim_v=2, rope=2, block_size=8)
    items, num_splits = get_mla_metadata(call.cache_seqlens, 1, 1)
    assert num_splits.shape == (20000, 2)
    results = [call(items, num_splits), call(get_mla_metadata()[0]), call()]
    picked = torch.tensor([0, 6, 11622, 11623, 19999])
    some = Call(call.q[picked], call.k_cache, call.block_table[picked], call.cache_seqlens[picked], 2)
    for out, lse in results:
        assert_same((out[picked], lse[picked]), reference(some))


def test_an_empty_batch_is_an_empty_result() -> None:
    call = make((5,))
    empty = Call(call.q[:0], call.k_cache, call.block_table[:0], call.cache_seqlens[:0], 16)
    for generation in GENERATIONS:
        out, lse = empty(*metadata_of(generation, empty))
        assert out.shape == (0, 1, 4, 16)
        assert lse.shape == (0, 4, 1)


def test_outer_strides_are_free() -> None:
    call = make((65, 17), seqlen_q=2)
    expected = reference(call)
    call.q = call.q.transpose(1, 2).contiguous().transpose(1, 2)
    wide = torch.full((*call.k_cache.shape[:3], 40), float("nan"), dtype=torch.float64)
    wide[..., :24] = call.k_cache
    call.k_cache = wide[..., :24]
    assert_same(call(), expected)


# --- metadata of another call ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("generation", ["1", "2", "3"])
@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"lengths": (40, 50, 60)}, "3"),  # another batch
        ({"num_heads": 8}, "num_heads"),
        ({"seqlen_q": 2}, "seqlen_q"),
        ({"h_kv": 2}, "h_kv"),
    ],
)
def test_metadata_of_another_shape_is_refused(generation: str, change: dict[str, object], named: str) -> None:
    call = make((40, 50))
    metadata = metadata_of(generation, call)
    call(*metadata)
    other = make(**{"lengths": (40, 50), **change})
    with pytest.raises(ValueError, match=named):
        other(*metadata)
    assert_same(call(*metadata), reference(call))  # and still serves its own


def test_same_rows_by_another_head_count() -> None:
    # Generation 1 is told the rows only, so 8 heads at seqlen_q 1 and 4 at 2 are one plan; generation 2 knows better.
    one, two = make((40, 50), num_heads=8), make((40, 50), num_heads=4, seqlen_q=2)
    assert_same(two(*metadata_of("1", one)), reference(two))
    with pytest.raises(ValueError, match="num_heads=8"):
        two(*metadata_of("2", one))


def test_metadata_tensors_of_two_plans_do_not_mix() -> None:
    call = make((40, 50))
    (items, _), (_, num_splits) = metadata_of("1", call), metadata_of("1", call)
    with pytest.raises(ValueError, match="two calls"):
        call(items, num_splits)


def test_copies_of_metadata_tensors_are_taken(planned: types.SimpleNamespace) -> None:
    # Engines copy the plan of each step into buffers that a CUDA graph knows by address.
    call = make((40, 150))
    buffers = [torch.zeros_like(tensor) for tensor in metadata_of("1", call)]
    for lengths in ((40, 150), (200, 3)):
        call = make(lengths)
        for buffer, tensor in zip(buffers, metadata_of("1", call), strict=True):
            buffer.copy_(tensor)
        assert_same(call(*buffers), reference(call))
        assert buffers[1].tolist() == ([[0, 1], [1, 3]] if lengths == (40, 150) else [[0, 4], [4, 1]])


def test_layout_of_unknown_metadata_tensors_is_checked() -> None:
    call = make((40, 50))
    items, num_splits = metadata_of("1", call)
    for wrong_items, wrong_splits, named in (
        (items.clone()[:1], num_splits, "tile_scheduler_metadata must be contiguous int32"),
        (torch.zeros(2, 8, dtype=torch.int32), num_splits, "tile_scheduler_metadata must be"),  # upstream's layout
        (items.long(), num_splits, "tile_scheduler_metadata must be"),
        (items, num_splits.long(), "num_splits must be"),
        (items, num_splits[:-1].clone(), r"num_splits must be contiguous int32 \[batch=2, 2\]"),
        (items, None, "num_splits must be the tensor that came with"),
        (None, num_splits, "num_splits must be None unless"),
        (FlashMLASchedMeta(), num_splits, "num_splits must be None unless"),
        ("auto", None, "tile_scheduler_metadata must be what get_mla_metadata returned"),
        (items.to("meta"), num_splits, "tile_scheduler_metadata must be on cpu"),
    ):
        with pytest.raises(ValueError, match=named):
            call(wrong_items, wrong_splits)


def test_what_metadata_was_made_for_is_forgotten_with_it() -> None:
    gc.collect()
    before = len(interface._made_for)
    metadata = [get_mla_metadata(torch.tensor([5], dtype=torch.int32), 4, 1) for _ in range(10)]
    assert len(interface._made_for) == before + 20
    del metadata
    gc.collect()
    assert len(interface._made_for) == before


# --- wrong arguments --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (([5, 6], 4, 1), r"cache_seqlens must be int32 \[batch\], got list"),
        ((torch.tensor([5, 6]), 4, 1), r"int32 \[batch\], got torch.int64"),
        ((torch.zeros(2, 2, dtype=torch.int32), 4, 1), r"\(2, 2\)"),
        ((torch.zeros(2, dtype=torch.int32),), "num_heads_per_head_k and num_heads_k must be integers >= 1"),
        ((torch.zeros(2, dtype=torch.int32), 0, 1), "got 0 and 1"),
        ((torch.zeros(2, dtype=torch.int32), 4, -1), "got 4 and -1"),
        ((torch.zeros(2, dtype=torch.int32), 4, 2, 3), "num_heads_q must be a multiple of num_heads_k=2"),
        ((torch.zeros(2, dtype=torch.int32), 4, 2, 6), "divide .* 8, got 6"),
        ((torch.zeros(2, dtype=torch.int32), 4, 1, 4, False, 0), "topk must be None or >= 1"),
        ((None, 4, 1), "cache_seqlens must be given"),
    ],
)
def test_wrong_arguments_of_get_mla_metadata(arguments: tuple[object, ...], named: str) -> None:
    with pytest.raises(ValueError, match=named) as caught:
        get_mla_metadata(*arguments)
    assert not isinstance(caught.value, UnsupportedError)


def test_both_names_of_the_row_count() -> None:
    with pytest.raises(ValueError, match="the same, got both"):
        get_mla_metadata(torch.zeros(1, dtype=torch.int32), 4, 1, num_q_tokens_per_head_k=4)


@pytest.mark.parametrize("options", [(True, None), (False, 2048), (True, 1)], ids=["fp8", "sparse", "both"])
def test_metadata_of_other_modes_is_the_dense_plan(options: tuple[object, ...]) -> None:
    lengths = torch.tensor([500, 3], dtype=torch.int32)
    for ours, dense in zip(
        get_mla_metadata(lengths, 4, 1, 4, *options), get_mla_metadata(lengths, 4, 1, 4), strict=True
    ):
        assert torch.equal(ours, dense)
    with pytest.raises(ValueError, match="num_heads_q must be a multiple of num_heads_k=2"):
        get_mla_metadata(lengths, 4, 2, 3, *options)
    metadata = get_mla_metadata(lengths, 4, 1, 2, *options)
    with pytest.raises(ValueError, match=r"was made for .* num_heads=2"):
        make((500, 3))(*metadata)


def test_errors_speak_of_this_functions_arguments() -> None:
    call = make((5,))
    with pytest.raises(ValueError, match=r"flash_mla_with_kvcache: k_cache must be \[num_blocks"):
        flash_mla_with_kvcache(call.q, call.k_cache[0], call.block_table, call.cache_seqlens, 16)
    with pytest.raises(ValueError, match=r"head_dim_v must be in 1\.\.d_qk=24, got 25"):
        flash_mla_with_kvcache(call.q, call.k_cache, call.block_table, call.cache_seqlens, 25)
    with pytest.raises(ValueError, match="q must be"):
        flash_mla_with_kvcache(call.q[0], call.k_cache, call.block_table, call.cache_seqlens, 16)
    with pytest.raises(ValueError, match="block_table and cache_seqlens must be"):
        flash_mla_with_kvcache(call.q, call.k_cache, None, call.cache_seqlens, 16)
    with pytest.raises(ValueError, match="softmax_scale must be a number"):
        call(softmax_scale="auto")


def sparse_arguments() -> dict[str, torch.Tensor]:
    return {
        "indices": torch.zeros(2, 1, 8, dtype=torch.int32),
        "attn_sink": torch.zeros(4),
        "topk_length": torch.ones(2, dtype=torch.int32),
        "extra_k_cache": torch.zeros(3, 16, 1, 24, dtype=torch.float64),
        "extra_indices_in_kvcache": torch.zeros(2, 1, 5, dtype=torch.int32),
        "extra_topk_length": torch.ones(2, dtype=torch.int32),
    }


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"is_fp8_kvcache": True}, "k_cache must be .* one-byte elements"),
        ({"is_fp8_kvcache": True, "attn_sink": ...}, "k_cache must be .* one-byte elements"),
        ({"indices": torch.zeros(2, 1, 8)}, r"indices must be int32 \[batch=2, seqlen_q=1, topk\]"),
        ({"indices": torch.zeros(3, 1, 8, dtype=torch.int32)}, r"indices must be .* \(3, 1, 8\)"),
        ({"causal": True, "indices": ...}, "causal must be False with indices"),
        ({"attn_sink": torch.zeros(5)}, r"attn_sink must be float32 \[num_heads=4\]"),
        ({"attn_sink": torch.zeros(4, dtype=torch.float64)}, r"attn_sink must be float32 .* got torch.float64"),
        ({"attn_sink": torch.zeros(4, device="meta")}, r"attn_sink must be float32 .* on cpu like q, got .* on meta"),
        ({"indices": ..., "attn_sink": torch.zeros(5)}, r"attn_sink must be float32 \[num_heads=4\]"),
        ({"topk_length": ...}, "must come with indices"),
        ({"indices": ..., "topk_length": torch.ones(2)}, r"topk_length must be int32 \[batch=2\]"),
        ({"extra_k_cache": ..., "extra_indices_in_kvcache": ...}, "must come with indices"),
        ({"indices": ..., "extra_k_cache": ...}, "must come together"),
        ({"indices": ..., "extra_topk_length": ...}, "must come with extra_indices_in_kvcache"),
        ({"indices": ..., "extra_k_cache": torch.zeros(3), "extra_indices_in_kvcache": ...}, "extra_k_cache must be"),
    ],
)
def test_wrong_sparse_and_fp8_arguments_are_value_errors(arguments: dict[str, object], named: str) -> None:
    call = make((40, 50))
    right = sparse_arguments()
    with pytest.raises(ValueError, match=named) as caught:
        call(**{name: right[name] if value is ... else value for name, value in arguments.items()})
    assert not isinstance(caught.value, UnsupportedError)


def test_fp8_rows_have_to_be_announced() -> None:
    call = make((40, 50), **FP8_SHAPE)
    with pytest.raises(ValueError, match="is_fp8_kvcache must be True for a k_cache of one-byte elements, got False"):
        call(is_fp8_kvcache=False)
    with pytest.raises(ValueError, match=r"k_cache must be of FP8 rows of 208 bytes for \(128, 32\) columns"):
        Call(call.q, call.k_cache[..., :192], call.block_table, call.cache_seqlens, 128)()


@pytest.mark.parametrize("generation", ["1", "3", "none"])
def test_in_a_compiled_graph(generation: str) -> None:
    call = make((65, 17))
    metadata = metadata_of(generation, call)
    torch._dynamo.reset()
    compiled = torch.compile(lambda q: call_with(call, q, metadata), fullgraph=True, backend="eager")
    assert_same(compiled(call.q), reference(call))


def call_with(call: Call, q: torch.Tensor, metadata: tuple[object, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    return flash_mla_with_kvcache(q, call.k_cache, call.block_table, call.cache_seqlens, call.head_dim_v, *metadata)
