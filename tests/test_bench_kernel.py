"""`flash-mla bench kernel`: its arithmetic and its command on any machine, its clocks on a GPU."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cases import needs_gpu
from typer.testing import CliRunner

from flash_mla import ops
from flash_mla.bench import check, decode_inputs, figures, roofline
from flash_mla.bench import kernel as bench_kernel
from flash_mla.bench.check import WrongResultError
from flash_mla.bench.decode_shapes import (
    CLASSES,
    FP8_SHAPES,
    SHAPES,
    SPARSE_SEQLEN_K,
    DecodeShape,
    class_of,
    name_of,
    sparse_shapes,
    work_of,
)
from flash_mla.bench.figures import Anchor, AppendFigure, Ceilings, Result, compare, read_anchors
from flash_mla.cli import bench_commands, tables
from flash_mla.cli.app import app
from flash_mla.codec import decode_rows, encode_rows, row_layout
from flash_mla.contract import UnsupportedError

ROOT = Path(__file__).resolve().parents[1]
ANCHORS = ROOT / "benchmarks" / "anchors" / "h200_mla_decode.json"
FP8_ANCHORS = ROOT / "benchmarks" / "anchors" / "h200_mla_fp8_sparse.json"
CEILINGS = Ceilings(copy_TBps=4.0, read_TBps=4.0, matmul_bf16_TFLOPs=700.0, graph_node_us=1.0)


def run(*arguments: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, ["bench", "kernel", *(str(argument) for argument in arguments)])
    assert result.exit_code == code, result.output + str(result.exception)
    return result.output


def result(shape: DecodeShape, factor: float = 2.0, backend: str = "triton") -> Result:
    """A shape that takes `factor` times its floor."""
    work = work_of(shape)
    ms = factor * work.floor_ms
    return Result(shape, backend, "bfloat16", ms, None, work, (ms, ms))


# --- figures ----------------------------------------------------------------------------------------------------------


def test_work_counts_each_latent_once_and_causal_pairs() -> None:
    shape = DecodeShape(3, 2, 100, 16)
    work = work_of(shape)
    assert work.bytes == (3 * 100 * 576 + 3 * 2 * 16 * (576 + 512)) * 2
    assert work.flop == 3 * (100 + 99) * 16 * 2 * (576 + 512)
    assert work_of(shape, itemsize=4).bytes == 2 * work.bytes


def test_names_say_what_the_rows_are() -> None:
    dense, sparse = DecodeShape(64, 1, 4096, 128, fp8=True), DecodeShape(128, 2, 8192, 128, topk=2048)
    assert dense.name == "b64 q1 k4096 h128 fp8"
    assert sparse.name == "b128 q2 k8192 top2048 h128"
    assert dataclasses.replace(sparse, fp8=True).name == "b128 q2 k8192 top2048 h128 fp8"
    assert DecodeShape(2, 1, 100, 16, varlen=True, fp8=True).name == "b2 q1 k100 h16 varlen fp8"
    # A row of an earlier version's report.
    assert name_of({"batch": 1, "seqlen_q": 2, "seqlen_k": 3, "num_heads": 4, "varlen": True}) == "b1 q2 k3 h4 varlen"


def test_fp8_rows_have_fewer_bytes_and_the_same_flop() -> None:
    shape = DecodeShape(64, 1, 32768, 16, fp8=True)
    work, unencoded = work_of(shape), work_of(dataclasses.replace(shape, fp8=False))
    assert work.bytes == 64 * 32768 * 656 + 64 * 16 * (576 + 512) * 2
    assert work.flop == unencoded.flop
    assert work.floor_ms == pytest.approx(work.bytes / 4.3e12 * 1e3)
    assert work.floor_ms / unencoded.floor_ms == pytest.approx(656 / 1152, rel=1e-3)
    # At 128 heads arithmetic decides, and it is that of bf16 either way.
    heads = dataclasses.replace(shape, num_heads=128)
    assert work_of(heads).bound == "flop"
    assert work_of(heads).floor_ms == work_of(dataclasses.replace(heads, fp8=False)).floor_ms
    # Padded rows, and queries of another size: rows stay what they are.
    small = DecodeShape(2, 3, 100, 5, kv_lora_rank=256, qk_rope_head_dim=64, fp8=True)
    assert work_of(small, itemsize=4).bytes == 2 * 100 * 400 + 2 * 3 * 5 * (320 + 256) * 4


def test_sparse_work_is_of_the_named_rows_whatever_the_length() -> None:
    shape = DecodeShape(3, 2, 8192, 16, topk=2048)
    work = work_of(shape)
    assert work.bytes == 3 * 2 * 2048 * (1152 + 4) + 3 * 2 * 16 * (576 + 512) * 2
    assert work.flop == 3 * 2 * 2048 * 16 * 2 * (576 + 512)
    assert work_of(dataclasses.replace(shape, seqlen_k=65536)) == work
    encoded = work_of(dataclasses.replace(shape, fp8=True))
    assert work.bytes - encoded.bytes == 3 * 2 * 2048 * (1152 - 656)
    assert encoded.flop == work.flop


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"topk": 101}, r"topk must be in 1\.\.seqlen_k=100, got 101"),
        ({"topk": 0}, r"topk must be in 1\.\.seqlen_k=100, got 0"),
        ({"topk": 10, "varlen": True}, "topk must come without varlen .*, got topk=10"),
        ({"fp8": True, "kv_lora_rank": 192}, "kv_lora_rank that 128 divides, got 192"),
    ],
)
def test_shapes_that_cannot_be_are_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DecodeShape(2, 1, 100, 16, **fields)


def test_lists_of_fp8_and_sparse_shapes() -> None:
    assert {shape.num_heads for shape in FP8_SHAPES} == {16, 32}
    lengths = [(1, 4096), (1, 65536), (16, 4096), (64, 4096), (64, 32768), (256, 1024)]
    assert [(shape.batch, shape.seqlen_k) for shape in FP8_SHAPES[::2]] == lengths
    assert len(FP8_SHAPES) == len(set(FP8_SHAPES)) == 12
    assert all(shape.fp8 and shape.topk is None for shape in FP8_SHAPES)
    for fp8 in (False, True):
        assert {(shape.topk, shape.fp8) for shape in sparse_shapes(512, fp8)} == {(512, fp8)}
    with pytest.raises(ValueError, match="topk must be in"):
        sparse_shapes(SPARSE_SEQLEN_K + 1)


def test_anchors_of_fp8_and_sparse_shapes() -> None:
    anchors = read_anchors(FP8_ANCHORS)
    for row, (shape, anchor) in zip(
        json.loads(FP8_ANCHORS.read_text())["shapes"], anchors.by_shape.items(), strict=True
    ):
        assert shape.fp8
        assert work_of(shape).floor_ms == pytest.approx(anchor.floor_ms, abs=5.1e-5)
        assert work_of(shape).bound == row["bound"]
        assert anchor.is_cold == (shape.topk is not None)
    dense, sparse = DecodeShape(64, 1, 4096, 128, fp8=True), DecodeShape(128, 2, 4096, 128, fp8=True, topk=2048)
    assert anchors.of(dense).best == ("vllm_fp8", 0.1157)
    assert anchors.of(dataclasses.replace(dense, block_size=32)) is anchors.of(dense)
    # Rows of bf16 are another shape, and the anchors of bf16 say nothing of FP8 rows.
    assert anchors.of(dataclasses.replace(dense, fp8=False)) is None
    assert read_anchors(ANCHORS).of(dataclasses.replace(SHAPES[0], fp8=True)) is None
    # A sparse call reads its rows, however many there are besides.
    assert anchors.of(sparse).best == ("fp8_sparse", 0.3711)
    assert anchors.of(dataclasses.replace(sparse, seqlen_k=100000)) is anchors.of(sparse)
    for field, value in {"topk": 1024, "seqlen_q": 3, "num_heads": 64, "fp8": False}.items():
        assert anchors.of(dataclasses.replace(sparse, **{field: value})) is None
    assert anchors.of(dataclasses.replace(sparse, seqlen_k=100000, topk=SPARSE_SEQLEN_K + 1)) is None


def test_a_cold_anchor_is_compared_with_cold_calls() -> None:
    anchors = read_anchors(FP8_ANCHORS)
    shape = DecodeShape(128, 1, 4096, 128, fp8=True, topk=2048)
    warm = result(shape)
    (row,) = compare([dataclasses.replace(warm, cold_ms=0.25)], anchors, CEILINGS)
    assert (row["best_anchor"], row["best_anchor_ms"], row["best_anchor_is_cold"]) == ("fp8_sparse", 0.1898, True)
    assert row["over_best"] == pytest.approx(0.25 / 0.1898, rel=1e-3)
    assert row["over_best_scaled"] == pytest.approx(0.25 * 700 / (0.1898 * 777), rel=1e-3)
    assert row["product"] == pytest.approx(warm.graph_ms * 700, rel=1e-3)
    (row,) = compare([warm], anchors, CEILINGS)  # --no-cold
    assert "over_best" not in row
    both = Anchor(1.0, {"a": 2.0}, {"a": 1.0, "b": 0.5})
    assert (both.best, both.is_cold) == (("a", 2.0), False)


def test_fp8_rows_are_set_against_rows_of_the_dtype() -> None:
    shape = FP8_SHAPES[0]
    twin = dataclasses.replace(shape, fp8=False)

    def timed(shape: DecodeShape, backend: str, ms: float, dtype: str = "bfloat16") -> Result:
        return Result(shape, backend, dtype, ms, None, work_of(shape))

    measured = [
        timed(twin, "a", 4.0),
        timed(twin, "b", 2.0),
        timed(shape, "a", 3.0),  # against a, although b is faster
        timed(shape, "c", 1.5),  # c has no figure on bf16: against the fastest
        timed(shape, "a", 1.0, "float16"),  # nothing to set it against
        timed(FP8_SHAPES[1], "a", 1.0),
    ]
    rows = compare(measured)
    assert [row.get("over_unencoded") for row in rows] == [None, None, 0.75, 0.75, None, None]
    assert [(row["unencoded_backend"], row["unencoded_ms"]) for row in rows[2:4]] == [("a", 4.0), ("b", 2.0)]
    # A mean holds one format; FP8 rows would pass for a faster backend otherwise.
    summary = {entry["backend"]: entry for entry in figures.summarize(rows) if entry["class"] == "all"}
    assert {name: entry["shapes"] for name, entry in summary.items()} == {"a": 1, "b": 1, "a fp8": 3, "c fp8": 1}
    assert summary["c fp8"]["over_unencoded"] == 0.75
    assert summary["a"]["over_unencoded"] is None


def test_sparse_shapes_are_a_class_of_their_own() -> None:
    assert class_of(128, 1, 128, 2048) == class_of(1, 1, 16, 64) == "sparse"
    rows = compare([result(shape) for shape in (*sparse_shapes(2048), SHAPES[0])])
    counts = {entry["class"]: entry["shapes"] for entry in figures.summarize(rows)}
    assert counts == {"batch <= 4": 1, "sparse": 5, "all": 6}


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_floors_are_those_of_the_anchors(shape: DecodeShape) -> None:
    anchors = read_anchors(ANCHORS)
    (row,) = (
        row
        for row in json.loads(ANCHORS.read_text())["shapes"]
        if all(row[key] == value for key, value in dataclasses.asdict(shape).items() if key in row)
    )
    anchor = anchors.of(shape)
    assert anchor is not None
    assert work_of(shape).floor_ms == pytest.approx(anchor.floor_ms, abs=5.1e-5)
    assert work_of(shape).bound == row["bound"]


def test_public_shapes_fall_into_three_classes() -> None:
    classes = [class_of(shape.batch, shape.seqlen_q, shape.num_heads) for shape in SHAPES]
    assert [classes.count(name) for name in CLASSES] == [4, 5, 5, 0, 0]
    assert class_of(5, 4, 16) == CLASSES[1]  # 64 rows
    assert class_of(5, 8, 16) == CLASSES[2]  # 128 rows
    assert class_of(4, 8, 16) == CLASSES[0]
    assert class_of(5, 1, 8) == class_of(5, 1, 96) == CLASSES[3]


def test_spread_is_over_the_median() -> None:
    assert figures.spread([1.0, 4.0, 2.0]) == 1.5
    assert figures.spread([3.0]) == 0


def test_scaled_ratio_uses_the_ceiling_that_bounds_the_shape() -> None:
    memory, compute = DecodeShape(64, 1, 32768, 16), DecodeShape(132, 1, 16384, 128)
    first, second = compare([result(memory), result(compute)], read_anchors(ANCHORS), CEILINGS)
    assert (first["bound"], second["bound"]) == ("mem", "flop")
    assert first["product"] == pytest.approx(2 * work_of(memory).floor_ms * 4.0, rel=1e-3)
    assert first["best_anchor_product"] == pytest.approx(0.5744 * 4.44, rel=1e-3)
    assert first["over_best"] == pytest.approx(2 * work_of(memory).floor_ms / 0.5744, rel=1e-3)
    assert first["over_best_scaled"] == pytest.approx(first["over_best"] * 4.0 / 4.44, rel=2e-3)
    assert second["best_anchor"] == "flashmla"
    assert second["over_best_scaled"] == pytest.approx(second["over_best"] * 700 / 777, rel=2e-3)


def test_without_ceilings_or_anchor_the_columns_are_absent() -> None:
    shape = SHAPES[0]
    (row,) = compare([result(shape)], read_anchors(ANCHORS))
    assert "over_best" in row
    assert not {"product", "over_best_scaled", "best_anchor_product"} & set(row)
    (row,) = compare([result(shape)], None, CEILINGS)
    assert "product" in row
    assert not {"over_best", "over_best_scaled"} & set(row)
    # The anchors are all of latents 512 + 64.
    (row,) = compare([result(dataclasses.replace(shape, kv_lora_rank=256))], read_anchors(ANCHORS), CEILINGS)
    assert "over_best" not in row


def test_summary_has_geometric_means_by_class_and_backend() -> None:
    anchors = read_anchors(ANCHORS)
    measured = [result(shape, factor, backend) for shape in SHAPES for backend, factor in (("a", 1.0), ("b", 4.0))]
    # Of backend "b" one shape of the first class took 16 times as long.
    measured[1] = result(SHAPES[0], 64.0, "b")
    summary = figures.summarize(compare(measured, anchors, CEILINGS))
    by_key = {(entry["class"], entry["backend"]): entry for entry in summary}
    assert list(by_key) == [(name, backend) for name in (*CLASSES[:3], "all") for backend in ("a", "b")]
    assert by_key[CLASSES[0], "a"]["over_floor"] == 1.0
    assert by_key[CLASSES[0], "b"]["over_floor"] == pytest.approx(4 * 16**0.25)
    assert by_key["all", "b"]["shapes"] == 14
    # The anchors' own note: 1.66 shape by shape over 24 shapes, these 14 among them.
    best = [anchors.of(shape).best[1] / work_of(shape).floor_ms for shape in SHAPES]
    wanted = math.exp(sum(map(math.log, best)) / 14)
    assert by_key["all", "a"]["best_anchor_over_floor"] == pytest.approx(wanted, abs=2e-3)
    assert by_key["all", "a"]["over_best"] == pytest.approx(1 / wanted, abs=2e-3)
    assert by_key["all", "a"]["over_best_scaled"] < by_key["all", "a"]["over_best"]


def test_summary_says_how_many_shapes_have_an_anchor() -> None:
    odd = DecodeShape(2, 1, 777, 16)
    entry = figures.summarize(compare([result(SHAPES[0]), result(odd)], read_anchors(ANCHORS)))[0]
    assert (entry["shapes"], entry["anchored"]) == (2, 1)
    (alone, _) = figures.summarize(compare([result(odd)], read_anchors(ANCHORS)))
    assert alone["best_anchor_over_floor"] is alone["over_best"] is alone["over_best_scaled"] is None


# --- clocks -----------------------------------------------------------------------------------------------------------


def test_variants_take_turns_and_every_second_round_goes_backwards(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[object] = []
    monkeypatch.setattr(bench_kernel.time, "sleep", lambda seconds: log.append(seconds))

    def burst(name: str) -> float:
        log.append(name)
        return float(len(log))

    rounds = bench_kernel.in_turns({name: lambda name=name: burst(name) for name in "ab"}, rounds=3, pause_s=0.5)
    assert log == [0.5, "a", 0.5, "b", 0.5, "b", 0.5, "a", 0.5, "a", 0.5, "b"]
    assert rounds == {"a": [2.0, 8.0, 10.0], "b": [4.0, 6.0, 12.0]}


@pytest.mark.parametrize(
    ("num_sets", "turn_ms", "turns"),
    [
        (51, 0.56, 1),  # batch 1 x 4096: 51 page sets of 11 us
        (4, 0.12, 5),  # 8 calls would be 0.24 ms: too short beside the graph's own start
        (2, 0.3, 4),  # 8 calls
        (2, 2.0, 2),  # 8 calls would be 8 ms
        (2, 6.0, 1),  # one turn is too long already
    ],
)
def test_graphs_hold_whole_turns(num_sets: int, turn_ms: float, turns: int) -> None:
    assert bench_kernel.calls_in_turns(num_sets, turn_ms) == turns


def test_page_sets_share_no_page_and_are_larger_than_the_rotation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_inputs, "ROTATION_BYTES", 10**6)
    shape = DecodeShape(3, 2, 100, 4, varlen=True, kv_lora_rank=128, qk_rope_head_dim=32)
    inputs = decode_inputs.make_inputs(shape, torch.float32, torch.device("cpu"))
    pages = [-(-length // 64) for length in shape.lengths()]
    sets = [
        {int(page) for row, count in zip(table, pages, strict=True) for page in row[:count]}
        for table in inputs.block_table
    ]
    assert len(sets) >= 2
    assert len(set().union(*sets)) == sum(map(len, sets)) == len(sets) * sum(pages) == len(inputs.kv_cache)
    assert len(sets) * sum(pages) * 64 * 160 * 4 >= 10**6
    assert [q.shape for q in inputs.q] == [(3, 2, 4, 160)] * len(sets)


def test_fp8_pages_hold_encoded_normal_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_inputs, "ROTATION_BYTES", 1)
    monkeypatch.setattr(decode_inputs, "ENCODED_ROWS", 50)  # 50 rows 9 times and 62 left
    shape = DecodeShape(2, 1, 200, 4, kv_lora_rank=256, qk_rope_head_dim=64, fp8=True)
    inputs = decode_inputs.make_inputs(shape, torch.bfloat16, torch.device("cpu"))
    assert inputs.kv_cache.dtype == torch.uint8
    assert inputs.kv_cache.shape == (2 * 2 * 4, 64, 1, 400)
    assert [q.dtype for q in inputs.q] == [torch.bfloat16] * 2
    rows = inputs.kv_cache.flatten(0, 2)
    assert len(torch.unique(rows, dim=0)) == len(rows)  # every row drawn, none twice
    latent, k_rope = decode_rows(rows, 256, 64, torch.float32)
    for columns in (latent, k_rope):
        assert columns.std(1).sub(1).abs().max() < 0.5
    # Scales are those of the columns beside them: encoding what was decoded finds them again, to a rounding.
    layout = row_layout(256, 64)
    again = encode_rows(latent, k_rope)[:, layout.scales : layout.k_rope].contiguous().view(torch.float32)
    scales = rows[:, layout.scales : layout.k_rope].contiguous().view(torch.float32)
    torch.testing.assert_close(again, scales, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("seqlen_q", "topk", "draws"),
    [(1, 40, 7), (2, 40, 3), (3, 100, 1), (4, 100, 1)],
    ids=["seven draws of a request", "two queries", "all of its tokens", "queries must share rows"],
)
def test_sparse_sets_name_rows_of_their_requests_and_share_none(
    seqlen_q: int, topk: int, draws: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decode_inputs, "ROTATION_BYTES", 10**6)
    shape = DecodeShape(3, seqlen_q, 300, 4, kv_lora_rank=128, qk_rope_head_dim=32, fp8=True, topk=topk)
    inputs = decode_inputs.make_inputs(shape, torch.bfloat16, torch.device("cpu"))
    num_sets = len(inputs.indices)
    assert num_sets == len(inputs.q)
    assert num_sets - 1 < 10**6 / (3 * seqlen_q * topk * 208) <= num_sets
    num_tables = -(-num_sets // draws)
    assert len(inputs.kv_cache) == num_tables * 3 * 5
    pages_of: list[set[int]] = []  # by page set and request
    for number, indices in enumerate(inputs.indices):
        assert (indices.dtype, indices.shape) == (torch.int32, (3, seqlen_q, topk))
        for request in range(3):
            for query in range(seqlen_q):
                assert len(indices[request, query].unique()) == topk
            pages = set((indices[request] // 64).flatten().tolist())
            if number % draws == 0:
                pages_of.append(pages)
            else:
                pages_of[-3 + request] |= pages
    assert all(len(pages) <= 5 for pages in pages_of)  # of 300 tokens
    assert sum(map(len, pages_of)) == len(set().union(*pages_of))  # no page of two requests, or of two page sets
    named = torch.cat([indices.flatten() for indices in inputs.indices])
    assert len(named.unique()) == (num_sets * 3 * 300 if seqlen_q * topk > 300 else len(named))
    # A request's fifth page has 300 - 4 * 64 = 44 tokens; what is behind them is no token.
    for pages in pages_of:
        assert min(int((named[named // 64 == page] % 64).max()) for page in pages) < 44


class Device:
    """Stands in for `torch.cuda`: a clock that moves by what a call costs and that events read, in milliseconds.

    Every replay costs what its calls cost and 0.002; the first 60 ms of a burst run at full clocks, what follows takes
    half as long again; a pause cools the device down.
    """

    def __init__(self) -> None:
        self.now = self.heat = 0.0
        self.capturing: list[float] | None = None
        self.replays: list[int] = []

    def spend(self, ms: float) -> None:
        if self.capturing is not None:
            self.capturing.append(ms)
            return
        self.heat += ms
        self.now += ms * (1.5 if self.heat > 60 else 1)

    def cool(self, seconds: float) -> None:
        if seconds:
            self.heat = 0.0

    def graph_of(self, calls: list[Callable[[], object]]) -> object:
        self.capturing = []
        for call in calls:
            call()
        costs, self.capturing = self.capturing, None

        def replay() -> None:
            self.replays.append(len(costs))
            self.spend(sum(costs) + 0.002)

        return types.SimpleNamespace(replay=replay)

    def event(self, enable_timing: bool) -> object:
        assert enable_timing
        event = types.SimpleNamespace(at=None, synchronize=lambda: None)
        event.record = lambda: setattr(event, "at", self.now)
        event.elapsed_time = lambda end: end.at - event.at
        return event


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    fake = Device()
    stream = types.SimpleNamespace(wait_stream=lambda other: None)
    for name, value in {
        "Stream": lambda: stream,
        "current_stream": lambda: stream,
        "stream": lambda stream: contextlib.nullcontext(),
        "synchronize": lambda: None,
        "Event": fake.event,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(bench_kernel, "_graph_of", fake.graph_of)
    monkeypatch.setattr(bench_kernel, "_device", lambda: torch.device("cpu"))
    monkeypatch.setattr(decode_inputs, "ROTATION_BYTES", 1)
    monkeypatch.setattr(bench_kernel, "FLUSH_BYTES", 1)
    monkeypatch.setattr(bench_kernel.time, "sleep", fake.cool)
    return fake


def test_burst_is_the_median_replay_per_call(device: Device) -> None:
    graph = bench_kernel.CallGraph([lambda: device.spend(0.1), lambda: device.spend(0.3)])
    assert graph.num_calls == 8
    device.replays.clear()
    device.cool(1)
    # 20 ms of replays of 1.602 ms, after one that is not timed.
    assert graph.burst(0.02) == pytest.approx(1.602 / 8)
    assert device.replays == [8] * 13
    assert graph.burst(0.5) == pytest.approx(1.5 * 1.602 / 8)  # hot
    device.cool(1)
    device.replays.clear()
    assert graph.burst(0.0) == pytest.approx(1.602 / 8)
    assert device.replays == [8] * 4  # three that are timed at least


@pytest.fixture
def backends(device: Device, monkeypatch: pytest.MonkeyPatch) -> dict[str, types.SimpleNamespace]:
    """Two backends that are the definition and cost 1 and 2 ms a call, 0.6 times as much on FP8 rows and a fifth of
    either if sparse; their plans remember how they were made, and their calls on which rows they ran."""
    made: dict[str, types.SimpleNamespace] = {}
    launches: dict[tuple[str, str], int] = {("append", "slow"): 7}

    def plan_splits(*tensors: torch.Tensor, kv_lora_rank: int, backend: str | None, **options: object) -> object:
        if backend == "picky":
            raise UnsupportedError("no backend accepts this call")
        plan = types.SimpleNamespace(options=options, row=(tensors[1].dtype, tensors[1].shape[-1]))
        made[backend or "fast"] = plan
        return plan

    def launch(op: str, backend: str | None, kv_cache: torch.Tensor, factor: float) -> str:
        name = backend or "fast"
        launches[op, name] = launches.get((op, name), 0) + 1
        row = (kv_cache.dtype, kv_cache.shape[-1])
        if (op, name, row) not in ran:
            ran.append((op, name, row))
        device.spend({"fast": 1.0, "slow": 2.0, "cuda": 0.5}[name] * factor * (0.6 if row[0] == torch.uint8 else 1))
        return name

    def decode(*tensors: torch.Tensor, plan: object, backend: str | None, **options: object) -> object:
        assert plan.row == (tensors[1].dtype, tensors[1].shape[-1])
        name = launch("decode", backend, tensors[1], 1.0)
        out, lse = ops.decode(*tensors, backend="torch", **options)
        return out * wrong.get(name, 1.0), lse

    def sparse_decode(*tensors: torch.Tensor, backend: str | None, **options: object) -> object:
        if backend == "picky":
            raise UnsupportedError("has no kernel for sparse attention")
        name = launch("sparse_decode", backend, tensors[1], 0.2)
        out, lse = ops.sparse_decode(*tensors, backend="torch", **options)
        return out * wrong.get(name, 1.0), lse

    wrong: dict[str, float] = {}
    ran: list[tuple[str, str, tuple[torch.dtype, int]]] = []
    monkeypatch.setattr(bench_kernel, "plan_splits", plan_splits)
    monkeypatch.setattr(bench_kernel, "decode", decode)
    monkeypatch.setattr(bench_kernel, "sparse_decode", sparse_decode)
    monkeypatch.setattr(bench_kernel, "backend_counts", lambda: dict(launches))
    return types.SimpleNamespace(made=made, wrong=wrong, ran=ran)


SMALL = DecodeShape(3, 2, 100, 4, varlen=True, kv_lora_rank=128, qk_rope_head_dim=32)


def test_backends_share_inputs_and_have_plans_of_their_own(backends: types.SimpleNamespace) -> None:
    timing = bench_kernel.Timing(rounds=3, sustained_s=1.0)
    results, failed = bench_kernel.time_shape(SMALL, ["slow", "fast", "picky"], torch.float16, timing, True)
    assert failed == {f"{SMALL.name}, picky": "no backend accepts this call"}
    assert [result.backend for result in results] == ["slow", "fast"]
    for result, ms in zip(results, (2.0, 1.0), strict=True):
        assert result.graph_ms == pytest.approx(ms, rel=2e-3)  # 60 of 80 ms at full clocks
        assert len(result.round_ms) == 3
        assert result.sustained_ms == pytest.approx(1.5 * ms, rel=2e-3)
        assert result.cold_ms >= ms
        assert 0 < result.error_over_plain <= 2
        assert result.work == work_of(SMALL)
        assert result.dtype == "float16"


def test_fp8_rows_are_timed_beside_rows_of_the_dtype(
    backends: types.SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = dataclasses.replace(SMALL, fp8=True)
    turns: list[list[str]] = []

    def in_turns(bursts: dict[str, Callable[[], float]], *arguments: object) -> dict[str, list[float]]:
        turns.append(list(bursts))
        return all_in_turns(bursts, *arguments)

    all_in_turns = bench_kernel.in_turns
    monkeypatch.setattr(bench_kernel, "in_turns", in_turns)
    timing = bench_kernel.Timing(rounds=3, cold=False)
    results, failed = bench_kernel.time_shape(shape, ["slow", "picky", "fast"], torch.bfloat16, timing, True)
    assert [(result.shape, result.backend) for result in results] == [
        (SMALL, "slow"),
        (SMALL, "fast"),
        (shape, "slow"),
        (shape, "fast"),
    ]
    assert turns == [[f"{each.name}, {name}" for each in (SMALL, shape) for name in ("slow", "fast")]]
    # What the backends were given under either name: 160 columns of bf16, 208 bytes.
    plain, encoded = (torch.bfloat16, 160), (torch.uint8, 208)
    assert backends.ran == [("decode", name, row) for row in (plain, encoded) for name in ("slow", "fast")]
    assert failed == dict.fromkeys((f"{SMALL.name}, picky", f"{shape.name}, picky"), "no backend accepts this call")
    assert SMALL.lengths() == shape.lengths()
    assert all(0 < result.error_over_plain <= 2 and len(result.round_ms) == 3 for result in results)
    assert [result.work for result in results] == [work_of(result.shape) for result in results]
    assert [row.get("over_unencoded") for row in compare(results)] == [None, None, *[pytest.approx(0.6, rel=3e-3)] * 2]


@pytest.mark.parametrize("fp8", [False, True])
def test_sparse_calls_are_timed_without_a_plan(fp8: bool, backends: types.SimpleNamespace) -> None:
    shape = DecodeShape(3, 2, 100, 4, kv_lora_rank=128, qk_rope_head_dim=32, fp8=fp8, topk=24)
    timing = bench_kernel.Timing(rounds=1)
    results, failed = bench_kernel.time_shape(shape, ["fast", "picky"], torch.bfloat16, timing, True)
    rows = [(torch.bfloat16, 160), (torch.uint8, 208)][: 1 + fp8]
    assert backends.ran == [("sparse_decode", "fast", row) for row in rows]
    assert backends.made == {}
    assert [result.shape.fp8 for result in results] == [False, True][: 1 + fp8]
    for result, ms in zip(results, (0.2, 0.12), strict=False):
        assert result.graph_ms == pytest.approx(ms, rel=2e-2)
        assert result.cold_ms >= ms
        assert result.backend == "fast"
        assert 0 < result.error_over_plain <= 2
    assert failed[f"{shape.name}, picky"] == "has no kernel for sparse attention"
    assert len(failed) == 1 + fp8
    backends.wrong["fast"] = 1.1
    results, failed = bench_kernel.time_shape(shape, ["fast"], torch.bfloat16, timing, True)
    plain = dataclasses.replace(shape, fp8=False)
    assert results == []
    assert all(failed[f"{each.name}, fast"].startswith("wrong result") for each in (shape, plain))


def test_pages_are_planned_deterministically_only_if_asked(backends: types.SimpleNamespace) -> None:
    timing = bench_kernel.Timing(rounds=1, cold=False)
    (result,), _ = bench_kernel.time_shape(SMALL, [None], torch.float16, timing, deterministic=True)
    assert result.backend == "fast"  # what ran
    assert result.cold_ms is result.sustained_ms is result.error_over_plain is None
    assert backends.made["fast"].options == {"deterministic": True}
    bench_kernel.time_shape(SMALL, ["fast"], torch.float16, timing)
    assert backends.made["fast"].options == {}


def test_a_backend_that_is_wrong_has_no_figure(backends: types.SimpleNamespace) -> None:
    backends.wrong["fast"] = 1.1
    timing = bench_kernel.Timing(rounds=1, cold=False)
    results, failed = bench_kernel.time_shape(SMALL, ["fast", "slow"], torch.float16, timing, True)
    assert [result.backend for result in results] == ["slow"]
    assert "wrong result: relative error 1.00e-01" in failed[f"{SMALL.name}, fast"]
    results, _ = bench_kernel.time_shape(SMALL, ["fast"], torch.float16, timing, False)
    assert len(results) == 1  # unchecked, as asked


def test_only_the_compiled_backend_is_checked_unasked(backends: types.SimpleNamespace) -> None:
    timing = bench_kernel.Timing(rounds=1, cold=False)
    (compiled, other), _ = bench_kernel.time_shape(SMALL, ["cuda", "fast"], torch.float16, timing)
    assert 0 < compiled.error_over_plain <= 2
    assert other.error_over_plain is None


# --- check ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> tuple[torch.Tensor, dict[str, object]]:
    """What the definition makes of a ragged causal shape in float16, and the other arguments of the check."""
    monkeypatch.setattr(decode_inputs, "ROTATION_BYTES", 1)
    shape = DecodeShape(5, 2, 100, 4, varlen=True, kv_lora_rank=128, qk_rope_head_dim=32)
    inputs = decode_inputs.make_inputs(shape, torch.float16, torch.device("cpu"))
    options = {"kv_lora_rank": 128, "softmax_scale": shape.softmax_scale}
    out, _ = ops.decode(
        inputs.q[0], inputs.kv_cache, inputs.block_table[0], inputs.cache_seqlens, backend="torch", **options
    )
    return out, {
        "q": inputs.q[0],
        "kv_cache": inputs.kv_cache,
        "block_table": inputs.block_table[0],
        "lengths": shape.lengths(),
        **options,
    }


def test_check_looks_at_the_first_the_last_and_the_longest() -> None:
    assert check.requests_to_check([5, 7, 9, 8, 6]) == [0, 2, 4]
    assert check.requests_to_check([5, 5, 5]) == [0, 2]
    assert check.requests_to_check([5]) == [0]


def test_check_accepts_a_right_result(decoded: tuple[torch.Tensor, dict[str, object]]) -> None:
    out, arguments = decoded
    assert 0 < check.check_outputs(out, **arguments) <= 2


def test_check_computes_what_the_definition_does(decoded: tuple[torch.Tensor, dict[str, object]]) -> None:
    # In fp64, both to its last digits: the scale, the mask and the columns of V are the same.
    _, arguments = decoded
    exact = arguments | {"q": arguments["q"].double(), "kv_cache": arguments["kv_cache"].double()}
    lengths = torch.tensor(exact.pop("lengths"), dtype=torch.int32)
    wanted, _ = ops.decode(cache_seqlens=lengths, backend="torch", **exact)
    for request, length in enumerate(lengths.tolist()):
        pages = exact["block_table"][request, : -(-length // 64)].long()
        latents = exact["kv_cache"][pages].flatten(0, 2)[:length]
        found = check.attend(exact["q"][request], latents, 128, exact["softmax_scale"])
        torch.testing.assert_close(found, wanted[request], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("which", ["first", "last", "longest"])
def test_check_refuses_a_wrong_request(decoded: tuple[torch.Tensor, dict[str, object]], which: str) -> None:
    out, arguments = decoded
    lengths = arguments["lengths"]
    request = {"first": 0, "last": len(lengths) - 1, "longest": lengths.index(max(lengths))}[which]
    out[request, 1, 2] *= 1.02
    with pytest.raises(check.WrongResultError, match=r"relative error .* over requests .*float16 has .* 2x"):
        check.check_outputs(out, **arguments)


def test_check_refuses_what_is_not_finite_in_any_request(decoded: tuple[torch.Tensor, dict[str, object]]) -> None:
    out, arguments = decoded
    other = next(index for index in range(5) if index not in check.requests_to_check(arguments["lengths"]))
    out[other, 0, 0, 0] = float("nan")
    with pytest.raises(check.WrongResultError, match=f"not finite in 1 of 5 requests, first in request {other}"):
        check.check_outputs(out, **arguments)


FP8_SMALL = DecodeShape(5, 2, 200, 4, varlen=True, kv_lora_rank=256, qk_rope_head_dim=64, fp8=True)
SPARSE_SMALL = DecodeShape(5, 2, 200, 4, kv_lora_rank=256, qk_rope_head_dim=64, topk=48)


@pytest.mark.parametrize(
    "shape",
    [FP8_SMALL, SPARSE_SMALL, dataclasses.replace(SPARSE_SMALL, fp8=True)],
    ids=["fp8", "sparse", "sparse fp8"],
)
def test_check_of_fp8_rows_and_of_named_rows(shape: DecodeShape, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_inputs, "ROTATION_BYTES", 1)
    inputs = decode_inputs.make_inputs(shape, torch.bfloat16, torch.device("cpu"))
    q, kv_cache = inputs.q[0], inputs.kv_cache

    def attended(q: torch.Tensor, kv_cache: torch.Tensor = kv_cache) -> torch.Tensor:
        options = {"kv_lora_rank": 256, "softmax_scale": shape.softmax_scale, "backend": "torch"}
        if shape.topk is not None:
            return ops.sparse_decode(q, kv_cache, inputs.indices[0], **options)[0]
        return ops.decode(q, kv_cache, inputs.block_table[0], inputs.cache_seqlens, **options)[0]

    def error_of(out: torch.Tensor) -> float:
        return bench_kernel._check(shape, inputs, out)

    assert 0 < error_of(attended(q)) <= 2
    # The definition in fp64 on the same bytes is what the check has, to the last digits.
    exact = attended(q.double(), kv_cache if shape.fp8 else kv_cache.double())
    assert error_of(exact) < 1e-9
    # A row of the page is decoded wrongly by 1/16 in one scale, or one in its first column.
    other = kv_cache.clone()
    if shape.fp8:
        layout = row_layout(256, 64)
        other[..., layout.scales : layout.scales + 4] = (
            other[..., layout.scales : layout.scales + 4].contiguous().view(torch.float32).mul(1.0625).view(torch.uint8)
        )
    else:
        other *= 1.0625
    with pytest.raises(check.WrongResultError, match=r"relative error .* bfloat16 has .* 2x"):
        error_of(attended(q, other))
    # The first and the last request, and every query of them.
    for request in (0, 4):
        for query in (0, 1):
            one_wrong = exact.to(torch.bfloat16)
            one_wrong[request, query] *= 1.1
            with pytest.raises(check.WrongResultError):
                error_of(one_wrong)
    not_finite = exact.clone()
    not_finite[2, 1, 0, 0] = float("inf")
    with pytest.raises(check.WrongResultError, match="not finite in 1 of 5 requests, first in request 2"):
        error_of(not_finite)


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU: the refusal is for machines without one")
def test_command_refuses_without_a_gpu(tmp_path: Path) -> None:
    assert "torch sees none here" in run("--out", tmp_path, code=1)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[object, ...]]:
    """A GPU that takes twice the floor, Triton 10% longer, but accepts no seqlen_q of 2. Tells what it was asked."""
    seen: list[tuple[object, ...]] = []

    def time_shape(shape: DecodeShape, backends: list[str | None], *options: object) -> object:
        seen.append((shape, backends, *options))
        if shape.seqlen_q == 2:
            return [], {f"{shape.name}, {name}": "no backend accepts this call" for name in backends}
        shapes = (dataclasses.replace(shape, fp8=False), shape) if shape.fp8 else (shape,)
        results = [
            dataclasses.replace(result(each, 2.2 if name == "triton" else 2.0, name or "torch"), cold_ms=0.25)
            for each in shapes
            for name in backends
        ]
        return results, {}

    monkeypatch.setattr(bench_kernel, "time_shape", time_shape)
    monkeypatch.setattr(bench_kernel, "measure_ceilings", lambda timing: CEILINGS)
    monkeypatch.setattr(
        bench_kernel,
        "time_append",
        lambda dtype, timing, *shape: AppendFigure("torch", 1000, 576, 500 if shape[-1] else 576, 1e-3),
    )
    monkeypatch.setattr(bench_commands, "device_of", lambda name: torch.device("cuda"))
    monkeypatch.setattr("flash_mla.bench.report.machine", lambda device: {"device": "a GPU"})
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    return seen


@pytest.mark.usefixtures("timed")
def test_every_anchor_is_in_the_table_with_its_loss(tmp_path: Path) -> None:
    out = tmp_path / "all.json"
    text = run("--anchors", ANCHORS, "--backend", "torch", "--no-ceilings", "--out", out, code=1)  # one shape failed
    report = json.loads(out.read_text())
    assert report["device"] == "a GPU"
    assert report["ceilings"] is None
    assert list(report["not_measured"]) == ["b128 q2 k4096 h128 varlen, torch"]
    by_shape = {(row["batch"], row["seqlen_k"], row["num_heads"]): row for row in report["rows"]}
    assert len(by_shape) == 13
    row = by_shape[64, 32768, 16]  # 2 x floor = 1.125 ms, FlashMLA 0.5744 ms
    assert row["best_anchor"] == "flashmla"
    assert row["over_best"] == pytest.approx(2 * 0.5624 / 0.5744, rel=2e-3)
    assert "1.96 SLOWER" in next(line for line in text.splitlines() if "│ b64 q1 k32768 h16" in line)
    # 2 x floor = 2.2 us, the best peer 13.5 us
    assert "0.16 faster" in next(line for line in text.splitlines() if "│ b1 q1 k4096 h16" in line)
    assert next(entry for entry in report["summary"] if entry["class"] == "all")["over_floor"] == 2.0
    assert "not measured: b128 q2 k4096 h128 varlen, torch: no backend accepts this call" in text
    assert "append, torch: 1,000 rows of 576 bytes in 0.0010 ms, 1.15 TB/s read and written" in text
    assert report["append"] == {
        "backend": "torch",
        "tokens": 1000,
        "token_bytes": 576,
        "row_bytes": 576,
        "ms": 1e-3,
        "TBps": 1.152,
    }


@pytest.mark.usefixtures("timed")
def test_json_is_alone_on_standard_output_and_in_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    flags = ("--batch", "16", "--backend", "torch", "--plot", "roofline.png", "--json")
    result = CliRunner().invoke(app, ["bench", "kernel", *flags])
    report = json.loads(result.stdout)
    assert [row["batch"] for row in report["rows"]] == [16]
    assert report["command"].startswith("flash-mla")
    assert "wrote roofline.png" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["roofline.png"]


@pytest.mark.usefixtures("timed")
def test_backends_stand_beside_each_other_scaled_by_the_ceilings(tmp_path: Path) -> None:
    out = tmp_path / "two.json"
    flags = ("--batch", 16, "--seqlen-k", 4096, "--num-heads", 16, "--backend", "triton,torch")
    text = run(*flags, "--anchors", ANCHORS, "--out", out)
    report = json.loads(out.read_text())
    assert [row["backend"] for row in report["rows"]] == ["triton", "torch"]
    assert report["ceilings"] == dataclasses.asdict(CEILINGS)
    assert report["anchor_ceilings"]["matmul_bf16_TFLOPs"] == 777
    floor = work_of(DecodeShape(16, 1, 4096, 16)).floor_ms
    assert report["rows"][0]["over_best_scaled"] == pytest.approx(2.2 * floor * 4.0 / (0.0296 * 4.44), rel=2e-3)
    lines = [line for line in text.splitlines() if line.startswith("│ b16 q1 k4096 h16")]
    assert ["1.18 SLOWER" in line for line in lines] == [True, False]
    assert "read 4.00 TB/s" in text
    assert "triton against the best anchor: 0 of 1 shapes faster; slower: b16 q1 k4096 h16 (1.18x)" in text


def test_flags_reach_the_clock(timed: list[tuple[object, ...]], tmp_path: Path) -> None:
    out = tmp_path / "deep" / "one.json"
    shape = ("--batch", 3, "--seqlen-k", 1000, "--num-heads", 20, "--kv-lora-rank", 256, "--qk-rope-head-dim", 32)
    clock = ("--rounds", 6, "--burst", 0.2, "--pause", 0, "--sustained", 1.5, "--no-cold", "--deterministic", "--check")
    text = run(*shape, *clock, "--no-append", "--out", out)
    assert "append" not in text
    wanted = DecodeShape(3, 1, 1000, 20, False, 256, 32)
    timing = bench_kernel.Timing(rounds=6, burst_s=0.2, pause_s=0.0, sustained_s=1.5, cold=False)
    assert timed == [(wanted, [None], torch.bfloat16, timing, True, True)]
    assert "best anchor:" not in text
    report = json.loads(out.read_text())
    assert report["rows"][0]["seqlen_k"] == 1000
    assert report["timing"] == {**dataclasses.asdict(timing), "deterministic": True}
    run("--batch", 3, "--out", out)
    assert timed[1][3:] == (bench_kernel.Timing(), None, False)


def test_fp8_has_a_column_against_bf16(timed: list[tuple[object, ...]], tmp_path: Path) -> None:
    out = tmp_path / "fp8.json"
    text = run("--fp8", "--backend", "torch,triton", "--out", out)
    assert [asked[0] for asked in timed] == list(FP8_SHAPES)
    report = json.loads(out.read_text())
    assert len(report["rows"]) == 4 * len(FP8_SHAPES)
    for row in report["rows"]:
        assert row["topk"] is None
        assert ("over_unencoded" in row) == row["fp8"]
    # Times are twice the floor, and so is the ratio that of the floors.
    shape = DecodeShape(64, 1, 32768, 16, fp8=True)
    ratio = work_of(shape).floor_ms / work_of(dataclasses.replace(shape, fp8=False)).floor_ms
    (row,) = (row for row in report["rows"] if name_of(row) == shape.name and row["backend"] == "torch")
    assert row["over_unencoded"] == pytest.approx(ratio, abs=1e-3)
    assert row["unencoded_backend"] == "torch"
    assert {entry["backend"] for entry in report["summary"]} == {"torch", "torch fp8", "triton", "triton fp8"}
    # Once without and once with: rows of 576 bytes take the 576 that came, FP8 rows 500 here.
    assert "append, torch: 1,000 rows of 576 bytes in 0.0010 ms, 1.15 TB/s read and written" in text
    assert "append fp8, torch: 1,000 rows of 500 bytes, from 576 each, in 0.0010 ms, 1.08 TB/s" in text
    assert report["append_fp8"] == {
        "backend": "torch",
        "tokens": 1000,
        "token_bytes": 576,
        "row_bytes": 500,
        "ms": 1e-3,
        "TBps": 1.076,
    }
    assert report["append"]["row_bytes"] == 576
    run("--batch", 2, "--out", out)
    assert json.loads(out.read_text())["append_fp8"] is None


def columns_of(rows: list[dict[str, object]]) -> dict[str, list[str]]:
    return {str(column.header): list(column.cells) for column in tables.kernel_table(rows, "a GPU").columns}


def test_table_names_the_backend_that_fp8_is_set_against() -> None:
    shape = FP8_SHAPES[0]
    twin = dataclasses.replace(shape, fp8=False)
    measured = [result(twin, 2.0, "cuda"), result(shape, 2.0, "cuda"), result(shape, 4.0, "triton")]
    columns = columns_of(compare(measured))
    ratio = work_of(shape).floor_ms / work_of(twin).floor_ms
    assert columns["shape"] == [twin.name, shape.name, shape.name]
    assert columns["FP8 / bf16"] == ["-", f"{ratio:.3f}", f"{2 * ratio:.3f} (cuda)"]
    halves = [dataclasses.replace(each, dtype="float16") for each in measured]
    assert "FP8 / fp16" in columns_of(compare(halves))
    assert not any("FP8" in name for name in columns_of(compare(measured[:1])))


@pytest.mark.usefixtures("timed")
def test_every_fp8_and_sparse_anchor_is_measured(tmp_path: Path) -> None:
    out = tmp_path / "all.json"
    run("--anchors", FP8_ANCHORS, "--backend", "torch", "--out", out, code=1)  # two queries are refused
    report = json.loads(out.read_text())
    compared = {name_of(row): row for row in report["rows"] if "over_best" in row}
    assert len(compared) == 8
    assert list(report["not_measured"]) == ["b128 q2 k32768 top2048 h128 fp8, torch"]
    row = compared["b128 q1 k32768 top2048 h128 fp8"]
    assert (row["best_anchor_ms"], row["over_best"]) == (0.1898, pytest.approx(0.25 / 0.1898, rel=1e-3))
    columns = columns_of(report["rows"])
    best = dict(zip(columns["shape"], columns["best ms"], strict=True))
    assert best["b128 q1 k32768 top2048 h128 fp8"] == "0.1898 cold"
    assert best["b64 q1 k4096 h128 fp8"] == "0.1157"
    assert report["append_fp8"] is not None


def test_anchors_are_measured_as_the_flags_say(timed: list[tuple[object, ...]], tmp_path: Path) -> None:
    run("--anchors", FP8_ANCHORS, "--topk", 2048, "--out", tmp_path, code=1)
    assert [(asked[0].topk, asked[0].fp8, asked[0].seqlen_k) for asked in timed] == [(2048, True, SPARSE_SEQLEN_K)] * 4
    timed.clear()
    run("--anchors", ANCHORS, "--fp8", "--out", tmp_path, code=1)
    assert [asked[0] for asked in timed] == [dataclasses.replace(shape, fp8=True) for shape in SHAPES]


@pytest.mark.parametrize("flags", [(), ("--fp8",)])
def test_sparse_shapes_are_listed(flags: tuple[str, ...], timed: list[tuple[object, ...]], tmp_path: Path) -> None:
    run("--topk", 512, *flags, "--out", tmp_path, code=1)
    assert [asked[0] for asked in timed] == list(sparse_shapes(512, bool(flags)))
    (written,) = tmp_path.iterdir()
    assert written.name.startswith("kernel-fp8-top512-2" if flags else "kernel-top512-2")


def test_one_sparse_shape_of_fp8_rows(timed: list[tuple[object, ...]], tmp_path: Path) -> None:
    run("--batch", 3, "--seqlen-k", 900, "--num-heads", 20, "--topk", 64, "--fp8", "--out", tmp_path)
    assert timed[0][0] == DecodeShape(3, 1, 900, 20, fp8=True, topk=64)
    (written,) = tmp_path.iterdir()
    assert written.name.startswith("kernel-b3-q1-k900-top64-h20-fp8-2")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--batch", 2, "--topk", 64, "--varlen"), "reads topk rows whatever the length: not with --varlen"),
        (("--topk", 64, "--varlen"), "reads topk rows whatever the length: not with --varlen"),
        (("--batch", 2, "--topk", 64, "--seqlen-k", 63), "topk must be in 1..seqlen_k=63, got 64"),
        (("--topk", 2**20), "topk must be in 1..seqlen_k=32768, got 1048576"),
        (("--topk", 64, "--deterministic"), "is about split plans, and sparse calls have none"),
        (("--anchors", ANCHORS, "--topk", 64), "no shape of the anchors has topk=64; --batch gives one"),
        (("--batch", 2, "--fp8", "--kv-lora-rank", 192), "kv_lora_rank that 128 divides, got 192"),
        (("--fp8", "--kv-lora-rank", 192), "kv_lora_rank that 128 divides, got 192"),  # of append
    ],
)
def test_flags_that_do_not_fit_together_are_refused(
    flags: tuple[object, ...], message: str, timed: list[tuple[object, ...]]
) -> None:
    text = " ".join(run(*flags, code=2).replace("│", " ").split())
    assert message in text
    assert timed == []


def test_an_append_without_figure_does_not_end_the_run(
    timed: list[tuple[object, ...]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def time_append(dtype: torch.dtype, timing: object, *shape: object) -> AppendFigure:
        if shape[-1]:
            raise WrongResultError("append: a row of the pool is not the one that was sent to its slot")
        return AppendFigure("torch", 1000, 576, 576, 1e-3)

    monkeypatch.setattr(bench_kernel, "time_append", time_append)
    out = tmp_path / "one.json"
    text = run("--batch", 2, "--fp8", "--out", out, code=1)
    assert "not measured: append fp8: append: a row of the pool is not the one" in text
    report = json.loads(out.read_text())
    assert (report["append_fp8"], report["append"]["backend"], len(report["rows"])) == (None, "torch", 2)
    assert len(timed) == 1


@pytest.mark.parametrize(
    ("names", "message"),
    [("torch,tritn", "no such backend: 'tritn'; have"), ("torch,torch", "the same backend twice"), ("", "no such")],
)
def test_wrong_backends_are_refused_with_a_line(names: str, message: str) -> None:
    assert message in run("--backend", names, code=2)


# --- the roofline -----------------------------------------------------------------------------------------------------


def test_points_lie_where_their_rates_are() -> None:
    shape = DecodeShape(132, 1, 16384, 128)
    work = work_of(shape)
    measured = [result(shape, 2.0, "a"), result(SHAPES[0]), result(shape, 4.0, "b")]
    names, points = roofline.points_of(compare(measured, read_anchors(ANCHORS), CEILINGS))
    assert names == [shape.name, SHAPES[0].name]
    found = {point[:2]: point[2:] for point in points}
    assert list(found) == [("a", 1), ("best anchor", 1), ("triton", 2), ("best anchor", 2), ("b", 1)]
    assert found["a", 1] == pytest.approx((work.flop / work.bytes, 790 / 2), rel=1e-3)
    assert found["b", 1] == pytest.approx((work.flop / work.bytes, 790 / 4), rel=1e-3)
    assert found["best anchor", 1] == pytest.approx((work.flop / work.bytes, work.flop / 0.9924e9), rel=1e-3)


def test_labels_are_moved_apart_and_keep_their_order() -> None:
    assert roofline.spaced([4.0, 1.0, 1.5, 9.0], 2.0) == [4.0, 1.0, 2.0, 9.0]
    assert roofline.spaced([2.0, 2.0, 3.0], 2.0) == [2.0, 4.0, 8.0]


def png_size(path: Path) -> tuple[int, int]:
    head = path.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    return int.from_bytes(head[16:20], "big"), int.from_bytes(head[20:24], "big")


@pytest.mark.usefixtures("timed")
def test_command_draws_the_roofline(tmp_path: Path) -> None:
    plot = tmp_path / "deep" / "roofline.png"
    flags = ("--anchors", ANCHORS, "--backend", "torch,triton", "--out", tmp_path / "all.json")
    assert "wrote" in run(*flags, "--plot", plot, code=1).splitlines()[-1]
    assert png_size(plot) == (1800, 1050)


@pytest.mark.parametrize(
    "path", sorted((ROOT / "benchmarks" / "results").glob("h200_kernel_*.json")), ids=lambda p: p.stem
)
def test_results_of_earlier_versions_can_be_drawn(path: Path, tmp_path: Path) -> None:
    report = json.loads(path.read_text())
    png_size(roofline.draw_roofline(report, tmp_path / "roofline.png"))


def test_roofs_are_those_of_the_run() -> None:
    measured = {"read_TBps": 4.4, "matmul_bf16_TFLOPs": 750.0}
    assert roofline.roofs_of({"ceilings": measured}) == (4.4, 750.0, "measured in this run")
    assert roofline.roofs_of({"ceilings": None}) == (4.3, 790.0, "as the floors assume")


def test_plot_is_refused_before_anything_is_measured(
    timed: list[tuple[object, ...]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "must end in .png" in run("--plot", tmp_path / "roofline.svg", code=2)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    text = run("--plot", tmp_path / "roofline.png", code=1)
    assert (
        'ImportError: flash-mla bench kernel --plot needs matplotlib: pip install "transformers-flash-mla[bench]"'
        in text
    )
    assert timed == []


# --- on a GPU ---------------------------------------------------------------------------------------------------------

GPU_SHAPE = DecodeShape(4, 2, 500, 16, varlen=True)
SHORT = bench_kernel.Timing(rounds=2, burst_s=0.005, pause_s=0.0, sustained_s=0.01)


@needs_gpu
def test_a_shape_is_timed_and_checked() -> None:
    results, failed = bench_kernel.time_shape(GPU_SHAPE, ["triton"], timing=SHORT, check=True)
    assert not failed
    (measured,) = results
    assert measured.backend == "triton"
    assert len(measured.round_ms) == 2
    assert min(measured.round_ms) <= measured.graph_ms <= max(measured.round_ms)
    assert 0 < measured.error_over_plain <= 2
    assert min(measured.graph_ms, measured.cold_ms, measured.sustained_ms) > measured.work.floor_ms


@needs_gpu
def test_the_backend_that_ran_is_named_and_one_that_refuses_fails_alone() -> None:
    shape = dataclasses.replace(GPU_SHAPE, num_heads=3)
    results, failed = bench_kernel.time_shape(shape, [None, "triton"], timing=SHORT)
    assert results[0].backend in ops.BACKENDS
    assert len(results) + len(failed) == 2


@needs_gpu
def test_a_wrong_result_is_no_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    def decode(*arguments: object, **options: object) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = ops.decode(*arguments, **options)
        return out * 1.1, lse

    monkeypatch.setattr(bench_kernel, "decode", decode)
    results, failed = bench_kernel.time_shape(GPU_SHAPE, ["triton"], timing=SHORT, check=True)
    assert results == []
    assert "wrong result: relative error 1.0" in failed[f"{GPU_SHAPE.name}, triton"]


@pytest.fixture
def append_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Append is run once, and said to take 2 ms: 15 tokens of 1,152 bytes."""
    monkeypatch.setattr(bench_kernel, "APPEND_BATCH", 3)
    monkeypatch.setattr(bench_kernel, "APPEND_TOKENS", 5)
    monkeypatch.setattr(bench_kernel, "_device", lambda: torch.device("cpu"))
    monkeypatch.setattr(bench_kernel, "CallGraph", lambda calls: types.SimpleNamespace(burst=lambda seconds: 2.0))


