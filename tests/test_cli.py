"""The `flash-mla` command: what it prints and writes, on a machine without a GPU."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import transformers
from typer.testing import CliRunner

from flash_mla import _build, ops
from flash_mla.backends import torch as definition
from flash_mla.backends.cuda import driver
from flash_mla.bench import generate as bench_generate
from flash_mla.bench import layer as bench_layer
from flash_mla.bench import shapes as bench_shapes
from flash_mla.cli.app import app
from flash_mla.cli.env import others_named_flash_mla, problems
from flash_mla.cli.progress import bars

ROOT = Path(__file__).resolve().parents[1]
TINY = ROOT / "examples" / "tiny-deepseek-v3"


def run(*arguments: str, code: int = 0) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output + str(result.exception)
    return result.output


def only_report(folder: Path) -> dict[str, object]:
    (file,) = folder.glob("*.json")
    return json.loads(file.read_text())


# --- import -----------------------------------------------------------------------------------------------------------


def test_importing_flash_mla_does_not_import_the_command_line() -> None:
    # typer and rich are Transformers' to bring. Transformers itself may load either, so its own part is taken off.
    code = (
        "import sys, transformers.generation.utils, transformers.modeling_utils; before = set(sys.modules)\n"
        "import flash_mla; new = set(sys.modules) - before\n"
        "print([m for m in new if m.startswith(('typer', 'rich', 'flash_mla.cli', 'flash_mla.bench'))])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_without_typer_the_error_is_a_pip_line() -> None:
    code = "import sys; sys.modules['typer'] = None\nfrom flash_mla.cli import main\nmain()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith("ImportError: flash-mla needs typer: pip install typer")


# --- env --------------------------------------------------------------------------------------------------------------


def test_env_names_versions_devices_and_reasons() -> None:
    text = run("env")
    assert torch.__version__ in text
    assert 'attn_implementation="flash_mla" is registered' in text
    assert "decode runs on" in text
    report = json.loads(run("env", "--json"))
    assert report["package"] == str(ROOT / "src" / "flash_mla")
    cpu = report["devices"][-1]
    shapes = [shape for shapes in cpu["runs"].values() for shape in shapes]
    assert sorted(shapes) == sorted(["512+64", "256+64", "256+32", "128+32"])
    if not report["triton_interpret"]:
        assert list(cpu["runs"]) == ["torch"]
        assert "needs a GPU" in cpu["refused"]["triton"][0]
    if torch.cuda.is_available():
        assert report["devices"][0]["device"] == "cuda:0"


@pytest.fixture
def cubins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The package's cubins for the length of a test: an empty folder, and one kernel to compile into it."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "one.cu").write_text('extern "C" __global__ void one(float* p) { *p = 1; }\n')
    for module in (_build, driver):
        monkeypatch.setattr(module, "CUBINS", tmp_path / "cubins")
    monkeypatch.setattr(_build, "KERNELS", tmp_path / "kernels")
    driver.reset()
    yield tmp_path / "cubins"
    driver.reset()


def compiled(text: str) -> list[str]:
    """The lines about compiled kernels, from the first to the one before the next heading."""
    lines = text.splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("compiled kernels"))
    return lines[first : next(i for i, line in enumerate(lines) if line.startswith("transformers  ") and i > first)]


def test_env_without_compiled_kernels(cubins: Path) -> None:
    code = 5 if any(torch.cuda.get_device_capability(n) == (9, 0) for n in range(torch.cuda.device_count())) else 0
    report = json.loads(CliRunner().invoke(app, ["env", "--json"]).stdout)["compiled_kernels"]
    assert (report["cubins"], report["stale"]) == ({}, [])
    assert report["unavailable"].startswith("kernel not built: ")
    none, reason = compiled(run("env", code=code))
    assert none.split() == ["compiled", "kernels", "none"]
    assert reason.startswith("  cannot run")
    assert "kernel not built" in reason


def test_env_names_compiled_kernels_and_what_keeps_them_from_running(
    cubins: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels = cubins.parent / "kernels"
    _build.build(kernels=kernels, out=cubins)

    def missing() -> None:
        raise OSError

    monkeypatch.setattr(driver, "_load_library", missing)
    size = (cubins / "one.cubin").stat().st_size
    report = json.loads(run("env", "--json"))["compiled_kernels"]
    assert list(report["cubins"]) == ["one.cubin"]
    one = report["cubins"]["one.cubin"]
    assert (one["bytes"], one["arch"], one["defines"]) == (size, "sm_90a", [])
    assert report["unavailable"] == "no NVIDIA driver (libcuda.so.1 not found)"
    lines = compiled(run("env"))
    assert f"one (sm_90a, {one['compiler']}, {size / 1024:.0f} KiB)" in lines[0]
    assert lines[1].endswith("no NVIDIA driver (libcuda.so.1 not found)")
    assert len(lines) == 2
    (kernels / "one.cu").write_text('extern "C" __global__ void one(float* p) { *p = 2; }\n')
    lines = compiled(run("env", code=5))
    assert "OUT OF DATE" in lines[1]
    assert "one.cubin is older than its source: python -m flash_mla._build" in lines[1]


def test_env_says_when_compiled_kernels_can_run(fake_driver: Callable[..., object]) -> None:
    fake_driver()
    assert "can run" in compiled(run("env"))[-1]
    assert json.loads(run("env", "--json"))["compiled_kernels"]["unavailable"] is None


def test_env_says_when_the_name_is_not_registered() -> None:
    import flash_mla

    flash_mla.unregister()
    try:
        assert "NOT registered" in run("env", code=4)
    finally:
        flash_mla.register()


def test_env_finds_what_else_is_called_flash_mla(tmp_path: Path) -> None:
    own = ROOT / "src" / "flash_mla"
    assert others_named_flash_mla(own, [str(own.parent)]) == []
    site = tmp_path / "site"
    (site / "flash_mla").mkdir(parents=True)
    (site / "flash_mla" / "__init__.py").write_text("")
    (site / "flash_mla.abi3.so").write_text("")
    info = site / "flash_mla-1.0.0+9241ae3.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: flash_mla\nVersion: 1.0.0+9241ae3\n")
    (info / "RECORD").write_text("flash_mla/__init__.py,,\n")
    ours = site / "transformers_flash_mla-0.1.0.dist-info"
    ours.mkdir()
    (ours / "METADATA").write_text("Metadata-Version: 2.1\nName: transformers-flash-mla\nVersion: 0.1.0\n")
    (ours / "RECORD").write_text("flash_mla/__init__.py,,\n")
    found = others_named_flash_mla(own, [str(own.parent), str(site)])
    assert len(found) == 3
    assert f"another package flash_mla: {site / 'flash_mla'}" in found
    assert any("flash_mla.abi3.so" in line for line in found)
    assert any("distribution flash_mla 1.0.0+9241ae3" in line for line in found)


def exit_code(*arguments: str) -> tuple[int, list[str]]:
    """Of `flash-mla env`: the exit code, and what it says is wrong on standard error; --json says the same."""
    result = CliRunner().invoke(app, ["env", *arguments])
    machine = CliRunner().invoke(app, ["env", "--json", *arguments])
    report = json.loads(machine.stdout)
    assert result.exit_code == machine.exit_code == report["exit_code"], result.output
    wrong = [line for line in result.stderr.splitlines() if line.startswith("WRONG")]
    assert wrong == [f"WRONG ({problem['exit_code']}): {problem['what']}" for problem in report["problems"]]
    return result.exit_code, wrong


def devices_of(backend: str) -> list[str]:
    return [device["device"] for device in json.loads(run("env", "--json"))["devices"] if backend in device["accepts"]]


def test_env_exits_with_0_where_nothing_is_wrong_and_no_gpu_is_nothing_wrong() -> None:
    assert exit_code() == (0, [])


@pytest.mark.parametrize("backend", ["cuda", "triton", "torch"])
def test_env_insists_on_a_backend(backend: str) -> None:
    code, wrong = exit_code("--require", backend)
    assert backend != "torch" or devices_of(backend)
    if devices_of(backend):
        assert (code, wrong) == (0, [])
    else:
        assert code == 6
        (line,) = wrong
        assert line.startswith(f"WRONG (6): backend {backend} does not run here: ")
        assert "cpu: " in line


def test_env_says_that_the_driver_is_there_and_torch_sees_no_gpu() -> None:
    report = json.loads(run("env", "--json"))
    alone = {**report, "driver": "580.65.06", "devices": report["devices"][-1:]}
    (problem,) = problems(alone, "cuda")
    assert problem["exit_code"] == 6
    assert f"driver 580.65.06 is there, but torch {torch.__version__}, built for " in problem["what"]


def test_env_exits_with_5_where_kernels_are_missing_on_hopper(cubins: Path) -> None:
    report = json.loads(run("env", "--json"))
    hopper = {"device": "cuda:0", "capability": "9.0", "runs": {"triton": ["512+64"]}, "accepts": {}, "refused": {}}
    (problem,) = problems({**report, "devices": [hopper, *report["devices"]]})
    assert problem["exit_code"] == 5
    assert problem["what"].startswith("no compiled kernels for cuda:0: kernel not built")
    older = {**hopper, "capability": "8.0"}
    assert problems({**report, "devices": [older, *report["devices"]]}) == []


def test_env_exits_with_3_before_everything_else(tmp_path: Path, cubins: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "flash_mla.abi3.so").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.setattr(ops, "BACKENDS", {})
    code, wrong = exit_code()
    assert code == 3
    assert wrong[0] == f"WRONG (3): a module of that name: {tmp_path / 'site' / 'flash_mla.abi3.so'}"
    assert [line[:9] for line in wrong[1:]] == ["WRONG (7)"] * (len(wrong) - 1)


def test_env_exits_with_7_where_no_backend_takes_a_device(cubins: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "BACKENDS", {})
    code, wrong = exit_code()
    assert code == 7
    assert wrong[-1] == "WRONG (7): no backend takes latent+rope 512+64, 256+64, 256+32, 128+32 on cpu"


# --- JSON and progress bars -------------------------------------------------------------------------------------------

SMALL = ("bench", "generate", "--model", "tiny", "--prompt", "20", "--new-tokens", "3", "--device", "cpu")
PREFIX = ("bench", "prefix", "--prefix", "70", "--rounds", "1", "--new-tokens", "2", "--device", "cpu")
LAYER = ("bench", "generate", "--model", "v3-layer", "--num-heads", "2", "--hidden-size", "32", "--prompt", "33")


@pytest.mark.parametrize(
    ("arguments", "members"),
    [
        (("env",), {"devices", "compiled_kernels", "in_the_way", "exit_code"}),
        (("estimate", "tiny", "--gpu-mem", "8"), {"formats", "weights_bytes"}),
        (("verify", "tiny", "--prompt-tokens", "20", "--new-tokens", "3", "--device", "cpu"), {"runs", "failed"}),
        (("verify", "tiny-layer", "--prompt-tokens", "70", "--device", "cpu"), {"rows", "kv_lora_rank"}),
        (SMALL, {"rows", "command", "versions"}),
        ((*LAYER, "--device", "cpu"), {"rows", "command", "versions"}),
        (PREFIX, {"rows", "command", "versions"}),
        (
            ("cost", str(ROOT / "benchmarks" / "results" / "h200_v2_b32_dynamic.json"), "--price-per-hour", "4"),
            {"rows", "price_per_hour"},
        ),
    ],
    ids=lambda value: "-".join(value[:2]) if isinstance(value, tuple) else "",
)
@pytest.mark.usefixtures("definition_only")
def test_json_is_all_that_stands_on_standard_output(
    arguments: tuple[str, ...],
    members: set[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        app([*arguments, "--json"])
    assert ended.value.code == 0
    out, err = capfd.readouterr()
    assert members <= json.loads(out, parse_constant=pytest.fail).keys()
    assert "━" not in err  # no bar
    assert not (tmp_path / "benchmarks").exists()  # nor a file that was not asked for


@pytest.mark.usefixtures("definition_only")
def test_bench_writes_a_file_beside_json_where_one_is_named(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, [*SMALL, "--json", "--out", str(tmp_path / "a.json")])
    assert json.loads(result.stdout) == json.loads((tmp_path / "a.json").read_text())
    assert f"wrote {tmp_path / 'a.json'}" in result.stderr


class Terminal:
    """A pseudo-terminal in the place of standard error, and what was drawn on it."""

    def __init__(self) -> None:
        self.reader, writer = os.openpty()
        self.stream = os.fdopen(writer, "w", buffering=1)

    def drawn(self) -> str:
        self.stream.flush()
        os.set_blocking(self.reader, False)
        parts = []
        with contextlib.suppress(BlockingIOError):
            while part := os.read(self.reader, 1 << 16):
                parts.append(part)
        return b"".join(parts).decode()


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ((*SMALL, "--baseline", "sdpa", "--rounds", "2"), "runs"),
        ((*LAYER, "--baseline", "sdpa", "--device", "cpu"), "runs"),
        (PREFIX, "lengths"),
        (("verify", "tiny", "--prompt-tokens", "20", "--new-tokens", "3", "--device", "cpu"), "reference"),
        (("verify", "tiny-layer", "--prompt-tokens", "70", "--device", "cpu"), "outlier columns"),
    ],
    ids=["generate", "layer", "prefix", "verify", "verify-layer"],
)
@pytest.mark.usefixtures("definition_only")
def test_a_bar_is_drawn_for_a_person_and_not_beside_json(
    arguments: tuple[str, ...], name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    for as_json in (False, True):
        terminal = Terminal()
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stderr", terminal.stream)
            with pytest.raises(SystemExit) as ended:
                app([*arguments, *(["--json"] * as_json)])
        assert ended.value.code == 0
        drawn = terminal.drawn()
        assert (f"{name} " in drawn and "━" in drawn) != as_json, drawn


def test_a_bar_says_how_far_it_is_at_once_and_is_gone_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal.stream)
    threads = threading.active_count()
    with bars(False, during_measurement=True) as step:
        step("runs", 0, 3)
        assert "0/3" in terminal.drawn()
        step("runs", 2, 3)
        assert "2/3" in terminal.drawn()
        assert threading.active_count() == threads, "nobody redraws while something is measured"
    assert terminal.drawn().endswith("\x1b[2K"), "the line is erased"
    with bars(False):
        assert threading.active_count() == threads + 1


@pytest.mark.parametrize(
    ("quiet", "is_terminal", "off"), [(False, True, False), (True, True, True), (False, False, True)]
)
def test_without_bars_transformers_has_none_either_until_the_end(
    quiet: bool, is_terminal: bool, off: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal.stream if is_terminal else io.StringIO())
    transformers.utils.logging.enable_progress_bar()
    with bars(quiet) as step:
        step("runs", 1, 2)
        assert transformers.utils.logging.is_progress_bar_enabled() != off
    assert transformers.utils.logging.is_progress_bar_enabled()
    assert ("runs" in terminal.drawn()) != off
    if not is_terminal:
        assert sys.stderr.getvalue() == ""


@pytest.mark.usefixtures("definition_only")
def test_the_bar_of_bench_generate_moves_between_runs() -> None:
    seen = []
    model = bench_shapes.build_model(
        "tiny", dtype=torch.float32, device=torch.device("cpu"), attn_implementation="sdpa"
    )
    settings = [bench_generate.Setting("tiny", "sdpa", "dynamic", 1, length, 3) for length in (5, 9)]
    forwards = []
    hook = model.register_forward_hook(lambda *_: forwards.append(None))
    bench_generate.measure(
        model,
        settings,
        rounds=2,
        warmup=False,
        report=lambda line: None,
        progress=lambda done, total: seen.append((done, total, len(forwards))),
    )
    hook.remove()
    assert seen == [(done, 4, 3 * done) for done in range(5)]


# --- bench generate ---------------------------------------------------------------------------------------------------


@pytest.fixture
def definition_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not Triton's interpreter, which the tests switch on: seconds per step."""
    monkeypatch.setattr(ops, "BACKENDS", {"torch": definition})
    ops._choose.cache_clear()
    yield
    ops._choose.cache_clear()


