"""How long decode takes by shape: backends in turns on the same inputs, and what the device does at best.

A GPU only: on anything else a time says nothing about the kernel. Times are device times of whole calls (decode and
its merge; the split plan is made once outside, as in a model with many layers), in milliseconds. What they are set
against is in `decode_shapes` and `figures`.
"""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from ..codec import encode_rows, row_layout
from ..contract import UnsupportedError
from ..ops import append, backend_counts, decode, plan_splits, sparse_decode
from .check import WrongResultError, check_outputs, check_sparse_outputs
from .decode_inputs import Inputs, make_inputs
from .decode_shapes import DecodeShape, work_of
from .figures import AppendFigure, Ceilings, Result

__all__ = [
    "CallGraph",
    "Timing",
    "calls_in_turns",
    "in_turns",
    "measure_ceilings",
    "time_append",
    "time_cold",
    "time_shape",
]

# Bytes written between two cold calls; four times the L2 of an H200 (60 MB).
FLUSH_BYTES = 240 * 10**6
# Requests and new tokens of each that append is timed with: 151 MB of rows, more than an L2 holds.
APPEND_BATCH, APPEND_TOKENS = 128, 1024
# Calls and milliseconds that a graph has at least, so that its own start (about 2 µs) is lost among them, and
# milliseconds beyond which calls are not repeated, so that a burst has replays enough for a median.
GRAPH_CALLS, GRAPH_MS, GRAPH_MAX_MS = 8, 0.5, 4.0


@dataclass(frozen=True)
class Timing:
    """How a figure is made.

    Attributes:
        rounds: bursts per backend; the figure is the median of their medians.
        burst_s: device time of a burst. Short, because a hot device lowers its clocks.
        pause_s: idle time before each burst, so that a figure does not depend on what ran before it.
        sustained_s: device time of one more, long burst; 0: none.
        cold: also time single calls after an L2 flush.
    """

    rounds: int = 4
    burst_s: float = 0.08
    pause_s: float = 0.1
    sustained_s: float = 0.0
    cold: bool = True


def _device() -> torch.device:
    if not torch.cuda.is_available():
        raise UnsupportedError("flash_mla.bench: measures a GPU, and torch sees none here")
    return torch.device("cuda", torch.cuda.current_device())


_Call = Callable[[], tuple[torch.Tensor, torch.Tensor]]


def _calls(shape: DecodeShape, inputs: Inputs, backend: str | None, deterministic: bool) -> list[_Call]:
    """One call per page set; all share a split plan, which sparse calls have none of."""
    same: dict[str, Any] = {
        "kv_lora_rank": shape.kv_lora_rank,
        "softmax_scale": shape.softmax_scale,
        "backend": backend,
    }
    if shape.topk is not None:
        return [
            partial(sparse_decode, q, inputs.kv_cache, indices, **same)
            for q, indices in zip(inputs.q, inputs.indices, strict=True)
        ]
    options: dict[str, Any] = {"deterministic": True} if deterministic else {}
    plan = plan_splits(
        inputs.q[0],
        inputs.kv_cache,
        inputs.block_table[0],
        inputs.cache_seqlens,
        kv_lora_rank=shape.kv_lora_rank,
        backend=backend,
        **options,
    )
    return [
        partial(decode, q, inputs.kv_cache, block_table, inputs.cache_seqlens, plan=plan, **same)
        for q, block_table in zip(inputs.q, inputs.block_table, strict=True)
    ]


def calls_in_turns(num_sets: int, turn_ms: float) -> int:
    """How many turns over the page sets a graph makes; `turn_ms` is the device time of one."""
    wanted = max(math.ceil(GRAPH_CALLS / num_sets), math.ceil(GRAPH_MS / turn_ms))
    return max(1, min(wanted, int(GRAPH_MAX_MS / turn_ms)))


class CallGraph:
    """A CUDA graph of calls in order, each on a page set of its own, to be replayed in bursts.

    Args:
        calls: one per page set; they are repeated as `calls_in_turns` says.
    """

    def __init__(self, calls: Sequence[Callable[[], Any]]) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for call in calls[:2]:
                call()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        self._capture(calls)
        turns = calls_in_turns(len(calls), self.replay_ms)
        if turns > 1:
            self._capture([*calls] * turns)

    def _capture(self, calls: Sequence[Callable[[], Any]]) -> None:
        self.num_calls = len(calls)
        self.graph = _graph_of(calls)
        self.graph.replay()
        self.replay_ms = max(_timed(self.graph.replay), 1e-3)

    def burst(self, seconds: float) -> float:
        """Milliseconds per call: median replay of about `seconds` of them, queued without waiting for any."""
        replays = max(3, round(seconds * 1e3 / self.replay_ms))
        events = [torch.cuda.Event(enable_timing=True) for _ in range(replays + 1)]
        # The first replay after a pause finds an idle device and lets the host get ahead of it.
        self.graph.replay()
        events[0].record()
        for event in events[1:]:
            self.graph.replay()
            event.record()
        events[-1].synchronize()
        times: list[float] = [begin.elapsed_time(end) for begin, end in itertools.pairwise(events)]
        return statistics.median(times) / self.num_calls


