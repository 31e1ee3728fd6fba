"""How long decode takes by shape, and how long it would take at the speed of the memory or of the tensor cores.

A GPU only: on anything else a time says nothing about the kernel. Times are device times of whole calls (decode and
its merge; the split plan is made once outside, as in a model with many layers), in milliseconds; bytes and FLOP are
what the definition needs, each latent read once.
"""

from __future__ import annotations

import json
import math
import random
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ..contract import UnsupportedError
from ..ops import SplitPlan, decode, plan_splits

__all__ = [
    "SHAPES",
    "Anchor",
    "Ceilings",
    "DecodeShape",
    "Inputs",
    "Result",
    "Work",
    "compare",
    "geometric_mean",
    "make_inputs",
    "measure_ceilings",
    "read_anchors",
    "time_cold",
    "time_graph",
    "time_shape",
    "work_of",
]

# Bytes that the rotating page sets hold together at least: four times the L2 of an H200 (60 MB).
ROTATION_BYTES = 240 * 10**6
# Bytes written between two cold calls; four times the same L2.
FLUSH_BYTES = 240 * 10**6
# What the floor divides by unless told otherwise: an H200's copy bandwidth and matrix rate, as the anchors' floors do.
FLOOR_BYTES_PER_S = 4.3e12
FLOOR_FLOP_PER_S = 790e12


@dataclass(frozen=True)
class DecodeShape:
    """One decode call: `batch` requests of about `seqlen_k` cached tokens, causal when `seqlen_q` > 1."""

    batch: int
    seqlen_q: int
    seqlen_k: int
    num_heads: int
    varlen: bool = False
    kv_lora_rank: int = 512
    qk_rope_head_dim: int = 64
    block_size: int = 64

    @property
    def name(self) -> str:
        """Short and unique among the shapes of one table."""
        suffix = " varlen" if self.varlen else ""
        return f"b{self.batch} q{self.seqlen_q} k{self.seqlen_k} h{self.num_heads}{suffix}"

    def lengths(self) -> list[int]:
        """Tokens per request; varlen: normal around `seqlen_k`, half of it as deviation, seeded by shape."""
        if not self.varlen:
            return [self.seqlen_k] * self.batch
        draw = random.Random(self.batch * 131 + self.seqlen_q * 17 + self.seqlen_k + self.num_heads)
        return [
            int(max(draw.normalvariate(self.seqlen_k, self.seqlen_k / 2), self.seqlen_q)) for _ in range(self.batch)
        ]


# From one short request (latency) to what fills the device for milliseconds: bound by memory, and by the tensor cores.
SHAPES = (
    DecodeShape(1, 1, 4096, 16),
    DecodeShape(1, 1, 65536, 16),
    DecodeShape(1, 1, 65536, 128),
    DecodeShape(4, 1, 16384, 128),
    DecodeShape(16, 1, 4096, 16),
    DecodeShape(32, 1, 8192, 32),
    DecodeShape(64, 1, 32768, 16),
    DecodeShape(128, 1, 1024, 128),
    DecodeShape(128, 1, 4096, 128, varlen=True),
    DecodeShape(128, 1, 32768, 128),
    DecodeShape(128, 2, 4096, 128, varlen=True),
    DecodeShape(132, 1, 4096, 64),
    DecodeShape(132, 1, 16384, 128),
    DecodeShape(256, 1, 4096, 32),
)


@dataclass(frozen=True)
class Work:
    """What one call must move and compute.

    Attributes:
        bytes: latents, queries and outputs once each.
        flop: 2 per multiply-add of the attended (query, key) pairs, d_qk for the score and kv_lora_rank for the value.
        floor_ms: the longer of the two at the speed of the device.
    """

    bytes: int
    flop: int
    floor_ms: float

    @property
    def bound(self) -> str:
        """Which of the two the floor is made of."""
        return "mem" if math.isclose(self.floor_ms, self.bytes / FLOOR_BYTES_PER_S * 1e3) else "flop"


@dataclass(frozen=True)
class Inputs:
    """A shape's tensors: several page sets in one pool, each with queries of its own, and one plan for all."""

    q: list[torch.Tensor]
    kv_cache: torch.Tensor
    block_table: list[torch.Tensor]
    cache_seqlens: torch.Tensor
    plan: SplitPlan


@dataclass(frozen=True)
class Ceilings:
    """What this device does at best, measured beside the kernels."""

    copy_TBps: float
    read_TBps: float
    matmul_bf16_TFLOPs: float
    graph_node_us: float