@pytest.mark.usefixtures("definition_only")
def test_bench_generate_on_the_tiny_checkpoint(tmp_path: Path) -> None:
    flags = ("--model", TINY, "--batch", 2, "--prompt", 40, "--new-tokens", 6, "--baseline", "sdpa", "--device", "cpu")
    text = run("bench", "generate", *flags, "--out", tmp_path)
    report = only_report(tmp_path)
    ours, native = report["rows"]
    assert (ours["attn"], native["attn"]) == ("flash_mla", "sdpa")
    assert ours["paths"] == {"deepseek_v3 prefill": 4, "deepseek_v3 absorbed": 4 * 5}
    assert ours["backends"] == {"append torch": 4 * 6, "decode torch": 4 * 5}
    assert native["paths"] == {}
    (steps,), (native_steps,) = ours["step_ms"], native["step_ms"]  # one round each
    assert len(steps) == len(native_steps) == 5
    assert all(step > 0 for step in steps)
    assert ours["decode_ms"] == pytest.approx(sorted(steps[2:])[1], abs=1e-3)
    # A padded cache of latents: 2 rows x 45 positions x 160 columns x 4 bytes x 4 layers.
    assert native["cache_bytes"] == 2 * 45 * 160 * 4 * 4
    # Pages: each row one of 64, and the one for padding; whatever the pool has beyond them.
    assert ours["cache_bytes"] >= 3 * 64 * 160 * 4 * 4
    assert (ours["identical_rows"], native["identical_rows"]) == (None, 2)
    assert "prompt 40: 2 of 2 rows have identical tokens" in text
    assert report["versions"]["torch"]
    assert report["date"]