def _timed(work: Callable[[], Any]) -> float:
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    work()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end))


def _graph_of(calls: Sequence[Callable[[], Any]]) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph


def in_turns(bursts: Mapping[str, Callable[[], float]], rounds: int, pause_s: float = 0.0) -> dict[str, list[float]]:
    """`rounds` figures of each, one after the other in turns, every second round backwards: a device that warms up or
    changes its clocks meanwhile does so to all of them."""
    figures: dict[str, list[float]] = {name: [] for name in bursts}
    for number in range(rounds):
        for name in list(bursts)[:: -1 if number % 2 else 1]:
            time.sleep(pause_s)
            figures[name].append(bursts[name]())
    return figures


def time_cold(calls: Sequence[Callable[[], Any]], rounds: int = 20) -> float:
    """Milliseconds of one call whose data is not in L2: median over `rounds`, each after a flush."""
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=_device())
    # A graph of its own each: a call of several launches would be timed with the host's gaps between them.
    graphs = [_graph_of([call]) for call in calls[:4]]
    times = []
    for index in range(rounds):
        # Long enough on the device for the host to have queued the call behind it.
        for _ in range(4):
            flush.zero_()
        times.append(_timed(graphs[index % len(graphs)].replay))
    return statistics.median(times)


@dataclass
class _Variant:
    """One backend on one shape, planned, compiled, perhaps checked, and captured."""

    shape: DecodeShape
    backend: str
    calls: list[_Call]
    graph: CallGraph
    error_over_plain: float | None


def _backend_of(op: str, call: Callable[[], Any]) -> tuple[Any, str]:
    """What a call returns (its first one compiles), and the backend that ran it."""
    before = backend_counts()
    returned = call()
    counts = backend_counts().items()
    return returned, next(key[1] for key, count in counts if key[0] == op and count > before.get(key, 0))


def _check(shape: DecodeShape, inputs: Inputs, out: torch.Tensor) -> float:
    same: dict[str, Any] = {"kv_lora_rank": shape.kv_lora_rank, "softmax_scale": shape.softmax_scale}
    if shape.topk is not None:
        return check_sparse_outputs(out, inputs.q[0], inputs.kv_cache, inputs.indices[0], **same)
    return check_outputs(out, inputs.q[0], inputs.kv_cache, inputs.block_table[0], shape.lengths(), **same)


def _prepare(
    shape: DecodeShape, inputs: Inputs, backend: str | None, check: bool | None, deterministic: bool
) -> _Variant:
    calls = _calls(shape, inputs, backend, deterministic)
    (out, _), ran = _backend_of("decode" if shape.topk is None else "sparse_decode", calls[0])
    error = _check(shape, inputs, out) if check or (check is None and ran == "cuda") else None
    return _Variant(shape, ran, calls, CallGraph(calls), error)


def time_shape(
    shape: DecodeShape,
    backends: Sequence[str | None] = (None,),
    dtype: torch.dtype = torch.bfloat16,
    timing: Timing | None = None,
    check: bool | None = None,
    deterministic: bool = False,
) -> tuple[list[Result], dict[str, str]]:
    """Build a shape's inputs and time backends on them in turns.

    Args:
        shape: with `fp8`, the same shape on rows of `dtype` takes part in the turns.
        backends: names; None: the first that accepts.
        timing: None: the defaults.
        check: compare a few requests with fp64 first; None: those of backend "cuda".
        deterministic: as in `plan_splits`; sparse calls have no plan.
    Returns: results in the order of `backends`, those on rows of `dtype` first; by name of shape and backend, why there
        is none: no backend accepts, memory does not suffice, or the result was wrong.
    """
    timing = timing or Timing()
    variants: dict[str, _Variant] = {}
    failed: dict[str, str] = {}
    for each in (replace(shape, fp8=False), shape) if shape.fp8 else (shape,):
        inputs = make_inputs(each, dtype, _device())
        for backend in backends:
            name = f"{each.name}, {backend or 'auto'}"
            try:
                variants[name] = _prepare(each, inputs, backend, check, deterministic)
            except (UnsupportedError, WrongResultError, torch.OutOfMemoryError) as error:
                failed[name] = str(error)

    bursts = {name: partial(variant.graph.burst, timing.burst_s) for name, variant in variants.items()}
    rounds = in_turns(bursts, timing.rounds, timing.pause_s)
    cold = {name: time_cold(variant.calls) for name, variant in variants.items() if timing.cold}
    # Last: it leaves a hot device behind.
    long = {name: partial(variant.graph.burst, timing.sustained_s) for name, variant in variants.items()}
    sustained = in_turns(long, 1, timing.pause_s) if timing.sustained_s > 0 else {}
    results = [
        Result(
            variant.shape,
            variant.backend,
            str(dtype).removeprefix("torch."),
            statistics.median(rounds[name]),
            cold.get(name),
            work_of(variant.shape, dtype.itemsize),
            tuple(rounds[name]),
            sustained[name][0] if sustained else None,
            variant.error_over_plain,
        )
        for name, variant in variants.items()
    ]
    return results, failed


