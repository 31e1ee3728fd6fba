"""What `flash-mla bench generate` measures and works out, on a machine without a GPU."""

from __future__ import annotations

import contextlib
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from flash_mla import ops
from flash_mla.backends import torch as definition
from flash_mla.backends.cuda import memory as growing
from flash_mla.bench import device_time, layer, memory, plots
from flash_mla.bench import generate as bench
from flash_mla.bench.clock import StepClock
from flash_mla.bench.context import compare
from flash_mla.bench.shapes import NAMED, build_named, named_config
from flash_mla.cli.app import app
from flash_mla.cli.tables import device_time_table, generate_table

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def definition_only(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Not Triton's interpreter, which the tests switch on: seconds per step."""
    monkeypatch.setattr(ops, "BACKENDS", {"torch": definition})
    ops._choose.cache_clear()
    yield
    ops._choose.cache_clear()


@pytest.fixture(scope="module")
def tiny() -> Any:
    return build_named("tiny", dtype=torch.float32, device=CPU, attn_implementation="flash_mla")


def setting(**changes: Any) -> bench.Setting:
    return replace(bench.Setting("tiny", "flash_mla", "dynamic", batch=2, prompt=20, new_tokens=4), **changes)


def command(*flags: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, ["bench", "generate", *map(str, flags)])
    assert result.exit_code == code, result.output + str(result.exception)
    return result.output


# --- device time ------------------------------------------------------------------------------------------------------


def test_busy_time_counts_what_overlaps_once() -> None:
    # A merge launched early waits inside the split kernel's time; then a gap of 5 us.
    kernels = [("merge", 4.0, 8.0), ("split", 0.0, 10.0), ("in", 5.0, 1.0), ("in", 7.0, 1.0), ("later", 17.0, 3.0)]
    assert device_time.busy_us(kernels) == 12.0 + 3.0
    assert device_time.busy_us([]) == 0.0


def test_device_time_is_per_step_and_by_group() -> None:
    kernels = [
        ("plan_splits", 0.0, 4.0),
        ("flash_fwd_splitkv_mla_kernel_few_16_bf16_512_64", 10.0, 20.0),
        ("flash_fwd_mla_combine_kernel_warp_bf16_512", 28.0, 6.0),
        ("append_rows_16", 40.0, 2.0),
        ("absorb: nvjet_hsh_64x8", 50.0, 3.0),
        ("un-absorb: nvjet_hsh_64x8", 60.0, 5.0),
        ("void at::native::explan_append_kernel", 70.0, 1.0),
        ("next_slots", 80.0, 2.0),
    ]
    found = device_time.device_time(kernels, steps=2)
    assert (found["steps"], found["busy_us"], found["kernels"]) == (2, 20.5, 4.0)
    assert found["groups"] == {
        "plan": {"busy_us": 2.0, "kernels": 0.5},
        "slots": {"busy_us": 1.0, "kernels": 0.5},
        "append": {"busy_us": 1.0, "kernels": 0.5},
        "decode": {"busy_us": 12.0, "kernels": 1.0},  # 24 us together, not 26
        "absorb": {"busy_us": 1.5, "kernels": 0.5},
        "un-absorb": {"busy_us": 2.5, "kernels": 0.5},
    }


def test_gemms_are_found_by_the_operator_that_launched_them() -> None:
    config = SimpleNamespace(num_attention_heads=20, qk_nope_head_dim=192, kv_lora_rank=512, v_head_dim=256)
    gemms = device_time.absorb_gemms(config, batch=3)

    def bmm(number: int, *dims: list[int]) -> dict[str, Any]:
        return {"cat": "cpu_op", "name": "aten::bmm", "args": {"External id": number, "Input Dims": list(dims)}}

    def ran(name: str, args: dict[str, Any], cat: str = "kernel") -> dict[str, Any]:
        return {"cat": cat, "name": name, "ts": 1.5, "dur": 2.0, "args": args}

    events = [
        bmm(1, [20, 3, 192], [20, 192, 512]),
        bmm(2, [20, 3, 512], [20, 512, 256], [20, 3, 256]),  # torch.bmm(..., out=...)
        bmm(3, [20, 4, 192], [20, 192, 512]),  # four rows: not this batch's
        ran("gemm", {"External id": 1}),
        ran("splitk_reduce", {"External id": 1}),
        ran("gemm", {"External id": 2}),
        ran("gemm", {"External id": 3}),
        ran("gemm", {}),  # in a CUDA graph
        ran("Memcpy HtoD", {"External id": 9}, "gpu_memcpy"),
        {"cat": "cuda_runtime", "name": "cudaLaunchKernel", "ts": 0.0, "dur": 1.0, "args": {"External id": 1}},
        {"name": "process_name", "ph": "M", "args": {"name": "python"}},
    ]
    names = ["absorb: gemm", "absorb: splitk_reduce", "un-absorb: gemm", "gemm", "gemm", "Memcpy HtoD"]
    assert device_time.kernels_of(events, gemms) == [(name, 1.5, 2.0) for name in names]
    assert device_time.absorb_gemms(SimpleNamespace(num_attention_heads=20), batch=3) == {}


def test_profile_records_the_last_steps(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    # torch.profiler on this machine's operators: a layer has one product of each kind per step.
    operators: list[str] = []
    original = device_time.StepProfiler.events

    def events(self: device_time.StepProfiler) -> list[dict[str, Any]]:
        found = original(self)
        operators.extend(device_time.gemm_operators(found, self.gemms).values())
        return found

    monkeypatch.setattr(device_time.StepProfiler, "events", events)
    profiled = bench.profile_generate(tiny, setting(new_tokens=bench.MIN_PROFILED_TOKENS))
    assert profiled["steps"] == device_time.PROFILED_STEPS == 4
    assert sorted(operators) == ["absorb"] * 3 * 4 + ["un-absorb"] * 3 * 4
    with pytest.raises(ValueError, match="needs new_tokens >= 10, got 9"):
        bench.profile_generate(tiny, setting(new_tokens=9))


# --- memory -----------------------------------------------------------------------------------------------------------


def test_device_memory_is_that_of_torch_and_of_growing_pools(monkeypatch: pytest.MonkeyPatch) -> None:
    resets = []
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 1000)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3000)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: resets.append("torch"))
    monkeypatch.setattr(growing, "held_bytes", lambda index: {1: 20}[index])
    monkeypatch.setattr(growing, "kept_bytes", lambda index: {1: 7}[index])
    monkeypatch.setattr(growing, "peak_bytes", lambda index: {1: 50}[index])
    monkeypatch.setattr(growing, "reset_peak", lambda: resets.append("growing"))
    device = torch.device("cuda", 1)
    assert (memory.held_bytes(device), memory.peak_bytes(device)) == (1013, 3050)
    memory.reset_peak(device)
    assert resets == ["torch", "growing"]
    assert (memory.held_bytes(CPU), memory.peak_bytes(CPU)) == (0, None)


