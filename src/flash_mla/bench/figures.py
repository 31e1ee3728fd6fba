"""What a decode call must do, what was measured of it, and both set against ceilings and against others' kernels.

Plain arithmetic: nothing here touches a device. Times are milliseconds; bytes and FLOP are what the definition needs,
each latent read once.
"""

from __future__ import annotations

import json
import math
import random
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

__all__ = [
    "CLASSES",
    "FLAGGED",
    "SHAPES",
    "Anchor",
    "Anchors",
    "AppendFigure",
    "Ceilings",
    "DecodeShape",
    "Result",
    "Work",
    "class_of",
    "compare",
    "geometric_mean",
    "read_anchors",
    "spread",
    "summarize",
    "work_of",
]

# What the floor divides by unless told otherwise: an H200's copy bandwidth and matrix rate, as the anchors' floors do.
FLOOR_BYTES_PER_S = 4.3e12
FLOOR_FLOP_PER_S = 790e12

# A shape that takes this many times the best anchor is marked in the table.
FLAGGED = 1.05


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

    @property
    def d_qk(self) -> int:
        """Columns of a latent row."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def softmax_scale(self) -> float:
        """That of a model whose `qk_nope_head_dim` is a quarter of the latent, as in DeepSeek-V2 and V3."""
        return 1 / math.sqrt(self.kv_lora_rank // 4 + self.qk_rope_head_dim)

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

CLASSES = ("batch <= 4", "memory-bound, 16-64 rows", "compute-bound, >= 128 rows", "other")


def class_of(batch: int, seqlen_q: int, num_heads: int) -> str:
    """Which of `CLASSES` a shape belongs to, by its requests and its query rows per request."""
    rows = seqlen_q * num_heads
    if batch <= 4:
        return CLASSES[0]
    if 16 <= rows <= 64:
        return CLASSES[1]
    return CLASSES[2] if rows >= 128 else CLASSES[3]


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


def work_of(
    shape: DecodeShape,
    itemsize: int = 2,
    bytes_per_s: float = FLOOR_BYTES_PER_S,
    flop_per_s: float = FLOOR_FLOP_PER_S,
) -> Work:
    """Bytes, FLOP and floor of one call; `itemsize` is that of the dtype, in bytes."""
    lengths = shape.lengths()
    rows = shape.batch * shape.seqlen_q * shape.num_heads
    num_bytes = (sum(lengths) * shape.d_qk + rows * (shape.d_qk + shape.kv_lora_rank)) * itemsize
    # Query j of seqlen_q sees `length - (seqlen_q - 1 - j)` keys.
    pairs = sum(max(length - late, 0) for length in lengths for late in range(shape.seqlen_q))
    flop = pairs * shape.num_heads * 2 * (shape.d_qk + shape.kv_lora_rank)
    return Work(num_bytes, flop, max(num_bytes / bytes_per_s, flop / flop_per_s) * 1e3)


@dataclass(frozen=True)
class Ceilings:
    """What a device does at best, measured beside the kernels."""

    copy_TBps: float
    read_TBps: float
    matmul_bf16_TFLOPs: float
    graph_node_us: float

    def product(self, ms: float, bound: str) -> float:
        """Time x the ceiling that bounds it: GB for "mem", GFLOP for "flop". Of runs on two devices, or on one that
        was hot and cool, the products compare."""
        return ms * (self.read_TBps if bound == "mem" else self.matmul_bf16_TFLOPs)


@dataclass(frozen=True)
class AppendFigure:
    """What writing new tokens into their pages takes: each row is read once and written once, at a slot of its own."""

    backend: str
    tokens: int
    row_bytes: int
    ms: float

    @property
    def TBps(self) -> float:
        """Bytes read and written over time, as a copy's are counted."""
        return 2 * self.tokens * self.row_bytes / self.ms / 1e9


def spread(figures: Sequence[float]) -> float:
    """Largest minus smallest, over the median."""
    return (max(figures) - min(figures)) / statistics.median(figures)


@dataclass(frozen=True)
class Result:
    """One measured shape of one backend.

    Attributes:
        graph_ms: per call, in a CUDA graph: the median of `round_ms`.
        cold_ms: of a single call after an L2 flush.
        round_ms: the median of each burst.
        sustained_ms: per call in one long burst.
        error_over_plain: distance from fp64, over that of plain torch in the same dtype; None: not checked.
    """

    shape: DecodeShape
    backend: str
    dtype: str
    graph_ms: float
    cold_ms: float | None
    work: Work
    round_ms: tuple[float, ...] = ()
    sustained_ms: float | None = None
    error_over_plain: float | None = None

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
            "spread": round(spread(self.round_ms), 4) if self.round_ms else None,
            "round_ms": [round(ms, 5) for ms in self.round_ms],
            "sustained_ms": None if self.sustained_ms is None else round(self.sustained_ms, 5),
            "cold_ms": None if self.cold_ms is None else round(self.cold_ms, 5),
            "GBps": round(self.gigabytes_per_s, 1),
            "TFLOPs": round(self.teraflop_per_s, 1),
            "flop_per_byte": round(self.work.flop / self.work.bytes, 2),
            "floor_ms": round(self.work.floor_ms, 5),
            "bound": self.work.bound,
            "over_floor": round(self.over_floor, 3),
            "percent_of_floor": round(100 / self.over_floor, 1),
            "error_over_plain": None if self.error_over_plain is None else round(self.error_over_plain, 3),
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


