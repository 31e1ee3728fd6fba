"""What was measured of decode calls, set against ceilings and against others' kernels.

Plain arithmetic: nothing here touches a device. Times are milliseconds.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from .decode_shapes import CLASSES, SPARSE_SEQLEN_K, DecodeShape, Work, class_of

__all__ = [
    "FLAGGED",
    "Anchor",
    "Anchors",
    "AppendFigure",
    "Ceilings",
    "Result",
    "compare",
    "geometric_mean",
    "read_anchors",
    "series_of",
    "spread",
    "summarize",
]

# A shape that takes this many times the best anchor is marked in the table.
FLAGGED = 1.05


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
    """What writing new tokens into their pages takes: each row is read once and written once, at a slot of its own.

    Attributes:
        token_bytes: read per token: latent and rotated key.
        row_bytes: written per token: the same in the pages' format.
    """

    backend: str
    tokens: int
    token_bytes: int
    row_bytes: int
    ms: float

    @property
    def TBps(self) -> float:
        """Bytes read and written over time, as a copy's are counted."""
        return self.tokens * (self.token_bytes + self.row_bytes) / self.ms / 1e9


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
    """What others need for a shape: milliseconds by name of the implementation, in a graph and of single cold calls."""

    floor_ms: float
    graph_ms: dict[str, float]
    cold_ms: dict[str, float]

    @property
    def is_cold(self) -> bool:
        """Whether only single calls after an L2 flush were measured."""
        return not self.graph_ms

    @property
    def best(self) -> tuple[str, float]:
        """The fastest of them in a graph; where none was measured in one, of cold calls."""
        times = self.graph_ms or self.cold_ms
        name = min(times, key=times.__getitem__)
        return name, times[name]


@dataclass(frozen=True)
class Anchors:
    """Anchors by shape (of sparse ones: at SPARSE_SEQLEN_K), and what their device did at best."""

    by_shape: dict[DecodeShape, Anchor]
    ceilings: Ceilings | None

    def of(self, shape: DecodeShape) -> Anchor | None:
        """The anchor of a shape. They are all of latents 512 + 64, whatever the page size, and if sparse whatever the
        length of the requests."""
        seqlen_k = shape.seqlen_k if shape.topk is None else max(SPARSE_SEQLEN_K, shape.topk)
        return self.by_shape.get(replace(shape, block_size=DecodeShape.block_size, seqlen_k=seqlen_k))


def read_anchors(path: str | Path) -> Anchors:
    """Anchors of a JSON file.

    A row has `batch`, `seqlen_q`, `seqlen_k`, `num_heads`, `varlen`, `floor_ms` and by peer `graph_ms`, `cold_ms` or
    both; of FP8 rows `fp8`, and of sparse calls `topk` in place of `seqlen_k`.
    """
    content = json.loads(Path(path).read_text())
    by_shape = {}
    for row in content["shapes"]:
        topk = row.get("topk")
        shape = DecodeShape(
            row["batch"],
            row["seqlen_q"],
            row["seqlen_k"] if topk is None else SPARSE_SEQLEN_K,
            row["num_heads"],
            row["varlen"],
            fp8=row.get("fp8", False),
            topk=topk,
        )
        graph_ms, cold_ms = (
            {name: times[key] for name, times in row["peers"].items() if key in times}
            for key in ("graph_ms", "cold_ms")
        )
        by_shape[shape] = Anchor(row["floor_ms"], graph_ms, cold_ms)
    found = content.get("ceilings")
    ceilings = found and Ceilings(
        found["copy_TBps"], found["read_TBps"], found["matmul_8192_bf16_TFLOPs"], found["graph_node_us"]
    )
    return Anchors(by_shape, ceilings)


def _unencoded(result: Result, results: Sequence[Result]) -> Result | None:
    """What FP8 rows are set against: the same call on rows of the dtype, by the same backend or else the fastest."""
    twin = replace(result.shape, fp8=False)
    found = [other for other in results if (other.shape, other.dtype) == (twin, result.dtype)]
    same = [other for other in found if other.backend == result.backend]
    return min(same or found, key=lambda other: other.graph_ms, default=None)


def compare(
    results: Sequence[Result], anchors: Anchors | None = None, ceilings: Ceilings | None = None
) -> list[dict[str, Any]]:
    """Each result as plain values, with the fastest anchor of its shape and the anchors' Triton kernel.

    `over_best` is time over time; `best_anchor_is_cold` says that both are of single calls after an L2 flush.
    `over_best_scaled` is the same of the products with the ceilings of either run; it is there only if both are known.
    Of FP8 rows, `over_unencoded` is the time over that of the same call on rows of the dtype, which `unencoded_backend`
    ran in `unencoded_ms`.
    """
    rows = []
    for result in results:
        row = result.as_dict()
        bound = result.work.bound
        if ceilings is not None:
            row["product"] = round(ceilings.product(result.graph_ms, bound), 4)
        beside = _unencoded(result, results) if result.shape.fp8 else None
        if beside is not None:
            row |= {
                "unencoded_backend": beside.backend,
                "unencoded_ms": round(beside.graph_ms, 5),
                "over_unencoded": round(result.graph_ms / beside.graph_ms, 3),
            }
        anchor = None if anchors is None else anchors.of(result.shape)
        ours = result.cold_ms if anchor is not None and anchor.is_cold else result.graph_ms
        if anchors is not None and anchor is not None and ours is not None:
            name, best_ms = anchor.best
            row |= {
                "best_anchor": name,
                "best_anchor_ms": best_ms,
                "best_anchor_is_cold": anchor.is_cold,
                "best_anchor_over_floor": round(best_ms / result.work.floor_ms, 3),
                "over_best": round(ours / best_ms, 3),
                "anchor_triton_ms": anchor.graph_ms.get("triton"),
            }
            if ceilings is not None and anchors.ceilings is not None:
                theirs = anchors.ceilings.product(best_ms, bound)
                row["best_anchor_product"] = round(theirs, 4)
                row["over_best_scaled"] = round(ceilings.product(ours, bound) / theirs, 3)
        rows.append(row)
    return rows


def series_of(row: dict[str, Any]) -> str:
    """Backend of a row and its format: what may stand in one mean."""
    return f"{row['backend']}{' fp8' * row.get('fp8', False)}"


def geometric_mean(figures: Iterable[float]) -> float | None:
    """Geometric mean, None of nothing."""
    logs = [math.log(figure) for figure in figures]
    return math.exp(statistics.fmean(logs)) if logs else None


def summarize(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Geometric means by class and backend, and over all classes, of rows from `compare`; FP8 rows are a backend "...
    fp8" of their own.

    Keys: class, backend, shapes (their number), over_floor; over_unencoded over those with such a figure; and over
    those of them that have an anchor: anchored (their number), best_anchor_over_floor, over_best, over_best_scaled.
    """
    summary = []
    backends = list(dict.fromkeys(map(series_of, rows)))
    for name in (*CLASSES, "all"):
        for backend in backends:
            chosen = [
                row
                for row in rows
                if series_of(row) == backend
                and name in ("all", class_of(row["batch"], row["seqlen_q"], row["num_heads"], row["topk"]))
            ]
            if not chosen:
                continue
            entry: dict[str, Any] = {"class": name, "backend": backend, "shapes": len(chosen)}
            entry["anchored"] = sum("over_best" in row for row in chosen)
            for key in ("over_floor", "over_unencoded", "best_anchor_over_floor", "over_best", "over_best_scaled"):
                mean = geometric_mean(row[key] for row in chosen if key in row)
                entry[key] = None if mean is None else round(mean, 3)
            summary.append(entry)
    return summary
