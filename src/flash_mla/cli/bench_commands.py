"""`flash-mla bench`: its commands and their options; what they do lives in `flash_mla.bench`."""

from __future__ import annotations

import itertools
from dataclasses import asdict, replace
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import torch
import typer

from .bench_plot import plot as plot_command
from .bench_prefix import prefix
from .bench_serve import serve
from .options import Json, Output, device_of, dtype_of, numbers_of, stop
from .progress import bars
from .results import Out, deliver

if TYPE_CHECKING:
    from ..bench.decode_shapes import DecodeShape
    from ..bench.figures import Anchors

__all__ = ["bench"]

bench = typer.Typer(no_args_is_help=True, help="Measure on this machine; writes JSON with device, versions and date.")
bench.command("plot")(plot_command)
bench.command()(prefix)
bench.command()(serve)


class Attention(str, Enum):
    """Names of attention implementations that `bench generate` compares."""

    flash_mla = "flash_mla"
    sdpa = "sdpa"
    eager = "eager"


class CacheKind(str, Enum):
    """How the cache gets its memory: growing, or at fixed capacity (compiled by Transformers on a GPU)."""

    dynamic = "dynamic"
    static = "static"


@bench.command()
def kernel(
    batch: Annotated[
        int | None, typer.Option(min=1, help="Requests. Without it: every shape of the anchors, or a list of its own.")
    ] = None,
    seqlen_k: Annotated[int, typer.Option(min=1, help="Tokens in the cache per request.")] = 4096,
    num_heads: Annotated[int, typer.Option(min=1)] = 128,
    seqlen_q: Annotated[int, typer.Option(min=1, help="New tokens per request.")] = 1,
    varlen: Annotated[bool, typer.Option("--varlen", help="Lengths normal around seqlen_k.")] = False,
    kv_lora_rank: Annotated[int, typer.Option(min=16)] = 512,
    qk_rope_head_dim: Annotated[int, typer.Option(min=16)] = 64,
    block_size: Annotated[int, typer.Option(min=16, help="Tokens per page.")] = 64,
    fp8: Annotated[bool, typer.Option("--fp8", help="Caches of FP8 rows, beside rows of dtype in turns.")] = False,
    topk: Annotated[
        int | None, typer.Option(min=1, help="Sparse: each query reads so many random rows of its request.")
    ] = None,
    anchors: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="What others need, to compare with.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="bfloat16 or float16.")] = "bfloat16",
    backend: Annotated[
        str | None, typer.Option(help="Names with commas between, measured in turns. Default: the first that accepts.")
    ] = None,
    deterministic: Annotated[
        bool, typer.Option("--deterministic", help="Plan each request by its own length alone.")
    ] = False,
    rounds: Annotated[int, typer.Option(min=1, help="Bursts per backend; the figure is their median.")] = 4,
    burst: Annotated[float, typer.Option(min=0.001, help="Seconds of a burst.")] = 0.08,
    pause: Annotated[float, typer.Option(min=0, help="Idle seconds before each burst.")] = 0.1,
    sustained: Annotated[float, typer.Option(min=0, help="Also one burst of so many seconds; 0: none.")] = 0,
    cold: Annotated[bool, typer.Option(help="Also time single calls after an L2 flush.")] = True,
    ceilings: Annotated[bool, typer.Option(help="Measure copy, read and matmul rates in the same run.")] = True,
    append: Annotated[bool, typer.Option(help="Also time writing new tokens into their pages.")] = True,
    check: Annotated[
        bool | None, typer.Option(help="Compare some requests with fp64 first. Default: of backend cuda.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(dir_okay=False, help="Also draw the roofline, as this PNG.")] = None,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Time the decode kernel by shape on a GPU, beside the floor and the best of the anchors, losses included."""
    from ..bench import kernel as bench_kernel
    from ..bench.check import WrongResultError
    from ..bench.decode_shapes import DecodeShape
    from ..bench.figures import compare, read_anchors, summarize
    from ..bench.report import machine
    from ..bench.roofline import draw_roofline, require_matplotlib
    from ..codec import row_layout
    from ..contract import UnsupportedError
    from .tables import class_table, kernel_table, losses, rates

    known, latent = read_anchors(anchors) if anchors else None, (kv_lora_rank, qk_rope_head_dim, block_size)
    if topk is not None and varlen:
        raise typer.BadParameter("reads topk rows whatever the length: not with --varlen", param_hint="--topk")
    try:
        if batch is not None:
            shapes = [DecodeShape(batch, seqlen_q, seqlen_k, num_heads, varlen, *latent, fp8, topk)]
        else:
            shapes = _listed(known, fp8, topk)
        appends = ([False, True] if any(shape.fp8 for shape in shapes) else [False]) if append else []
        if True in appends:
            row_layout(kv_lora_rank, qk_rope_head_dim)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    if deterministic and any(shape.topk is not None for shape in shapes):
        raise typer.BadParameter("is about split plans, and sparse calls have none", param_hint="--deterministic")
    kind, names = dtype_of(dtype, None), _backends(backend)
    if plot is not None:
        if plot.suffix != ".png":
            raise typer.BadParameter(f"must end in .png, got {plot}", param_hint="--plot")
        try:
            require_matplotlib()  # before minutes are spent
        except ImportError as error:
            stop(f"ImportError: {error}")
    where = device_of(None)
    if where.type != "cuda":
        stop("flash-mla bench kernel: measures a GPU, and torch sees none here")
    timing, head = bench_kernel.Timing(rounds, burst, pause, sustained, cold), machine(where)
    results, appended, failed = [], {}, dict[str, str]()
    with bars(as_json, during_measurement=True) as step:
        step("ceilings, append", 0, 1)
        at_best = bench_kernel.measure_ceilings(timing) if ceilings else None
        for to_fp8 in appends:
            name = f"append{' fp8' * to_fp8}"
            try:
                appended[name] = bench_kernel.time_append(kind, timing, *latent, to_fp8)
            except (UnsupportedError, WrongResultError) as error:
                failed[name] = str(error)
        step("ceilings, append", 1, 1)
        for number, shape in enumerate(shapes):
            step("shapes", number, len(shapes))
            torch.cuda.empty_cache()
            try:
                measured, refused = bench_kernel.time_shape(shape, names, kind, timing, check, deterministic)
            except torch.OutOfMemoryError as error:
                measured, refused = [], {shape.name: str(error)}
            results += measured
            failed |= refused
            # As it comes: a later shape may end the process.
            for result in measured:
                typer.echo(f"{result.shape.name}, {result.backend}: {result.graph_ms:.4f} ms", err=True)
    rows = compare(results, known, at_best)
    summary, output = summarize(rows), Output(as_json)
    output.show(kernel_table(rows, head["device"]))
    if len(shapes) > 1:
        output.show(class_table(summary))
    for line in (*losses(rows), *rates(at_best, appended)):
        output.say(line)
    for name, error_text in failed.items():
        typer.echo(f"not measured: {name}: {error_text}", err=True)
    report = {
        **head,
        "what": "ops.decode (with topk: ops.sparse_decode) by shape; method: flash_mla.bench.kernel",
        "timing": {**asdict(timing), "deterministic": deterministic},
        "ceilings": None if at_best is None else asdict(at_best),
        **{
            key: {**asdict(appended[name]), "TBps": round(appended[name].TBps, 3)} if name in appended else None
            for key, name in (("append", "append"), ("append_fp8", "append fp8"))
        },
        "anchors": str(anchors) if anchors is not None else None,
        "anchor_ceilings": asdict(known.ceilings) if known is not None and known.ceilings is not None else None,
        "rows": rows,
        "summary": summary,
        "not_measured": failed,
    }
    listed = f"kernel{'-fp8' * fp8}{'' if topk is None else f'-top{topk}'}"
    deliver(report, listed if batch is None else f"kernel-{shapes[0].name}", out, as_json)
    if plot is not None and rows:
        typer.echo(f"wrote {draw_roofline(report, plot)}", err=as_json)
    if failed:
        raise typer.Exit(1)


def _listed(known: Anchors | None, fp8: bool, topk: int | None) -> list[DecodeShape]:
    """The shapes to measure where none is given: those of the anchors (with `topk`: those that have it), or ours."""
    from ..bench.decode_shapes import FP8_SHAPES, SHAPES, sparse_shapes

    if known is None:
        if topk is not None:
            return list(sparse_shapes(topk, fp8))
        return list(FP8_SHAPES if fp8 else SHAPES)
    shapes = [shape for shape in known.by_shape if topk in (None, shape.topk)]
    if not shapes:
        raise typer.BadParameter(f"no shape of the anchors has topk={topk}; --batch gives one", param_hint="--topk")
    return list(dict.fromkeys(replace(shape, fp8=shape.fp8 or fp8) for shape in shapes))


def _backends(names: str | None) -> list[str | None]:
    from ..ops import BACKENDS

    if names is None:
        return [None]
    chosen = [name.strip() for name in names.split(",")]
    for name in chosen:
        if name not in BACKENDS:
            raise typer.BadParameter(f"no such backend: {name!r}; have {', '.join(BACKENDS)}", param_hint="--backend")
    if len(set(chosen)) < len(chosen):
        raise typer.BadParameter(f"the same backend twice: {names}", param_hint="--backend")
    return [*chosen]


@bench.command()
def generate(
    model: Annotated[
        str, typer.Option(help="Hub id, path, or random weights: v2-lite, glm-4.7-flash, minicpm3, v3-layer, tiny.")
    ] = "tiny",
    batch: Annotated[str, typer.Option(help="Rows, with commas between.")] = "1",
    prompt: Annotated[
        str, typer.Option(help="Tokens per row, with commas between; for v3-layer, tokens in the cache.")
    ] = "1024",
    new_tokens: Annotated[int, typer.Option(min=3, help="Tokens to generate per row.")] = 32,
    attn: Annotated[Attention, typer.Option(help="Attention to measure.")] = Attention.flash_mla,
    cache: Annotated[CacheKind, typer.Option(help="Growing, or of fixed capacity and compiled.")] = CacheKind.dynamic,
    baseline: Annotated[Attention | None, typer.Option(help="Measure this attention too, to divide by.")] = None,
    fp8: Annotated[bool, typer.Option("--fp8", help="Measure flash_mla on pages of FP8 rows too.")] = False,
    rounds: Annotated[
        int, typer.Option(min=1, help="Runs per attention, batch and prompt; the figure is their median.")
    ] = 1,
    turns: Annotated[
        bool | None, typer.Option(help="Attentions take turns, round by round. Default: with a dynamic cache.")
    ] = None,
    experts: Annotated[str | None, typer.Option(help="experts_implementation: grouped_mm, batched_mm, eager.")] = None,
    prefill_chunk_size: Annotated[
        int | None, typer.Option(min=1, help="Tokens of the prompt per forward. Default: all at once.")
    ] = None,
    num_heads: Annotated[int, typer.Option(min=1, help="Heads of v3-layer.")] = 128,
    hidden_size: Annotated[int, typer.Option(min=1, help="Input columns of v3-layer.")] = 7168,
    device: Annotated[str | None, typer.Option(help="Default: a GPU if there is one.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Default: bfloat16 on a GPU, float32 on a CPU.")] = None,
    warmup: Annotated[bool, typer.Option(help="Run a few steps of the same shape first.")] = True,
    profile: Annotated[
        bool, typer.Option("--profile", help="Also record us of device time per step by kernel (4 late steps; CUDA).")
    ] = False,
    plot: Annotated[
        Path | None,
        typer.Option(
            help="Also draw tokens/s and GiB by context, ms/token by batch: a folder, or a prefix ending in .png."
        ),
    ] = None,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Time `generate()` step by step by batch and context: TTFT, ms per token, tokens/s, memory, cache, paths taken."""
    from ..bench import generate as bench_generate
    from ..bench.context import compare
    from ..bench.plots import draw_generate, require_matplotlib
    from ..bench.report import machine
    from ..bench.shapes import build_model
    from ..codec import row_layout
    from .tables import device_time_table, generate_table, ran, what

    where, kind = device_of(device), dtype_of(dtype, device)
    batches, prompts = numbers_of(batch, "--batch", "rows"), numbers_of(prompt, "--prompt")
    names = [attn.value] + ([baseline.value] if baseline is not None and baseline is not attn else [])
    if fp8 and (model == "v3-layer" or "flash_mla" not in names):
        got = model if model == "v3-layer" else ", ".join(names)
        raise typer.BadParameter(f"is for flash_mla on a model, got {got}", param_hint="--fp8")
    if profile and where.type != "cuda":
        raise typer.BadParameter(f"records a GPU, got the device {where}", param_hint="--profile")
    if profile and model != "v3-layer" and new_tokens < bench_generate.MIN_PROFILED_TOKENS:
        least = f"needs --new-tokens >= {bench_generate.MIN_PROFILED_TOKENS}, got {new_tokens}"
        raise typer.BadParameter(least, param_hint="--profile")
    if plot is not None:
        if model == "v3-layer":
            raise typer.BadParameter("draws generate() on a model, got v3-layer", param_hint="--plot")
        try:
            require_matplotlib()  # before minutes are spent
        except ImportError as error:
            stop(f"ImportError: {error}")
    head = machine(where)
    if model == "v3-layer":
        _layers(names, prompts, num_heads, batches, where, kind, hidden_size, profile, out, as_json)
        return
    ways = [(name, None) for name in names] + [("flash_mla", "fp8")] * fp8
    settings = [
        bench_generate.Setting(
            model, name, cache.value, rows, length, new_tokens, prefill_chunk_size, cache_dtype=cache_dtype
        )
        for rows, length in itertools.product(batches, prompts)
        for name, cache_dtype in ways
    ]
    in_turns = cache is CacheKind.dynamic if turns is None else turns
    with bars(as_json, during_measurement=True) as step:
        try:
            loaded = build_model(model, dtype=kind, device=where, attn_implementation=names[0])
        except ImportError as error:
            stop(f"ImportError: {error}")
        if fp8:
            config = loaded.config.get_text_config(decoder=True)
            try:
                row_layout(config.kv_lora_rank, config.qk_rope_head_dim)
            except (AttributeError, ValueError) as error:
                stop(f"{type(error).__name__}: {error}")
        if experts is not None:
            loaded.set_experts_implementation(experts)
        results, failed = bench_generate.measure(
            loaded,
            settings,
            rounds=rounds,
            in_turns=in_turns,
            warmup=warmup,
            profile=profile,
            report=lambda line: typer.echo(line, err=True),
            progress=lambda done, total: step("runs", done, total),
        )
    output = Output(as_json)
    against = names[1] if len(names) > 1 else None
    rows = compare([result.to_json() for result in results], against)
    if rows:
        output.show(generate_table(rows, head["device"], against))
    if profile and results:
        output.show(device_time_table(results))
    for result in results:
        output.say(ran(result))
    for result in results:
        if result.identical_rows is not None:
            same = f"{result.identical_rows} of {result.batch} rows have identical tokens"
            output.say(f"{what(result)}: {same} to {names[0]}'s")
    for name, error_text in failed.items():
        typer.echo(f"not measured: {name}: {error_text}", err=True)
    report = {
        **head,
        "what": "generate(), greedy; method: flash_mla.bench.generate",
        "baseline": against,
        "experts": experts,
        "rounds_in_turns": in_turns,
        "rows": rows,
        "not_measured": failed,
    }
    stem = f"generate-{Path(model).name}-b{_joined(batches)}-p{_joined(prompts)}-{cache.value}"
    deliver(report, stem, out, as_json)
    if plot is not None and rows:
        for path in draw_generate(report, plot):
            typer.echo(f"wrote {path}", err=as_json)
    if failed:
        raise typer.Exit(1)


def _joined(numbers: list[int]) -> str:
    return "-".join(map(str, numbers))


def _layers(
    names: list[str],
    prompts: list[int],
    num_heads: int,
    batches: list[int],
    device: torch.device,
    dtype: torch.dtype,
    hidden_size: int,
    profile: bool,
    out: Path | None,
    as_json: bool,
) -> None:
    from ..bench.layer import time_layer
    from ..bench.report import machine
    from .tables import device_time_table, layer_table, ran

    head = machine(device)
    layers, failed = [], dict[str, str]()
    with bars(as_json, during_measurement=True) as step:
        runs = list(itertools.product(batches, prompts, names))
        for number, (batch, length, name) in enumerate(runs):
            step("runs", number, len(runs))
            try:
                layer = time_layer(
                    attn=name,
                    num_heads=num_heads,
                    batch=batch,
                    prompt=length,
                    device=device,
                    dtype=dtype,
                    hidden_size=hidden_size,
                    profile=profile,
                )
            except torch.OutOfMemoryError as error:
                failed[f"{name}, batch {batch}, prompt {length}"] = str(error)
            else:
                layers.append(layer)
    output = Output(as_json)
    if layers:
        output.show(layer_table(layers, head["device"]))
    if profile and layers:
        output.show(device_time_table(layers))
    for layer in layers:
        output.say(ran(layer))
    for name, error_text in failed.items():
        typer.echo(f"not measured: {name}: {error_text}", err=True)
    report = {
        **head,
        "what": "decode step of one DeepseekV3Attention; method: flash_mla.bench.layer",
        "rows": [row.to_json() for row in layers],
        "not_measured": failed,
    }
    deliver(report, f"layer-h{num_heads}-b{_joined(batches)}-k{_joined(prompts)}", out, as_json)
    if failed:
        raise typer.Exit(1)