def test_decode_has_a_peak_of_its_own(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    # Held 100 before the call; 1,100 in the prompt's forward; 400 afterwards.
    resets: list[int] = []
    monkeypatch.setattr(bench, "held_bytes", lambda device: 100)
    monkeypatch.setattr(bench, "reset_peak", lambda device: resets.append(len(resets)))
    monkeypatch.setattr(bench, "peak_bytes", lambda device: 1100 if len(resets) == 1 else 400)
    one, _ = bench.time_round(tiny, setting())
    assert (one.peak, one.decode_peak) == (1000, 300)
    assert len(resets) == 2


# --- one call ---------------------------------------------------------------------------------------------------------


def test_clock_calls_back_after_the_time_is_noted() -> None:
    seen: list[tuple[int, int]] = []
    clock = StepClock(CPU, at_token=lambda number: seen.append((number, len(clock.stamps))))
    clock.start()
    for _ in range(3):
        clock(torch.zeros(2, 1, dtype=torch.long), None)
    assert seen == [(1, 2), (2, 3), (3, 4)]


def test_a_static_run_has_its_own_capacity(tiny: Any) -> None:
    # Transformers would give the short run the long one's.
    for attn in ("sdpa", "flash_mla"):
        short, _ = bench.time_generate(tiny, setting(attn=attn, cache="static", prompt=20), warmup=False)
        long, _ = bench.time_generate(tiny, setting(attn=attn, cache="static", prompt=200), warmup=False)
        again, _ = bench.time_generate(tiny, setting(attn=attn, cache="static", prompt=20), warmup=False)
        assert again.cache_bytes == short.cache_bytes < long.cache_bytes
    assert short.pages_GiB == round(short.cache_bytes / 2**30, 6)


def test_the_prompt_goes_in_chunks(tiny: Any) -> None:
    whole, tokens = bench.time_generate(tiny, setting(), warmup=False)
    chunks, same = bench.time_generate(tiny, setting(prefill_chunk_size=8), warmup=False)
    assert whole.paths == {"deepseek_v2 prefill": 3, "deepseek_v2 absorbed": 3 * 3}
    # 8 + 8 + 4 tokens: the first chunk finds no context.
    assert chunks.backends["append torch"] == 3 * (3 + 3)
    assert chunks.prefill_chunk_size == 8
    assert torch.equal(tokens, same)


def test_experts_are_read_while_they_decode(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    # What Transformers does on a GPU: another implementation for decoding, taken back at the end.
    @contextlib.contextmanager
    def optimized() -> Iterator[None]:
        tiny.set_experts_implementation("batched_mm")
        yield
        tiny.set_experts_implementation("eager")

    tiny.set_experts_implementation("eager")
    monkeypatch.setattr(tiny, "_optimize_model_for_decode", optimized)
    result, _ = bench.time_generate(tiny, setting(), warmup=False)
    assert result.experts_implementation == {"prefill": "eager", "decode": "batched_mm"}
    assert bench._experts(SimpleNamespace(_can_set_experts_implementation=lambda: False)) is None


# --- rounds -----------------------------------------------------------------------------------------------------------


def test_attentions_take_turns_or_not() -> None:
    attns = ["flash_mla", "sdpa"]
    assert bench.schedule(attns, 2, in_turns=True) == [
        ("flash_mla", True),
        ("sdpa", False),
        ("flash_mla", False),
        ("sdpa", False),
    ]
    assert bench.schedule(attns, 2, in_turns=False) == [
        ("flash_mla", True),
        ("flash_mla", False),
        ("sdpa", True),
        ("sdpa", False),
    ]


INTERRUPT = -99.0


class Scripted:
    """Rounds with known figures in the place of measured ones; `log` has the order of what was done."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, ms: dict[tuple[str, int], list[float]]) -> None:
        self.log: list[str] = []
        self.ms = {key: iter(values) for key, values in ms.items()}
        self.model = SimpleNamespace(device=CPU, dtype=torch.float32)
        monkeypatch.setattr(bench, "warm_up", lambda model, one: self.log.append(f"warm {one.attn} {one.prompt}"))
        monkeypatch.setattr(bench, "start_afresh", lambda model: self.log.append("afresh"))
        monkeypatch.setattr(bench, "time_round", self.time_round)

    def time_round(self, model: Any, one: bench.Setting) -> tuple[bench._Round, torch.Tensor]:
        self.log.append(f"{one.attn} {one.prompt}")
        ms = next(self.ms[one.attn, one.prompt])
        if ms == INTERRUPT:
            raise KeyboardInterrupt
        if ms < 0:
            raise torch.OutOfMemoryError("tried to allocate 99 GiB")
        same = torch.arange(2)[:, None] if one.attn == "flash_mla" else torch.zeros(2, 1, dtype=torch.long)
        peak = int(ms * 2**30)
        return bench._Round(ms / 10, ms, 100 / ms, peak, peak // 2, 2**29, {}, {}, [ms, ms], None), same


def test_rows_are_medians_of_rounds_taken_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    figures = {("flash_mla", 64): [4.0, 9.0, 5.0], ("sdpa", 64): [5.0, 6.0, 8.0]}
    script = Scripted(monkeypatch, figures)
    settings = [setting(prompt=64), setting(prompt=64, attn="sdpa")]
    lines: list[str] = []
    (ours, native), failed = bench.measure(script.model, settings, rounds=3, report=lines.append)
    turn = ["flash_mla 64", "sdpa 64"]
    assert script.log == ["afresh", "warm flash_mla 64", "flash_mla 64", "warm sdpa 64", "sdpa 64", *turn, *turn]
    assert (ours.decode_ms, ours.decode_spread_ms, ours.round_ms) == (5.0, 5.0, [4.0, 9.0, 5.0])
    assert (ours.ttft_s, ours.tokens_per_s, ours.peak_GiB, ours.decode_peak_GiB) == (0.5, 20.0, 9.0, 4.5)
    assert (ours.rounds, ours.step_ms, ours.pages_GiB) == (3, [[4.0] * 2, [9.0] * 2, [5.0] * 2], 0.5)
    assert (native.decode_ms, native.decode_spread_ms) == (6.0, 3.0)
    assert (ours.identical_rows, native.identical_rows) == (None, 1)
    assert failed == {}
    assert lines == ["flash_mla, batch 2, prompt 64: 5.000 ms/token", "sdpa, batch 2, prompt 64: 6.000 ms/token"]


def test_static_rounds_follow_each_other_and_compile_once(monkeypatch: pytest.MonkeyPatch) -> None:
    script = Scripted(monkeypatch, {(attn, p): [1.0, 1.0] for attn in ("flash_mla", "sdpa") for p in (64, 128)})
    settings = [setting(prompt=p, attn=attn, cache="static") for p in (64, 128) for attn in ("flash_mla", "sdpa")]
    bench.measure(script.model, settings, rounds=2, report=lambda line: None)
    expected = []
    for name in ("flash_mla 64", "sdpa 64", "flash_mla 128", "sdpa 128"):
        expected += ["afresh", f"warm {name}", name, name]
    assert script.log == expected


def test_batches_and_pages_are_measured_one_work_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    script = Scripted(monkeypatch, {("flash_mla", 64): [4.0, 5.0, 6.0, 7.0], ("sdpa", 64): [8.0, 9.0]})
    settings = [
        setting(prompt=64, batch=batch, attn=attn, cache="static", cache_dtype=cache_dtype)
        for batch in (4, 1)
        for attn, cache_dtype in (("flash_mla", None), ("flash_mla", "fp8"), ("sdpa", None))
    ]
    lines: list[str] = []
    rows, failed = bench.measure(script.model, settings, report=lines.append)
    assert failed == {}
    # Graphs of another batch, or of other rows, are forgotten first.
    ours = ["afresh", "warm flash_mla 64", "flash_mla 64"]
    assert script.log == [*ours, *ours, "afresh", "warm sdpa 64", "sdpa 64"] * 2
    assert [(row.batch, row.cache_dtype, row.decode_ms) for row in rows] == [
        (4, None, 4.0), (4, "fp8", 5.0), (4, None, 8.0), (1, None, 6.0), (1, "fp8", 7.0), (1, None, 9.0)
    ]  # fmt: skip
    assert lines[1] == "flash_mla fp8, batch 4, prompt 64: 5.000 ms/token"
    assert [row.identical_rows for row in rows] == [None, 2, 1] * 2


def test_what_does_not_fit_is_named_and_the_rest_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    figures = {("flash_mla", 64): [4.0] * 2, ("sdpa", 64): [5.0] * 2}
    script = Scripted(monkeypatch, {**figures, ("flash_mla", 128): [4.0] * 2, ("sdpa", 128): [5.0, -1.0]})
    settings = [setting(prompt=p, attn=attn) for p in (64, 128) for attn in ("flash_mla", "sdpa")]
    rows, failed = bench.measure(script.model, settings, rounds=2, report=lambda line: None)
    assert [(row.attn, row.prompt) for row in rows] == [("flash_mla", 64), ("sdpa", 64), ("flash_mla", 128)]
    assert failed == {"sdpa, batch 2, prompt 128": "tried to allocate 99 GiB"}
    last = compare([row.to_json() for row in rows], "sdpa")[-1]
    assert (last["ratio"], last["context_ms"]) == (None, 0.0)


def test_an_interrupted_run_reports_what_has_all_its_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    figures = {("flash_mla", 64): [4.0] * 2, ("sdpa", 64): [5.0] * 2, ("flash_mla", 128): [4.0], ("sdpa", 128): [5.0]}
    script = Scripted(monkeypatch, {**figures, ("sdpa", 128): [INTERRUPT]})
    monkeypatch.delattr(bench, "profile_generate")
    settings = [setting(prompt=p, attn=attn) for p in (64, 128, 256) for attn in ("flash_mla", "sdpa")]
    moved: list[int] = []
    rows, failed = bench.measure(
        script.model,
        settings,
        rounds=2,
        profile=True,
        report=lambda line: None,
        progress=lambda done, total: moved.append(done),
    )
    assert [(row.attn, row.prompt, row.rounds) for row in rows] == [("flash_mla", 64, 2), ("sdpa", 64, 2)]
    # Those of 128 have one round at most, and rounds are compared one by one.
    names = [f"{attn}, batch 2, prompt {p}" for p in (128, 256) for attn in ("flash_mla", "sdpa")]
    assert {name: failed[name] for name in names} == failed == dict.fromkeys(names, "interrupted")
    assert script.log[-2:] == ["warm sdpa 128", "sdpa 128"]
    assert moved == [0, 1, 2, 3, 4, 5, 6]


def test_profiles_come_after_all_measurements(monkeypatch: pytest.MonkeyPatch) -> None:
    script = Scripted(monkeypatch, {("flash_mla", 64): [4.0], ("flash_mla", 128): [4.0]})

    def profiled(model: Any, one: bench.Setting) -> dict[str, Any]:
        script.log.append(f"profile {one.prompt}")
        return device_time.device_time([("plan_splits", 0.0, 4.0 * one.prompt)], 4)

    monkeypatch.setattr(bench, "profile_generate", profiled)
    settings = [setting(prompt=64), setting(prompt=128)]
    rows, _ = bench.measure(script.model, settings, warmup=False, profile=True, report=lambda line: None)
    assert script.log == ["afresh", "flash_mla 64", "afresh", "flash_mla 128", "profile 64", "profile 128"]
    assert [row.device_time["groups"]["plan"]["busy_us"] for row in rows] == [64.0, 128.0]
    console = Console(width=120)
    with console.capture() as captured:
        console.print(device_time_table(rows))
    assert "128.0 (0.25)" in captured.get()


# --- figures between rows ---------------------------------------------------------------------------------------------


def test_context_cost_and_ratio() -> None:
    def row(attn: str, prompt: int, rounds: list[float]) -> dict[str, Any]:
        ms = sorted(rounds)[1]
        return {
            "attn": attn, "batch": 2, "prompt": prompt, "decode_ms": ms, "round_ms": rounds,
            "decode_spread_ms": max(rounds) - min(rounds),
        }  # fmt: skip

    rows = [
        row("flash_mla", 4096, [11.0, 12.0, 12.5]),
        row("sdpa", 4096, [22.0, 20.0, 24.0]),
        row("flash_mla", 64, [10.0, 10.25, 10.0]),
        row("sdpa", 64, [8.0, 8.0, 8.0]),
    ]
    ours, native, ours_short, native_short = compare(rows, "sdpa")
    assert (ours["context_ms"], ours["context_spread_ms"]) == (2.0, 1.75)
    assert (native["context_ms"], native["context_spread_ms"]) == (14.0, 4.0)
    assert (ours_short["context_ms"], ours_short["context_spread_ms"]) == (0.0, 0.0)
    # Rounds 0.5, 0.6, 0.5208: 12 / 22 between the medians.
    assert (ours["ratio"], ours["ratio_spread"]) == (0.5455, 0.1)
    assert (native["ratio"], native_short["ratio_spread"]) == (1.0, 0.0)
    assert ours_short["ratio"] == 1.25
    alone = compare(rows[:1], None)[0]
    assert (alone["ratio"], alone["ratio_spread"], alone["context_ms"]) == (None, None, 0.0)
    assert compare([], None) == []


def test_rows_of_other_batches_and_of_fp8_pages_are_not_compared() -> None:
    def row(attn: str, batch: int, prompt: int, ms: float, **more: str) -> dict[str, Any]:
        figures = {"decode_ms": ms, "round_ms": [ms], "decode_spread_ms": 0.0}
        return {"attn": attn, "batch": batch, "prompt": prompt, **figures, **more}

    rows = [
        row("sdpa", 1, 64, 10.0),
        row("flash_mla", 1, 64, 5.0),
        row("flash_mla", 1, 64, 6.0, cache_dtype="fp8"),
        row("flash_mla", 8, 64, 7.0),
        row("sdpa", 8, 64, 20.0),
        row("flash_mla", 8, 4096, 9.5),
        row("flash_mla", 8, 4096, 8.5, cache_dtype="fp8"),
    ]
    found = compare(rows, "sdpa")
    assert [one["ratio"] for one in found] == [1.0, 0.5, 0.6, 0.35, 1.0, None, None]
    # FP8 pages of batch 8 were not measured at the shortest prompt.
    assert [one["context_ms"] for one in found] == [0.0, 0.0, 0.0, 0.0, 0.0, 2.5, None]


# --- shapes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "parameters", "heads", "layers", "latent"),
    [
        ("v2-lite", 15.7e9, 16, 27, (512, 64)),
        ("glm-4.7-flash", 29.9e9, 20, 47, (512, 64)),
        ("minicpm3", 4.07e9, 40, 62, (256, 32)),
    ],
)
def test_shapes_have_the_published_size(
    name: str, parameters: float, heads: int, layers: int, latent: tuple[int, int]
) -> None:
    model = build_named(name, dtype=torch.bfloat16, device=torch.device("meta"), attn_implementation="flash_mla")
    assert sum(parameter.numel() for parameter in model.parameters()) == pytest.approx(parameters, rel=0.005)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    config = model.config
    assert (config.num_attention_heads, config.num_hidden_layers) == (heads, layers)
    assert (config.kv_lora_rank, config.qk_rope_head_dim) == latent


def test_a_family_that_transformers_lacks_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(NAMED, "lost", ("no_such_family", {}))
    with pytest.raises(ImportError, match=r"'lost' needs a Transformers with the model type 'no_such_family', \d"):
        named_config("lost")
    assert "ImportError: flash-mla bench: the shape 'lost' needs" in command("--model", "lost", code=1)


# --- one layer --------------------------------------------------------------------------------------------------------


def layer_step(attn: str, seqlen_k: int) -> layer.LayerStep:
    return layer.LayerStep(attn, 2, 3, seqlen_k, CPU, torch.float64, hidden_size=32)


def test_a_layer_step_takes_no_new_page() -> None:
    assert [layer.middle_of_page(length) for length in (1, 63, 64, 4096)] == [32, 32, 96, 4128]
    pages = {}
    for seqlen_k in (128, layer.middle_of_page(128)):
        step = layer_step("flash_mla", seqlen_k)
        with torch.no_grad():
            cache = step.filled_cache()
            before = cache.memory_report().pages_allocated
            step(cache)
        pages[seqlen_k] = cache.memory_report().pages_allocated - before
    assert pages == {128: 3, 160: 0}  # three rows


@pytest.mark.parametrize("attn", ["flash_mla", "sdpa", "eager"])
def test_fixed_capacity_is_the_same_step(attn: str) -> None:
    # A mask one position off, or the empty positions of a static cache seen, would change the output.
    step = layer_step(attn, 96)
    with torch.no_grad():
        expected = step(step.filled_cache())
        found = step(step.filled_cache(120), step.mask_for(120))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    assert expected.abs().max() > 0


def test_every_replay_finds_room() -> None:
    # Replays that run the call: the host counts them here, as it counts warm-up and capture on a GPU.
    step = layer_step("flash_mla", 96)
    caches: list[Any] = []
    original = step.filled_cache

    def filled_cache(capacity: int) -> Any:
        caches.append(original(capacity))
        return caches[-1]

    step.filled_cache = filled_cache

    def capture(call: Any) -> Any:
        for _ in range(layer.WARMUP_STEPS + 1):
            call()
        return call

    def timed(replay: Any, steps: int) -> float:
        for _ in range(layer.WARMUP_STEPS + steps):
            replay()
        return 0.25

    with torch.no_grad():
        assert layer.graph_ms(step, 7, capture, timed) == 0.25
    (cache,) = caches
    assert cache.memory_report().tokens_padded == 3 * cache.max_cache_len


def test_a_capture_that_fails_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(step: Any, steps: int) -> float:
        raise RuntimeError("operation not permitted when stream is capturing\nCUDA kernel errors might be ...")

    monkeypatch.setattr(layer, "graph_ms", refuse)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    found = layer._graph_or_reason(SimpleNamespace(device=torch.device("cuda")), 5)
    assert found == (None, "operation not permitted when stream is capturing")


# --- pictures ---------------------------------------------------------------------------------------------------------


MADE = {
    "device": "NVIDIA H200",
    "date": "2026-01-02T03:04:05+00:00",
    "versions": {"torch": "2.11.0", "transformers": "5.17.0"},
}


def report_of(*peaks: float | None) -> dict[str, Any]:
    rows = [
        {
            "model": "tiny", "dtype": "bfloat16", "cache": "dynamic", "batch": 4, "attn": attn, "prompt": prompt,
            "decode_ms": ms, "peak_GiB": peak,
        }
        for (attn, prompt, ms), peak in zip(
            [("flash_mla", 4096, 8.0), ("sdpa", 4096, 40.0), ("flash_mla", 64, 4.0)], peaks, strict=True
        )
    ]  # fmt: skip
    return {**MADE, "rows": rows}


def test_curves_are_by_attention_in_order_of_context() -> None:
    speed, peak = plots.curves(report_of(3.0, 9.0, 1.0)["rows"])
    assert speed == {"flash_mla": [(64, 1000.0), (4096, 500.0)], "sdpa": [(4096, 100.0)]}
    assert peak == {"flash_mla": [(64, 1.0), (4096, 3.0)], "sdpa": [(4096, 9.0)]}
    assert plots.curves(report_of(None, None, None)["rows"])[1] == {}


def test_pictures_of_a_report(tmp_path: Path) -> None:
    written = plots.draw_generate(report_of(3.0, 9.0, 1.0), tmp_path / "deep" / "run.png")
    assert written == [tmp_path / "deep" / "run-tokens.png", tmp_path / "deep" / "run-memory.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n") for path in written)
    assert plots.draw_generate(report_of(None, None, None), tmp_path / "folder") == [tmp_path / "folder" / "tokens.png"]
    with pytest.raises(ValueError, match="needs a report of"):
        plots.draw_generate({**MADE, "rows": [{"graph_ms": 1.0}]}, tmp_path)


def batches_of(*points: tuple[str, int, int, float], **more: Any) -> dict[str, Any]:
    """A report of (way, batch, prompt, ms)."""
    rows = []
    for way, batch, prompt, ms in points:
        attn, _, cache_dtype = way.partition(" ")
        rows.append(
            {
                "model": "tiny", "dtype": "bfloat16", "cache": "static", "batch": batch, "attn": attn, "prompt": prompt,
                "decode_ms": ms, "peak_GiB": None, "cache_dtype": cache_dtype or None,
            }
        )  # fmt: skip
    return {**MADE, "rows": rows, **more}


SWEEP = (
    ("flash_mla", 16, 4096, 9.0),
    ("sdpa", 16, 4096, 50.0),
    ("flash_mla", 1, 4096, 6.0),
    ("sdpa", 1, 4096, 8.0),
    ("flash_mla fp8", 1, 4096, 7.0),
)


def test_time_per_token_against_batch() -> None:
    found = plots.batch_curves(batches_of(*SWEEP)["rows"])
    assert found == {
        "flash_mla": [(1, 6.0), (16, 9.0)],  # milliseconds of the step, not divided by its rows
        "sdpa": [(1, 8.0), (16, 50.0)],
        "flash_mla fp8": [(1, 7.0)],
    }
    assert list(found) == ["flash_mla", "sdpa", "flash_mla fp8"]
    both = [*SWEEP, ("flash_mla", 16, 64, 5.0), ("flash_mla", 1, 64, 4.0)]
    assert plots.batch_curves(batches_of(*both)["rows"]) == {
        "flash_mla, context 64": [(1, 4.0), (16, 5.0)],
        "flash_mla, context 4,096": [(1, 6.0), (16, 9.0)],
        "sdpa, context 4,096": [(1, 8.0), (16, 50.0)],
        "flash_mla fp8, context 4,096": [(1, 7.0)],
    }
    speed, _ = plots.curves(batches_of(*both)["rows"])
    assert speed["flash_mla, batch 16"] == [(64, 3200.0), (4096, pytest.approx(1777.8, rel=1e-4))]
    assert speed["flash_mla fp8, batch 1"] == [(4096, pytest.approx(142.86, rel=1e-4))]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The axes of each picture, by the name of its file."""
    found: dict[str, Any] = {}
    write = plots._write

    def noting(figure: Any, axes: Any, path: Path) -> Path:
        found[path.name] = axes
        return write(figure, axes, path)

    monkeypatch.setattr(plots, "_write", noting)
    return found


def test_picture_of_several_batches(tmp_path: Path, drawn: dict[str, Any]) -> None:
    written = plots.draw_generate(batches_of(*SWEEP), tmp_path / "run.png")
    assert written == [tmp_path / "run-batch.png"], "one context: nothing to draw against it"
    assert written[0].read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    (axes,) = drawn.values()
    lines = {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.get_lines()}
    assert lines == {"flash_mla": ([1, 16], [6, 9]), "sdpa": ([1, 16], [8, 50]), "flash_mla fp8": ([1], [7])}
    assert "ms/token" in axes.get_ylabel()
    assert "batch" in axes.get_xlabel()
    title = axes.get_title(loc="left")
    for part in ("tiny", "bfloat16", "static", "context 4,096", "H200", "torch 2.11.0", "5.17.0", "2026-01-02"):
        assert part in title, part


def test_of_several_batches_and_contexts_colour_is_attention_and_line_is_the_other(
    tmp_path: Path, drawn: dict[str, Any]
) -> None:
    report = batches_of(*SWEEP, ("flash_mla", 16, 64, 5.0), ("flash_mla", 1, 64, 4.0))
    assert [path.name for path in plots.draw_generate(report, tmp_path)] == ["tokens.png", "batch.png"]
    looks = {line.get_label(): (line.get_color(), line.get_linestyle()) for line in drawn["batch.png"].get_lines()}
    assert looks["flash_mla, context 64"][0] == looks["flash_mla, context 4,096"][0]
    assert len({colour for colour, _ in looks.values()}) == 3
    assert len({style for _, style in looks.values()}) == 2
    assert len({*looks.values()}) == len(looks) == 4


def test_reports_are_joined_only_if_their_figures_belong_together() -> None:
    one, other = batches_of(*SWEEP[:2]), batches_of(*SWEEP[2:])
    joined = plots.join([one, other])
    assert joined["rows"] == batches_of(*SWEEP)["rows"]
    assert (joined["device"], joined["date"]) == (MADE["device"], MADE["date"])
    with pytest.raises(ValueError, match="needs one row of sdpa, batch 1, prompt 4096, got two: in reports 2 and 3"):
        plots.join([one, other, batches_of(SWEEP[3])])
    with pytest.raises(ValueError, match="needs one device, got 'NVIDIA H200' and 'a CPU'"):
        plots.join([one, {**other, "device": "a CPU"}])
    with pytest.raises(ValueError, match=r"needs one torch, got '2\.11\.0' and '2\.13\.0'"):
        plots.join([one, {**other, "versions": {**MADE["versions"], "torch": "2.13.0"}}])
    for name in ("model", "dtype", "cache"):
        with pytest.raises(ValueError, match=f"needs one {name}, got"):
            plots.join([one, {**other, "rows": [{**row, name: "other"} for row in other["rows"]]}])


# --- the command ------------------------------------------------------------------------------------------------------


def test_command_measures_several_contexts(tmp_path: Path) -> None:
    flags = ("--prompt", "100, 20", "--new-tokens", 4, "--rounds", 2, "--baseline", "sdpa", "--device", "cpu")
    text = command(*flags, "--prefill-chunk-size", 64, "--plot", tmp_path / "plots", "--out", tmp_path / "run.json")
    report = json.loads((tmp_path / "run.json").read_text())
    rows = report["rows"]
    assert [(row["prompt"], row["attn"]) for row in rows] == [
        (100, "flash_mla"),
        (100, "sdpa"),
        (20, "flash_mla"),
        (20, "sdpa"),
    ]
    assert (report["baseline"], report["rounds_in_turns"], report["not_measured"]) == ("sdpa", True, {})
    long, _, short, _ = rows
    assert long["context_ms"] == pytest.approx(long["decode_ms"] - short["decode_ms"], abs=2e-3)
    assert short["context_ms"] == 0
    assert {row["rounds"] for row in rows} == {2}
    assert {row["prefill_chunk_size"] for row in rows} == {64}
    assert long["backends"]["append torch"] == 3 * (2 + 3)
    assert (tmp_path / "plots" / "tokens.png").exists()
    for heading in ("TTFT s", "spread ms", "decode peak GiB", "cache GiB", "/ baseline", "context ms"):
        assert heading in text, heading
    assert "prompt 100: 1 of 1 rows have identical tokens" in text


def test_command_measures_several_batches_and_fp8_pages(tmp_path: Path) -> None:
    flags = ("--batch", "3,1", "--prompt", 20, "--new-tokens", 4, "--baseline", "sdpa", "--fp8", "--device", "cpu")
    text = command(*flags, "--plot", tmp_path / "plots", "--out", tmp_path / "run.json")
    report = json.loads((tmp_path / "run.json").read_text())
    rows = report["rows"]
    ways = [("flash_mla", None), ("sdpa", None), ("flash_mla", "fp8")]
    assert [(row["batch"], row["attn"], row["cache_dtype"]) for row in rows] == [
        (batch, *way) for batch in (3, 1) for way in ways
    ]
    ours, native, fp8 = rows[:3]
    # 208 of 320 bytes a row where pages are of bf16; the CPU's are of fp32.
    assert fp8["cache_bytes"] / ours["cache_bytes"] == 208 / 640
    assert ours["backends"] == fp8["backends"] == {"append torch": 3 * 4, "decode torch": 3 * 3}
    assert native["paths"] == {}
    assert [row["ratio"] for row in rows[1::3]] == [1, 1]
    assert ours["ratio"] == pytest.approx(ours["decode_ms"] / native["decode_ms"], abs=1e-4)
    assert [path.name for path in (tmp_path / "plots").iterdir()] == ["batch.png"]
    assert "batch 3, 1," in text
    assert "sdpa, batch 3, prompt 20: 3 of 3 rows have identical tokens to flash_mla's" in text
    assert re.search(r"flash_mla fp8, batch 1, prompt 20: \d of 1 rows have identical tokens", text)
    assert "flash_mla fp8, batch 1, prompt 20: deepseek_v2 prefill 3" in text
    assert re.search(r"┃ batch +┃ prompt +┃ attn +┃(.|\n)*│ 3 +│ 20 +│ flash_mla fp8 │", text)
    again = command_plot(tmp_path / "run.json", "--out", tmp_path / "again.png")
    assert again.split() == ["wrote", str(tmp_path / "again-batch.png")]


def test_fp8_pages_that_a_model_cannot_have_are_refused_before_anything_is_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(NAMED, "tiny", ("deepseek_v2", {**NAMED["tiny"][1], "kv_lora_rank": 96}))
    monkeypatch.delattr(bench, "measure")
    text = command("--fp8", "--device", "cpu", code=1)
    assert text.strip() == "ValueError: flash_mla: an FP8 cache needs a kv_lora_rank that 128 divides, got 96"


def command_plot(*flags: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, ["bench", "plot", *map(str, flags)])
    assert result.exit_code == code, result.output + str(result.exception)
    return result.output


def test_a_committed_report_is_drawn_and_others_are_refused(tmp_path: Path, drawn: dict[str, Any]) -> None:
    results = Path(__file__).resolve().parents[1] / "benchmarks" / "results"
    files = [results / "h200_v2_b16_p4096_static.json", results / "h200_v2_b1_p32768_static.json"]
    found = json.loads(command_plot(*files, "--out", tmp_path, "--json"))
    names = ["tokens.png", "memory.png", "batch.png"]
    assert found == {"reports": list(map(str, files)), "written": [str(tmp_path / name) for name in names]}
    line = next(line for line in drawn["batch.png"].get_lines() if line.get_label() == "flash_mla, context 64")
    assert list(line.get_xdata()) == [1, 16]
    for name in ("h200_kernel_cuda.json", "serve_load.json"):
        text = command_plot(results / name, "--out", tmp_path, code=1)
        assert f"{results / name} must be JSON of `flash-mla bench generate`, with rows: it is about '" in text
    broken = tmp_path / "broken.json"
    broken.write_text("{")
    assert "it is not JSON" in command_plot(broken, "--out", tmp_path, code=1)


def test_command_measures_layers_of_several_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = layer.time_layer
    monkeypatch.setattr(layer, "time_layer", lambda **options: original(**options, steps=2))
    flags = ("--model", "v3-layer", "--num-heads", 2, "--hidden-size", 32, "--prompt", 40, "--batch", "2,1")
    command(*flags, "--device", "cpu", "--out", tmp_path)
    (file,) = tmp_path.iterdir()
    assert file.name.startswith("layer-h2-b2-1-k40-")
    assert [row["batch"] for row in json.loads(file.read_text())["rows"]] == [2, 1]


def test_layers_that_do_not_fit_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = layer.time_layer

    def time_layer(**options: Any) -> layer.LayerResult:
        if options["attn"] == "sdpa":
            raise torch.OutOfMemoryError("tried to allocate 99 GiB")
        return original(**options, steps=2)

    monkeypatch.setattr(layer, "time_layer", time_layer)
    flags = ("--model", "v3-layer", "--num-heads", 2, "--hidden-size", 32, "--prompt", 40, "--baseline", "sdpa")
    text = command(*flags, "--device", "cpu", "--out", tmp_path / "run.json", code=1)
    report = json.loads((tmp_path / "run.json").read_text())
    assert [row["attn"] for row in report["rows"]] == ["flash_mla"]
    assert report["not_measured"] == {"sdpa, batch 1, prompt 40": "tried to allocate 99 GiB"}
    assert "not measured: sdpa, batch 1, prompt 40: tried to allocate 99 GiB" in text


def test_turns_can_be_asked_for(tmp_path: Path) -> None:
    flags = ("--prompt", 20, "--new-tokens", 3, "--no-warmup", "--device", "cpu", "--out", tmp_path / "run.json")
    command(*flags, "--cache", "static", "--turns")
    assert json.loads((tmp_path / "run.json").read_text())["rounds_in_turns"] is True


def test_without_rounds_and_baseline_the_table_has_no_such_columns() -> None:
    row = {
        "model": "tiny", "batch": 1, "new_tokens": 4, "cache": "static", "dtype": "bfloat16", "rounds": 1,
        "prompt": 64, "attn": "flash_mla", "ttft_s": 0.1, "decode_ms": 2.0, "tokens_per_s": 9.0, "peak_GiB": 1.25,
        "decode_peak_GiB": 0.5, "pages_GiB": 0.25, "decode_spread_ms": 0.0, "context_ms": 0.0, "context_spread_ms": 0.0,
    }  # fmt: skip
    table = generate_table([row], "H200", None)
    cells = {str(column.header): next(iter(column.cells)) for column in table.columns}
    assert cells == {
        "prompt": "64", "attn": "flash_mla", "TTFT s": "0.100", "ms/token": "2.00", "tokens/s": "9.0",
        "peak GiB": "1.25", "decode peak GiB": "0.50", "cache GiB": "0.25", "context ms": "0.00",
    }  # fmt: skip


def test_command_refuses_what_it_cannot_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for text in ("64,", "0", "64,64", "1k", "-5"):
        assert f"got '{text}'" in command("--prompt", text, code=2)
    for text in ("2,2", "0", "many"):
        assert f"different numbers of rows >= 1 with commas between, got '{text}'" in " ".join(
            command("--batch", text, code=2).replace("│", " ").split()
        )
    assert "got v3-layer" in command("--model", "v3-layer", "--fp8", code=2)
    assert "for flash_mla on a model, got sdpa, eager" in " ".join(
        command("--attn", "sdpa", "--baseline", "eager", "--fp8", code=2).replace("│", " ").split()
    )
    assert "records a GPU, got the device cpu" in command("--profile", "--device", "cpu", code=2)
    assert "got v3-layer" in command("--model", "v3-layer", "--plot", tmp_path, code=2)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    text = command("--device", "cpu", "--plot", tmp_path, code=1)
    pip = 'flash-mla bench generate --plot needs matplotlib: pip install "transformers-flash-mla[bench]"'
    assert text.strip() == f"ImportError: {pip}"