@pytest.mark.usefixtures("definition_only")
def test_bench_generate_static_and_eager(tmp_path: Path) -> None:
    flags = ("--model", "tiny", "--prompt", 20, "--new-tokens", 4, "--cache", "static", "--no-warmup")
    run("bench", "generate", *flags, "--attn", "flash_mla", "--baseline", "eager", "--device", "cpu", "--out", tmp_path)
    report = only_report(tmp_path)
    assert [row["attn"] for row in report["rows"]] == ["flash_mla", "eager"]
    assert report["rows"][0]["paths"]["deepseek_v2 absorbed"] == 3 * 3
    assert report["rows"][1]["identical_rows"] == 1
    assert report["rounds_in_turns"] is False


@pytest.mark.usefixtures("definition_only")
def test_bench_generate_of_one_layer(tmp_path: Path) -> None:
    flags = ("--model", "v3-layer", "--num-heads", 2, "--hidden-size", 32, "--prompt", "65,256", "--batch", 2)
    text = run("bench", "generate", *flags, "--baseline", "sdpa", "--device", "cpu", "--out", tmp_path)
    ours, native, *longer = only_report(tmp_path)["rows"]
    assert [(row["attn"], row["prompt"], row["seqlen_k"]) for row in (ours, native, *longer)] == [
        ("flash_mla", 65, 96),
        ("sdpa", 65, 96),
        ("flash_mla", 256, 288),
        ("sdpa", 256, 288),
    ]
    assert (ours["graph_ms"], ours["graph_reason"]) == (None, "a CUDA graph needs a GPU")
    assert ours["paths"] == {"deepseek_v3 absorbed": 55}
    assert native["paths"] == {}
    assert ours["ms"] > 0
    assert "absorbed 55" in text


