"""`flash-mla serve`: its options; what they do lives in `flash_mla.serving.serve`."""

from __future__ import annotations

import ipaddress
import json
from enum import Enum
from pathlib import Path
from typing import Annotated

import transformers
import typer

from .options import Json, stop

__all__ = ["serve"]


class Stored(str, Enum):
    """How pages hold tokens: as FP8 rows, or as the model computes."""

    fp8 = "fp8"
    model = "model"


def serve(
    model: Annotated[str, typer.Argument(help="Hub id or path: the one model of this server.")],
    host: Annotated[
        str, typer.Option(help="Address to listen on; the default is for this machine only.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option(
            envvar="FLASH_MLA_API_KEY",
            show_default=False,
            help="Requests need `Authorization: Bearer KEY`. Better in the environment: others see a command line.",
        ),
    ] = None,
    ctx: Annotated[
        int | None,
        typer.Option(min=2, help="Tokens of a request, new ones included. Default: the model's, at most 32768."),
    ] = None,
    cache: Annotated[Stored, typer.Option(help="Rows of the pages.")] = Stored.model,
    block_size: Annotated[int, typer.Option(min=16, help="Tokens per page.")] = 64,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="The most that a request may ask for.")] = 4096,
    max_body: Annotated[int, typer.Option(min=1, help="Bytes of a request's body.")] = 1 << 20,
    max_waiting: Annotated[int, typer.Option(min=0, help="Requests that may wait; the next one gets 429.")] = 64,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds for an answer, waiting included.")] = 600.0,
    device: Annotated[str, typer.Option(help="auto, cuda:0, cpu.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto: that of the weights.")] = "auto",
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code", help="Run the checkpoint's code.")] = False,
    emf: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="Add a CloudWatch metric line (EMF) per request to this file."),
    ] = None,
    emf_service: Annotated[
        str, typer.Option(envvar="FLASH_MLA_EMF_SERVICE", help="`Service` of these lines.")
    ] = "flash-mla",
    continuous_batching: Annotated[
        bool, typer.Option("--continuous-batching", help="Refused, with the reason.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Serve a model over HTTP as OpenAI's API has it, on paged latents; with /metrics and /ping.

    One line on standard output says when requests are answered, with --json as an object: URL, model, pages, limits.
    """
    if continuous_batching:
        stop(
            "flash-mla serve: --continuous-batching is refused: Transformers' continuous batching stores expanded keys "
            "and values in pages of its own and passes no mask, so latents are never read. Requests are answered one "
            "after the other; `transformers serve --continuous-batching --attn-implementation sdpa` batches them"
        )
    try:
        from ..serving.serve import Server, Settings
    except ImportError as error:
        stop(f"ImportError: {error}")
    if api_key == "":
        raise typer.BadParameter("must not be empty", param_hint="--api-key")
    settings = Settings(
        model=model,
        host=host,
        port=port,
        api_key=api_key,
        ctx=ctx,
        block_size=block_size,
        cache_dtype="fp8" if cache is Stored.fp8 else None,
        max_new_tokens=max_new_tokens,
        max_body=max_body,
        max_waiting=max_waiting,
        timeout=timeout,
        device=device,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
        emf=None if emf is None else str(emf),
        emf_service=emf_service,
    )
    if api_key is None and not _is_loopback(host):
        typer.echo(f"flash-mla serve: {host} is open to the network without --api-key", err=True)

    def ready(url: str) -> None:
        typer.echo(json.dumps(server.facts(url)) if as_json else f"ready: {model} on {url}")

    loading = transformers.utils.logging.is_progress_bar_enabled()
    if as_json:
        transformers.utils.logging.disable_progress_bar()
    try:
        server = Server(settings, on_ready=ready)
        server.run()
    except (ImportError, OSError, ValueError) as error:
        stop(f"{type(error).__name__}: {error}")
    finally:
        if loading:
            transformers.utils.logging.enable_progress_bar()


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