@pytest.mark.usefixtures("append_on_cpu")
def test_append_moves_every_row_twice() -> None:
    figure = bench_kernel.time_append(timing=bench_kernel.Timing(rounds=1, pause_s=0))
    assert figure == AppendFigure("torch", 15, 1152, 1152, 2.0)
    assert figure.TBps == pytest.approx(2 * 15 * 1152 / 2e-3 / 1e12)


@pytest.mark.usefixtures("append_on_cpu")
def test_append_to_fp8_rows_reads_what_comes_and_writes_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    pools: list[torch.Tensor] = []

    def append(kv_cache: torch.Tensor, *new: torch.Tensor) -> None:
        pools.append(kv_cache)
        ops.append(kv_cache, *new)

    monkeypatch.setattr(bench_kernel, "append", append)
    figure = bench_kernel.time_append(timing=bench_kernel.Timing(rounds=1, pause_s=0), fp8=True)
    assert figure == AppendFigure("torch", 15, 1152, 656, 2.0)
    assert figure.TBps == pytest.approx(15 * (1152 + 656) / 2e-3 / 1e12)
    assert (pools[0].dtype, pools[0].shape) == (torch.uint8, (1, 64, 1, 656))
    # Rows of (256, 64) columns have 8 bytes of padding, which a kernel may leave as it finds them.
    monkeypatch.setattr(bench_kernel, "append", lambda pool, *new: (ops.append(pool, *new), pool[..., 392:].fill_(7)))
    assert bench_kernel.time_append(kv_lora_rank=256, fp8=True).row_bytes == 400