@pytest.mark.usefixtures("definition_only")
def test_layer_step_is_the_same_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    # Both attentions of the layer benchmark get the same weights and the same context: their outputs agree.
    outputs = []
    original = torch.nn.Linear.forward

    def forward(self: torch.nn.Linear, x: torch.Tensor) -> torch.Tensor:
        result = original(self, x)
        if self.out_features == 32 and self.in_features == 2 * 128:  # o_proj
            outputs.append(result)
        return result

    monkeypatch.setattr(torch.nn.Linear, "forward", forward)
    for attn in ("flash_mla", "sdpa"):
        bench_layer.time_layer(
            attn=attn, num_heads=2, batch=2, prompt=70, device=torch.device("cpu"), dtype=torch.float64,
            hidden_size=32, steps=2,
        )  # fmt: skip
    assert len(outputs) == 2 * 7  # five to warm up and two
    for ours, native in zip(outputs[:7], outputs[7:], strict=True):
        torch.testing.assert_close(ours, native, rtol=1e-6, atol=1e-9)
        assert ours.abs().max() > 0


def test_clock_takes_the_median_of_the_late_steps() -> None:
    clock = bench_generate.StepClock(torch.device("cpu"))
    clock.stamps = [3.0, 8.0, 18.0, 19.0, 20.0, 22.0, 23.0]
    assert clock.ttft_s == 5.0
    assert clock.step_ms == [10000.0, 1000.0, 1000.0, 2000.0, 1000.0]
    assert clock.late_ms == 1000.0
    stopping = bench_generate.StepClock(torch.device("cpu"), stop_after=2)
    stopping.start()
    ids = torch.zeros(3, 1, dtype=torch.long)
    assert [stopping(ids, None).tolist() for _ in range(2)] == [[False] * 3, [True] * 3]


def test_wrong_options_are_refused_with_a_line() -> None:
    assert "no such dtype: int9" in run("bench", "generate", "--dtype", "int9", code=2)
    assert "is not one of" in run("bench", "generate", "--attn", "flash_attention_2", code=2)