@dataclass(frozen=True)
class Result:
    """One measured shape."""

    shape: DecodeShape
    backend: str
    dtype: str
    graph_ms: float
    cold_ms: float | None
    work: Work

    @property
    def gigabytes_per_s(self) -> float:
        """Rate at which the needed bytes went by."""
        return self.work.bytes / self.graph_ms / 1e6

    @property
    def teraflop_per_s(self) -> float:
        """Rate at which the needed FLOP went by."""
        return self.work.flop / self.graph_ms / 1e9

    @property
    def over_floor(self) -> float:
        """Time over the floor; 1.0 cannot be beaten."""
        return self.graph_ms / self.work.floor_ms

    def as_dict(self) -> dict[str, Any]:
        """Plain values for a JSON file."""
        return {
            **asdict(self.shape),
            "backend": self.backend,
            "dtype": self.dtype,
            "graph_ms": round(self.graph_ms, 5),
            "cold_ms": None if self.cold_ms is None else round(self.cold_ms, 5),
            "GBps": round(self.gigabytes_per_s, 1),
            "TFLOPs": round(self.teraflop_per_s, 1),
            "floor_ms": round(self.work.floor_ms, 5),
            "bound": self.work.bound,
            "over_floor": round(self.over_floor, 3),
        }


@dataclass(frozen=True)
class Anchor:
    """What others need for a shape: milliseconds by name of the implementation."""

    floor_ms: float
    graph_ms: dict[str, float]

    @property
    def best(self) -> tuple[str, float]:
        """The fastest of them."""
        name = min(self.graph_ms, key=self.graph_ms.__getitem__)
        return name, self.graph_ms[name]


def work_of(
    shape: DecodeShape,
    itemsize: int = 2,
    bytes_per_s: float = FLOOR_BYTES_PER_S,
    flop_per_s: float = FLOOR_FLOP_PER_S,
) -> Work:
    """Bytes, FLOP and floor of one call; `itemsize` is that of the dtype, in bytes."""
    lengths = shape.lengths()
    d_qk = shape.kv_lora_rank + shape.qk_rope_head_dim
    rows = shape.batch * shape.seqlen_q * shape.num_heads
    num_bytes = (sum(lengths) * d_qk + rows * (d_qk + shape.kv_lora_rank)) * itemsize
    # Query j of seqlen_q sees `length - (seqlen_q - 1 - j)` keys.
    pairs = sum(max(length - late, 0) for length in lengths for late in range(shape.seqlen_q))
    flop = pairs * shape.num_heads * 2 * (d_qk + shape.kv_lora_rank)
    return Work(num_bytes, flop, max(num_bytes / bytes_per_s, flop / flop_per_s) * 1e3)


def _device() -> torch.device:
    if not torch.cuda.is_available():
        raise UnsupportedError("flash_mla.bench: measures a GPU, and torch sees none here")
    return torch.device("cuda", torch.cuda.current_device())