@pytest.mark.usefixtures("append_on_cpu")
@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("fault", ["not written", "in another slot", "another latent", "another rotated key"])
def test_an_append_that_writes_otherwise_is_no_figure(fault: str, fp8: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def append(kv_cache: torch.Tensor, latent: torch.Tensor, k_rope: torch.Tensor, slots: torch.Tensor) -> None:
        target = kv_cache.clone() if fault == "not written" else kv_cache
        if fault == "another latent":
            latent = latent * 1.25
        if fault == "another rotated key":
            k_rope = k_rope * 1.25
        ops.append(target, latent, k_rope, slots.flip(0) if fault == "in another slot" else slots)

    monkeypatch.setattr(bench_kernel, "append", append)
    with pytest.raises(WrongResultError, match="not the one that was sent"):
        bench_kernel.time_append(fp8=fp8)


@needs_gpu
@pytest.mark.parametrize("shape", [dataclasses.replace(GPU_SHAPE, fp8=True), DecodeShape(4, 2, 500, 16, topk=128)])
@pytest.mark.parametrize("fp8", [False, True])
def test_fp8_and_sparse_shapes_are_timed_and_checked(shape: DecodeShape, fp8: bool) -> None:
    shape = dataclasses.replace(shape, fp8=fp8)
    results, failed = bench_kernel.time_shape(shape, ["triton"], timing=SHORT, check=True)
    assert not failed
    assert [result.shape.fp8 for result in results] == [False, True][: 1 + fp8]
    for measured in results:
        assert 0 < measured.error_over_plain <= 2
        assert min(measured.graph_ms, measured.cold_ms, measured.sustained_ms) > measured.work.floor_ms


@needs_gpu
@pytest.mark.parametrize(("fp8", "row_bytes"), [(False, 1152), (True, 656)])
def test_append_is_timed(fp8: bool, row_bytes: int) -> None:
    figure = bench_kernel.time_append(timing=SHORT, fp8=fp8)
    assert (figure.tokens, figure.token_bytes, figure.row_bytes) == (131072, 1152, row_bytes)
    assert 0.1 < figure.TBps < 100


@needs_gpu
def test_ceilings_are_those_of_a_gpu() -> None:
    ceilings = bench_kernel.measure_ceilings(SHORT)
    assert 0.1 < ceilings.copy_TBps < 100
    assert ceilings.read_TBps > 0.1
    assert ceilings.matmul_bf16_TFLOPs > 10
    assert 0.1 < ceilings.graph_node_us < 100