def time_append(
    dtype: torch.dtype = torch.bfloat16,
    timing: Timing | None = None,
    kv_lora_rank: int = 512,
    qk_rope_head_dim: int = 64,
    block_size: int = 64,
    fp8: bool = False,
) -> AppendFigure:
    """Time `append` of APPEND_BATCH x APPEND_TOKENS new rows, in random order, to the pages of a pool.

    Args:
        dtype: of what comes, and of the pages' rows unless `fp8`.
        fp8: encode the tokens as FP8 rows while they are written.
    Raises: WrongResultError: a row did not arrive where its slot says, or not with the bytes that it must have.
    """
    timing = timing or Timing()
    device = _device()
    tokens, d_qk = APPEND_BATCH * APPEND_TOKENS, kv_lora_rank + qk_rope_head_dim
    new = torch.randn(APPEND_BATCH, APPEND_TOKENS, 1, d_qk, dtype=dtype, device=device)
    latent, k_rope = (part.contiguous() for part in new.split((kv_lora_rank, qk_rope_head_dim), dim=-1))
    rows, end = new, d_qk  # what must arrive, and up to where: padding has no content
    if fp8:
        rows, end = encode_rows(latent, k_rope), row_layout(kv_lora_rank, qk_rope_head_dim).end
    rows = rows.flatten(0, 2)
    row_size = rows.shape[-1]
    kv_cache = torch.zeros(-(-tokens // block_size), block_size, 1, row_size, dtype=rows.dtype, device=device)
    slots = torch.randperm(tokens, device=device).view(APPEND_BATCH, APPEND_TOKENS)
    _, ran = _backend_of("append", lambda: append(kv_cache, latent, k_rope, slots))
    if not torch.equal(kv_cache.view(-1, row_size)[slots.flatten(), :end], rows[:, :end]):
        raise WrongResultError("append: a row of the pool is not the one that was sent to its slot")
    graph = CallGraph([lambda: append(kv_cache, latent, k_rope, slots)])
    rounds = in_turns({"append": partial(graph.burst, timing.burst_s)}, timing.rounds, timing.pause_s)
    token_bytes, row_bytes = d_qk * dtype.itemsize, row_size * rows.itemsize
    return AppendFigure(ran, tokens, token_bytes, row_bytes, statistics.median(rounds["append"]))


def measure_ceilings(timing: Timing | None = None) -> Ceilings:
    """Copy and read bandwidth (bytes moved over time), a large bf16 matrix product, an almost empty graph node."""
    timing = timing or Timing()
    device = _device()
    source = torch.empty(2**29, dtype=torch.int32, device=device).random_()
    target = torch.empty_like(source)
    rows = source.view(2**14, 2**15).view(torch.float32)
    size = 8192
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    one = torch.zeros(1, device=device)
    # Two ways to copy and to read: the driver's and a kernel's, by rows and as a whole. The faster counts.
    graphs = {
        "copy by driver": CallGraph([lambda: target.copy_(source)]),
        "copy by kernel": CallGraph([lambda: torch.bitwise_not(source, out=target)]),
        "read rows": CallGraph([lambda: rows.sum(1)]),
        "read all": CallGraph([lambda: source.sum(dtype=torch.int32)]),
        "matmul": CallGraph([lambda: a @ b]),
        "node": CallGraph([one.zero_] * 256),
    }
    bursts = {name: partial(graph.burst, timing.burst_s) for name, graph in graphs.items()}
    rounds = in_turns(bursts, timing.rounds, timing.pause_s)
    ms = {name: statistics.median(figures) for name, figures in rounds.items()}
    num_bytes = source.numel() * source.itemsize
    return Ceilings(
        copy_TBps=round(2 * num_bytes / min(ms["copy by driver"], ms["copy by kernel"]) / 1e9, 3),
        read_TBps=round(num_bytes / min(ms["read rows"], ms["read all"]) / 1e9, 3),
        matmul_bf16_TFLOPs=round(2 * size**3 / ms["matmul"] / 1e9, 1),
        graph_node_us=round(ms["node"] * 1e3, 3),
    )
