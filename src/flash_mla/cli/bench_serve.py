"""`flash-mla bench serve`: its options, and what it prints; the clients are in `flash_mla.bench.serve`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import Json, Output, device_of, stop
from .progress import bars
from .results import Out, deliver

__all__ = ["serve"]


def serve(
    model: Annotated[str, typer.Option(help="Hub id or path.")] = "examples/tiny-deepseek-v3",
    clients: Annotated[int, typer.Option(min=3, help="At a time; every third one is broken or malicious.")] = 32,
    seconds: Annotated[float, typer.Option(min=1, help="How long they go on.")] = 600.0,
    new_tokens: Annotated[int, typer.Option(min=1, help="Of every answer that is waited for.")] = 16,
    max_growth: Annotated[float, typer.Option(min=0, help="MiB by which the server's memory may grow.")] = 16.0,
    device: Annotated[str | None, typer.Option(help="Default: a GPU if there is one.")] = None,
    seed: Annotated[int, typer.Option(help="Of who does what and when.")] = 0,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Load a server of its own with many clients, a third of them broken, and check answers, pages and memory."""
    try:
        from ..bench.serve import Setting, checks, measure
    except ImportError as error:
        stop(f"ImportError: {error}")
    from ..bench.report import cpu, machine

    where = device_of(device)
    setting = Setting(model, clients, seconds, new_tokens, seed=seed, server_options=("--device", device or "auto"))
    head = {**machine(where), **cpu()}
    with bars(as_json) as step:
        try:
            found = measure(setting, lambda passed: step("seconds", int(passed), int(seconds)))
        except RuntimeError as error:
            stop(str(error))
    held = checks(found, max_growth)
    every = max(1, len(found.memory) // 60)
    report = {
        **head,
        "what": "flash-mla serve under load; method: flash_mla.bench.serve",
        "model": model,
        "clients": clients,
        "seconds": seconds,
        "new_tokens": new_tokens,
        "answered": found.good,
        "latency_ms": found.latency_ms(),
        "wrong": found.wrong[:20],
        "broken": dict(sorted(found.broken.items())),
        "unexpected": found.unexpected[:20],
        "memory_growth_MiB": round(found.growth_MiB(), 2),
        "memory_MiB": found.memory[::every],
        "server": {name: value for name, value in found.metrics.items() if _is_worth_keeping(name)},
        "checks": held,
    }
    output = Output(as_json)
    output.say(
        f"{found.good} good answers in {seconds:g} s, latency "
        + ", ".join(f"{name} {value:.0f} ms" for name, value in found.latency_ms().items())
    )
    output.say("broken: " + ", ".join(f"{name} {count}" for name, count in sorted(found.broken.items())))
    if found.memory:
        output.say(
            f"server's memory: {found.memory[0][1]:.0f} MiB at first, {found.memory[-1][1]:.0f} at last, "
            f"{found.growth_MiB():+.1f} from the second quarter to the last"
        )
    for line in (*found.wrong[:20], *found.unexpected[:20]):
        typer.echo(line, err=True)
    for name, holds in held.items():
        if holds:
            output.say(f"ok: {name}")
        else:
            typer.echo(f"FAILED: {name}", err=True)
    deliver(report, f"serve-load-{Path(model).name}-c{clients}", out, as_json)
    if not all(held.values()):
        raise typer.Exit(1)


def _is_worth_keeping(name: str) -> bool:
    return name.startswith("flash_mla_") and "_created" not in name and "_bucket" not in name