ShapeKey = tuple[int, int, int, int, bool]


@dataclass(frozen=True)
class Anchors:
    """Anchors by (batch, seqlen_q, seqlen_k, num_heads, varlen), and what their device did at best."""

    by_shape: dict[ShapeKey, Anchor]
    ceilings: Ceilings | None

    def of(self, shape: DecodeShape) -> Anchor | None:
        """The anchor of a shape. They are all of latents 512 + 64, whatever the page size."""
        if (shape.kv_lora_rank, shape.qk_rope_head_dim) != (512, 64):
            return None
        return self.by_shape.get((shape.batch, shape.seqlen_q, shape.seqlen_k, shape.num_heads, shape.varlen))


def read_anchors(path: str | Path) -> Anchors:
    """Anchors of a JSON file."""
    content = json.loads(Path(path).read_text())
    by_shape = {
        (row["batch"], row["seqlen_q"], row["seqlen_k"], row["num_heads"], row["varlen"]): Anchor(
            row["floor_ms"], {name: times["graph_ms"] for name, times in row["peers"].items()}
        )
        for row in content["shapes"]
    }
    found = content.get("ceilings")
    ceilings = found and Ceilings(
        found["copy_TBps"], found["read_TBps"], found["matmul_8192_bf16_TFLOPs"], found["graph_node_us"]
    )
    return Anchors(by_shape, ceilings)


def compare(
    results: Iterable[Result], anchors: Anchors | None = None, ceilings: Ceilings | None = None
) -> list[dict[str, Any]]:
    """Each result as plain values, with the fastest anchor of its shape and the anchors' Triton kernel.

    `over_best` is time over time. `over_best_scaled` is the same of the products with the ceilings of either run; it is
    there only if both are known.
    """
    rows = []
    for result in results:
        row = result.as_dict()
        bound = result.work.bound
        if ceilings is not None:
            row["product"] = round(ceilings.product(result.graph_ms, bound), 4)
        anchor = None if anchors is None else anchors.of(result.shape)
        if anchors is not None and anchor is not None:
            name, best_ms = anchor.best
            row |= {
                "best_anchor": name,
                "best_anchor_ms": best_ms,
                "best_anchor_over_floor": round(best_ms / result.work.floor_ms, 3),
                "over_best": round(result.graph_ms / best_ms, 3),
                "anchor_triton_ms": anchor.graph_ms.get("triton"),
            }
            if ceilings is not None and anchors.ceilings is not None:
                theirs = anchors.ceilings.product(best_ms, bound)
                row["best_anchor_product"] = round(theirs, 4)
                row["over_best_scaled"] = round(ceilings.product(result.graph_ms, bound) / theirs, 3)
        rows.append(row)
    return rows


def geometric_mean(figures: Iterable[float]) -> float | None:
    """Geometric mean, None of nothing."""
    logs = [math.log(figure) for figure in figures]
    return math.exp(statistics.fmean(logs)) if logs else None


def summarize(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Geometric means by class and backend, and over all classes, of rows from `compare`.

    Keys: class, backend, shapes (their number), over_floor; and over those of them that have an anchor: anchored (their
    number), best_anchor_over_floor, over_best, over_best_scaled.
    """
    summary = []
    backends = list(dict.fromkeys(row["backend"] for row in rows))
    for name in (*CLASSES, "all"):
        for backend in backends:
            chosen = [
                row
                for row in rows
                if row["backend"] == backend
                and name in ("all", class_of(row["batch"], row["seqlen_q"], row["num_heads"]))
            ]
            if not chosen:
                continue
            entry: dict[str, Any] = {"class": name, "backend": backend, "shapes": len(chosen)}
            entry["anchored"] = sum("over_best" in row for row in chosen)
            for key in ("over_floor", "best_anchor_over_floor", "over_best", "over_best_scaled"):
                mean = geometric_mean(row[key] for row in chosen if key in row)
                entry[key] = None if mean is None else round(mean, 3)
            summary.append(entry)
    return summary
