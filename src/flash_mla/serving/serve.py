"""`transformers serve` on paged latents: which of its parts answer, and what this server adds around them.

Transformers' own are the model manager, the queue of one inference thread, and the handlers of chat and text
completions, so JSON and SSE are what `transformers serve` sends. Ours are the name that its allow-list does not have,
the pages (`turn.py`), what a body may say (`body.py`), key and limits (`gate.py`), `/metrics` and `/ping`. Its routes
that load, unload or fetch what a client names are left out.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

# In this order: Transformers' serving modules fail with a NameError where these are missing.
try:
    import fastapi  # noqa: F401
    import openai  # noqa: F401
    import prometheus_client
    import uvicorn
except ImportError as error:
    missing = error.name
    raise ImportError(
        f"flash_mla.serving.serve needs {missing}: pip install 'transformers-flash-mla[serve]'", name=missing
    ) from None

import torch
import transformers
from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from jinja2 import TemplateError
from starlette.exceptions import HTTPException as StarletteHTTPException
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.utils import GenerationState
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from ..hf.register import NAME, register
from .body import ChatBody, CompletionBody
from .emf import EmfWriter, RequestNumbers
from .gate import Gate, Ticket, current_ticket, error_body
from .metrics import Metrics
from .turn import EndedError, FailedError, Turns

__all__ = ["Server", "Settings"]

logger = logging.getLogger(__name__)

# A file that is missing is None.
QUIETLY = {"_raise_exceptions_for_missing_entries": False}
# Of a request, where `ctx` does not say and the model has room for more: 2.1 GiB of V3's latents in bf16.
DEFAULT_CTX = 32768
# Seconds that a stopping server gives to the answers under way, and then to the errors that end them.
GOODBYE_SECONDS = 5.0
ERRORS_SECONDS = 5
# Of an answer that ended before its end; 499, as nginx has it: the client left.
ENDED_STATUS = {"left": 499, "stopped": 503, "timed_out": 504}


@dataclass(frozen=True)
class Settings:
    """What a server is started with.

    Attributes:
        model: Hub id or path; the only name that requests may ask for.
        host, port: where it listens; port 0 takes a free one.
        api_key: what `Authorization: Bearer` must say; None: nothing.
        ctx: tokens of a request, new ones included: pages for so many are reserved. None: what the model's config says,
            at most 32,768.
        block_size: tokens per page.
        cache_dtype: "fp8", or None: as the model computes.
        max_new_tokens: the most that a request may ask for.
        max_body: bytes of a request's body.
        max_waiting: requests that may wait for their turn; the next one gets 429.
        timeout: seconds for an answer, waiting included.
        device, dtype: as `transformers serve` has them.
        trust_remote_code: run the checkpoint's own code.
        emf: a file that is there, to which each request for an answer adds a CloudWatch metric line; None: none.
        emf_service: the `Service` of these lines.
    """

    model: str
    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None
    ctx: int | None = None
    block_size: int = 64
    cache_dtype: str | None = None
    max_new_tokens: int = 4096
    max_body: int = 1 << 20
    max_waiting: int = 64
    timeout: float = 600.0
    device: str = "auto"
    dtype: str = "auto"
    trust_remote_code: bool = False
    emf: str | None = None
    emf_service: str = "flash-mla"


class _Models(ModelManager):
    """Transformers' model manager, which knows one attention more and reads no pickle."""

    attn_implementation: str | None

    def _validate_args(self) -> None:
        # The list of names is written inside the method, so ours is taken out of its sight.
        asked = self.attn_implementation
        self.attn_implementation = None if asked == NAME else asked
        super()._validate_args()
        self.attn_implementation = asked

    def _load_model(self, model_id_and_revision: str, *args: Any, gguf_file: str | None = None, **more: Any) -> Any:
        model_id, revision = model_id_and_revision.split("@", 1)
        # Transformers takes safetensors where there are any, and else unpickles.
        names = (SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME) if gguf_file is None else ()
        found = [cached_file(model_id, name, revision=revision, **QUIETLY) for name in names]
        if names and not any(found):
            raise ValueError(f"flash-mla serve: {model_id} has no safetensors, and pickled weights are not read")
        return super()._load_model(model_id_and_revision, *args, gguf_file=gguf_file, **more)


class _OneQueue(GenerationState):
    """Sends every request to the same turns."""

    def __init__(self, turns: Turns) -> None:
        super().__init__()
        self._turns = turns

    def get_manager(self, model_id: str, use_cb: bool = False) -> Turns:
        return self._turns