def make_inputs(
    shape: DecodeShape, dtype: torch.dtype = torch.bfloat16, backend: str | None = None, seed: int = 0
) -> Inputs:
    """Random queries and pages of a shape, in as many page sets as it takes to be out of L2 each time."""
    device = _device()
    generator = torch.Generator(device=device).manual_seed(seed)
    lengths = shape.lengths()
    d_qk = shape.kv_lora_rank + shape.qk_rope_head_dim
    pages = [-(-length // shape.block_size) for length in lengths]
    set_bytes = sum(pages) * shape.block_size * d_qk * dtype.itemsize
    num_sets = max(2, -(-ROTATION_BYTES // set_bytes))
    num_blocks = num_sets * sum(pages)
    kv_cache = torch.empty((num_blocks, shape.block_size, 1, d_qk), dtype=dtype, device=device)
    kv_cache.normal_(generator=generator)
    order = torch.randperm(num_blocks, generator=generator, device=device).to(torch.int32)
    begins = [0]
    for count in pages:
        begins.append(begins[-1] + count)
    tables, queries = [], []
    for index in range(num_sets):
        own = order[index * sum(pages) : (index + 1) * sum(pages)]
        table = torch.zeros((shape.batch, max(pages)), dtype=torch.int32, device=device)
        for request, count in enumerate(pages):
            table[request, :count] = own[begins[request] : begins[request] + count]
        tables.append(table)
        q = torch.empty((shape.batch, shape.seqlen_q, shape.num_heads, d_qk), dtype=dtype, device=device)
        queries.append(q.normal_(generator=generator))
    cache_seqlens = torch.tensor(lengths, dtype=torch.int32, device=device)
    plan = plan_splits(queries[0], kv_cache, tables[0], cache_seqlens, kv_lora_rank=shape.kv_lora_rank, backend=backend)
    return Inputs(queries, kv_cache, tables, cache_seqlens, plan)


def _calls(shape: DecodeShape, inputs: Inputs, backend: str | None) -> list[Callable[[], Any]]:
    softmax_scale = (shape.kv_lora_rank // 4 + shape.qk_rope_head_dim) ** -0.5

    def call(index: int) -> Callable[[], Any]:
        return lambda: decode(
            inputs.q[index],
            inputs.kv_cache,
            inputs.block_table[index],
            inputs.cache_seqlens,
            kv_lora_rank=shape.kv_lora_rank,
            softmax_scale=softmax_scale,
            plan=inputs.plan,
            backend=backend,
        )

    return [call(index) for index in range(len(inputs.q))]


def time_graph(calls: list[Callable[[], Any]], seconds: float = 0.3) -> float:
    """Milliseconds per call: median replay of a CUDA graph that makes all the calls, over their number.

    Args:
        calls: one per page set; they are repeated until a graph holds 8 or more.
        seconds: device time to spend, roughly.
    """
    calls = calls * -(-8 // len(calls)) if len(calls) < 8 else calls
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls[:2]:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = _graph_of(calls)
    graph.replay()
    first = _timed(graph.replay)
    times = [_timed(graph.replay) for _ in range(max(7, min(200, int(seconds * 1e3 / max(first, 1e-3)))))]
    return statistics.median(times) / len(calls)


def _timed(work: Callable[[], Any]) -> float:
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    work()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end))


def _graph_of(calls: list[Callable[[], Any]]) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph


def time_cold(calls: list[Callable[[], Any]], rounds: int = 20) -> float:
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


def time_shape(
    shape: DecodeShape,
    dtype: torch.dtype = torch.bfloat16,
    backend: str | None = "triton",
    cold: bool = True,
    seconds: float = 0.3,
) -> Result:
    """Build a shape's inputs and time it, in a graph and cold."""
    inputs = make_inputs(shape, dtype, backend)
    calls = _calls(shape, inputs, backend)
    calls[0]()  # compiles
    graph_ms = time_graph(calls, seconds)
    cold_ms = time_cold(calls) if cold else None
    work = work_of(shape, dtype.itemsize)
    return Result(shape, backend or "auto", str(dtype).removeprefix("torch."), graph_ms, cold_ms, work)


def measure_ceilings() -> Ceilings:
    """Copy and read bandwidth (bytes moved over time), a large bf16 matrix product, an almost empty graph node."""
    device = _device()
    source = torch.empty(2**29, dtype=torch.int32, device=device).random_()
    target = torch.empty_like(source)
    # The faster of the driver's copy and a kernel's; each short, because a hot device lowers its clocks.
    copies = [lambda: target.copy_(source), lambda: torch.bitwise_not(source, out=target)]
    copy_ms = min(time_graph([copy], 0.05) for copy in copies)
    rows = source.view(2**14, 2**15).view(torch.float32)
    read_ms = min(time_graph([read], 0.05) for read in (lambda: rows.sum(1), lambda: source.sum(dtype=torch.int32)))
    size = 8192
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    matmul_ms = time_graph([lambda: a @ b], 0.05)
    dot = torch.zeros(1, device=device)
    node_ms = time_graph([dot.zero_] * 256)
    num_bytes = source.numel() * source.itemsize
    return Ceilings(
        copy_TBps=round(2 * num_bytes / copy_ms / 1e9, 3),
        read_TBps=round(num_bytes / read_ms / 1e9, 3),
        matmul_bf16_TFLOPs=round(2 * size**3 / matmul_ms / 1e9, 1),
        graph_node_us=round(node_ms * 1e3, 3),
    )


def read_anchors(path: str | Path) -> dict[tuple[int, int, int, int, bool], Anchor]:
    """Anchors of a JSON file by (batch, seqlen_q, seqlen_k, num_heads, varlen)."""
    content = json.loads(Path(path).read_text())
    return {
        (row["batch"], row["seqlen_q"], row["seqlen_k"], row["num_heads"], row["varlen"]): Anchor(
            row["floor_ms"], {name: times["graph_ms"] for name, times in row["peers"].items()}
        )
        for row in content["shapes"]
    }


def compare(results: list[Result], anchors: dict[tuple[int, int, int, int, bool], Anchor]) -> list[dict[str, Any]]:
    """Each result as plain values, with the fastest anchor of its shape and the anchors' Triton kernel."""
    rows = []
    for result in results:
        shape = result.shape
        row = result.as_dict()
        anchor = anchors.get((shape.batch, shape.seqlen_q, shape.seqlen_k, shape.num_heads, shape.varlen))
        if anchor is not None:
            name, best_ms = anchor.best
            row |= {"best_anchor": name, "best_anchor_ms": best_ms, "over_best": round(result.graph_ms / best_ms, 3)}
            row["anchor_triton_ms"] = anchor.graph_ms.get("triton")
        rows.append(row)
    return rows


def geometric_mean(results: list[Result]) -> float:
    """Geometric mean of time over floor."""
    return math.exp(statistics.fmean(math.log(result.over_floor) for result in results))