class _Uvicorn(uvicorn.Server):
    """Says goodbye to the answers under way; uvicorn by itself cuts them off without a word."""

    def __init__(self, config: Any, gate: Gate) -> None:
        super().__init__(config)
        self._gate = gate

    async def shutdown(self, *args: Any, **more: Any) -> None:
        asyncio.get_running_loop().call_later(GOODBYE_SECONDS, self._gate.end_all)
        await super().shutdown(*args, **more)


class Server:
    """An HTTP server for one model; `run()` blocks until it is stopped.

    Args:
        settings: what to serve, where, within which limits.
        on_ready: called once with the server's address, from the thread that loaded and warmed the model.

    Raises: OSError, ValueError: of `EmfWriter`.

    The port is open while the model loads: `/ping` answers 503 then, and 200 as soon as a request would be answered.
    """

    def __init__(self, settings: Settings, on_ready: Callable[[str], None] | None = None) -> None:
        self.settings = settings
        self.on_ready = on_ready
        self.metrics = Metrics()
        self.turns = Turns(self.metrics, max_new_tokens=settings.max_new_tokens, max_waiting=settings.max_waiting)
        self._emf = None
        if settings.emf is not None:
            self._emf = EmfWriter({"Service": settings.emf_service}, path=settings.emf)
        self.is_warm = False
        self.failure: BaseException | None = None
        self._models: _Models | None = None
        self._handlers: dict[str, Any] = {}
        app = Gate(
            self._routes(),
            self.metrics,
            api_key=settings.api_key,
            max_body=settings.max_body,
            timeout=settings.timeout,
            on_answer=None if settings.emf is None else self._write_line,
        )
        self._uvicorn = _Uvicorn(
            uvicorn.Config(
                app,
                host=settings.host,
                port=settings.port,
                # The parser that every installation has; "auto" would take another where one is found.
                http="h11",
                ws="none",
                log_level="error",  # not a line for whoever sends noise
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=int(GOODBYE_SECONDS) + ERRORS_SECONDS,
            ),
            app,
        )

    def run(self) -> None:
        """Listen, load, warm, answer, until a signal or `stop()`.

        Raises: whatever loading the model raised.
        """
        register()
        # It logs a line at WARNING for every request.
        logging.getLogger("transformers.cli.serving").setLevel(logging.ERROR)
        threading.Thread(target=self._load, name="flash-mla-load", daemon=True).start()
        try:
            self._uvicorn.run()
        finally:
            self.is_warm = False
            if self._models is not None:
                self._models.shutdown()
        if self.failure is not None:
            raise self.failure

    def stop(self) -> None:
        """End `run()`, from any thread."""
        self._uvicorn.should_exit = True

    def address(self) -> str:
        """URL of the open port."""
        host, port = self._uvicorn.servers[0].sockets[0].getsockname()[:2]
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    def facts(self, url: str) -> dict[str, Any]:
        """What a supervisor wants to know of a server that is ready, as JSON has it; the key itself is not in it.

        Args:
            url: of the open port.
        """
        settings, cache = self.settings, self.turns.cache
        assert cache is not None
        assert self._models is not None
        (loaded,) = self._models.loaded_models.values()
        return {
            "ready": True,
            "url": url,
            "model": settings.model,
            "pid": os.getpid(),
            "needs_key": settings.api_key is not None,
            "device": str(loaded.model.device),
            "dtype": str(loaded.model.dtype).removeprefix("torch."),
            "cache_dtype": settings.cache_dtype,
            "cache_bytes": cache.memory_report().bytes_allocated,
            "block_size": settings.block_size,
            "kv_pages_total": self.turns.pages_total,
            "ctx": cache.max_cache_len,
            "max_new_tokens": settings.max_new_tokens,
            "max_body": settings.max_body,
            "max_waiting": settings.max_waiting,
            "timeout": settings.timeout,
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        }

    # --- loading ------------------------------------------------------------------------------------------------------

    def _load(self) -> None:
        try:
            self._load_and_warm()
        except BaseException as error:
            self.failure = error
            self.stop()
            return
        while not self._uvicorn.started and not self._uvicorn.should_exit:
            time.sleep(0.02)
        if self._uvicorn.started and self.on_ready is not None:
            self.on_ready(self.address())

    def _load_and_warm(self) -> None:
        settings = self.settings
        models = _Models(
            device=settings.device,
            dtype=settings.dtype,
            trust_remote_code=settings.trust_remote_code,
            attn_implementation=NAME,
            force_model=settings.model,
        )
        (loaded,) = models.loaded_models.values()
        text_config = loaded.model.config.get_text_config(decoder=True)
        longest = getattr(text_config, "max_position_embeddings", None) or DEFAULT_CTX
        self.turns.warm(
            loaded.model,
            max_cache_len=settings.ctx or min(longest, DEFAULT_CTX),
            block_size=settings.block_size,
            dtype=settings.cache_dtype,
        )
        self._models = models
        self._vocab_size = text_config.vocab_size
        queue = _OneQueue(self.turns)
        self._handlers = {"chat": ChatCompletionHandler(models, queue), "text": CompletionHandler(models, queue)}
        self.is_warm = True

    def _write_line(self, ticket: Ticket, status: int, is_error: bool) -> None:
        """The metric line of a request. Its answer has gone out: a disk that is full is no error of the client's."""
        assert self._emf is not None
        first, last, steps = ticket.first_token, ticket.last_token, ticket.generated_tokens - 1
        numbers = RequestNumbers(
            prompt_tokens=ticket.prompt_tokens,
            generated_tokens=ticket.generated_tokens if ticket.begun is not None else None,
            time_per_token_ms=round((last - first) / steps * 1e3, 3)
            if first is not None and last is not None and steps > 0
            else None,
            time_to_first_token_ms=round((first - ticket.begun) * 1e3, 3)
            if first is not None and ticket.begun is not None
            else None,
            kv_pages_used=ticket.pages_used,
            kv_pages_total=self.turns.pages_total,
            is_error=is_error,
        )
        try:
            self._emf.write(numbers, Status=status)
        except OSError:
            logger.exception("flash-mla serve: a metric line could not be written")

    # --- answering ----------------------------------------------------------------------------------------------------

    def _routes(self) -> FastAPI:
        app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)

        @app.exception_handler(RequestValidationError)
        async def invalid(_: Request, invalid: RequestValidationError) -> JSONResponse:
            # Where and why, without what was sent: it may be large, and need not be JSON.
            lines = [f"{'.'.join(map(str, one['loc'][1:])) or 'body'}: {one['msg']}" for one in invalid.errors()[:5]]
            return JSONResponse(error_body("; ".join(lines)[:2000]), 400)

        @app.exception_handler(StarletteHTTPException)
        async def refused(_: Request, refused: StarletteHTTPException) -> JSONResponse:
            kind = "server_error" if refused.status_code >= 500 else "invalid_request_error"
            return JSONResponse(error_body(str(refused.detail), kind), refused.status_code, refused.headers)

        @app.post("/v1/chat/completions")
        async def chat(body: ChatBody) -> Response:
            return await self._answer("chat", body)

        @app.post("/v1/completions")
        async def completions(body: CompletionBody) -> Response:
            return await self._answer("text", body)

        @app.get("/v1/models")
        async def models() -> JSONResponse:
            one = {"id": self.settings.model, "object": "model", "created": 0, "owned_by": ""}
            return JSONResponse({"object": "list", "data": [one]})

        @app.get("/ping")
        @app.get("/health")
        async def ping() -> JSONResponse:
            why = self._not_ready()
            return JSONResponse({"status": why or "ok"}, 503 if why else 200)

        @app.get("/metrics")
        async def metrics() -> Response:
            return Response(self.metrics.text(), media_type=prometheus_client.CONTENT_TYPE_LATEST)

        return app

    def _not_ready(self) -> str | None:
        if self.turns.broken is not None:
            return f"broken: {self.turns.broken}"
        return None if self.is_warm else "loading"

    async def _answer(self, handler: str, body: ChatBody | CompletionBody) -> Response:
        """What Transformers' handler answers, or an error as JSON."""
        why = self._not_ready()
        if why is not None:
            raise HTTPException(503, why, {"Retry-After": "5"})
        unknown = [token for token in getattr(body, "logit_bias", None) or () if token >= self._vocab_size]
        if unknown:
            raise HTTPException(400, f"logit_bias: the model has {self._vocab_size} tokens, got {max(unknown)}")
        ticket = current_ticket.get()
        ticket.max_new_tokens, ticket.seed = body.asked_tokens(), body.seed
        try:
            answer: Response = await self._handlers[handler].handle_request(body.for_transformers(), ticket.request_id)
            return answer
        except EndedError as ended:
            raise HTTPException(ENDED_STATUS.get(str(ended), 500), str(ended)) from None
        except FailedError as failed:
            raise HTTPException(500, str(failed)) from None
        except (AttributeError, KeyError, TypeError, ValueError, TemplateError) as error:
            if ticket.turn_taken:
                logger.exception("flash-mla serve: the answer could not be written")
                raise HTTPException(500, "the answer could not be written; the log of the server has more") from None
            # Its messages are of a shape that the model's chat template does not take.
            detail = f"{type(error).__name__}: {error}"
            raise HTTPException(400, f"the chat template refused the request: {detail[:500]}") from None
