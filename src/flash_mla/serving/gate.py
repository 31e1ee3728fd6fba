"""What a request must pass before it is read as JSON: the key, the size of its body, and a deadline for the answer.

ASGI, around the application: nothing of a body is parsed before its key and its size are right. It also learns when a
client leaves, streamed or not, and tells whoever generates for it through the request's ticket.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import time
import uuid
from collections.abc import Awaitable, Callable, MutableMapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from .metrics import Metrics

__all__ = ["Gate", "Ticket", "current_ticket", "error_body"]

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

# Who asks these has no key: a load balancer.
OPEN_PATHS = frozenset({"/ping", "/health"})
ANSWERS = frozenset({"/v1/chat/completions", "/v1/completions"})
PATHS = ANSWERS | frozenset({"/v1/models", "/metrics"}) | OPEN_PATHS
# Seconds from the headers to the end of the body.
BODY_SECONDS = 30.0
# Seconds for a stream that is out of time to say so.
STREAM_ENDS_SECONDS = 2.0
# A body over the limit is read and thrown away up to so many times the limit, so that a client which sends before it
# reads gets its 413 and no broken pipe.
DRAINED = 16


def error_body(message: str, kind: str = "invalid_request_error") -> dict[str, Any]:
    """An error as OpenAI's API words it."""
    return {"error": {"message": message, "type": kind, "param": None, "code": None}}


@dataclass(eq=False)
class Ticket:
    """A request in flight, from its headers to the end of its answer.

    Attributes:
        ended: why there will be no more of the answer ("left", "timed_out", "stopped", "answered"), None while there
            may be. Written by the event loop, read by the thread that generates, once per token.
        max_new_tokens: what the request asks for; None: it does not say.
        seed: of sampling, or None.
        arrived: `time.perf_counter()` of the headers.
        turn_taken: whether it got as far as the model's queue.
        begun, first_token, last_token: `perf_counter()` of its turn and of its tokens so far; None: none yet.
        prompt_tokens, generated_tokens: so far; prompt_tokens is None until its turn.
        pages_used: pages that held its tokens when they were looked at last.
        failed: whether generation failed, perhaps after the answer had begun: its status need not say so.
    """

    request_id: str = field(default_factory=lambda: f"chatcmpl-{uuid.uuid4().hex}")
    ended: str | None = None
    max_new_tokens: int | None = None
    seed: int | None = None
    arrived: float = field(default_factory=time.perf_counter)
    turn_taken: bool = False
    begun: float | None = None
    first_token: float | None = None
    last_token: float | None = None
    prompt_tokens: int | None = None
    generated_tokens: int = 0
    pages_used: int | None = None
    failed: bool = False

    def end(self, why: str) -> None:
        """Note the first reason."""
        self.ended = self.ended or why


# Of the request that the running task answers.
current_ticket: ContextVar[Ticket] = ContextVar("current_ticket")


class _Refused(Exception):
    def __init__(self, status: int, message: str, kind: str = "invalid_request_error") -> None:
        super().__init__(message)
        self.status, self.message, self.kind = status, message, kind


class Gate:
    """The application `app` behind key, limits and deadline.

    Args:
        app: an ASGI application.
        metrics: where requests and errors are counted.
        api_key: what `Authorization: Bearer` must say, on every path but `/ping` and `/health`; None: nothing.
        max_body: bytes of a request's body.
        timeout: seconds from the end of the body to the end of the answer.
        on_answer: called after each request for an answer with its ticket, its HTTP status, and whether it is an error.
    """

    def __init__(
        self,
        app: App,
        metrics: Metrics,
        *,
        api_key: str | None,
        max_body: int,
        timeout: float,
        on_answer: Callable[[Ticket, int, bool], None] | None = None,
    ) -> None:
        self.app = app
        self.metrics = metrics
        self.api_key = None if api_key is None else api_key.encode()
        self.max_body = max_body
        self.timeout = timeout
        self.on_answer = on_answer
        self._open: set[Ticket] = set()

    def end_all(self) -> None:
        """The server stops: every answer under way ends at its next token, with an error."""
        for ticket in self._open:
            ticket.end("stopped")

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """One connection's request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        ticket = Ticket()
        current_ticket.set(ticket)
        self._open.add(ticket)
        status: int | None = None

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            elif not message.get("more_body", False):
                ticket.end("answered")  # after this uvicorn says "disconnect" to whoever listens
            await send(message)

        try:
            self._check_key(scope)
            body = await self._body(receive)
            if body is not None:
                await self._answer(scope, body, ticket, receive, noting, lambda: status is not None)
            else:
                ticket.end("left")
        except _Refused as refused:
            await _send_json(noting, refused.status, error_body(refused.message, refused.kind))
        finally:
            # Whatever way the answer ended, a generation that still runs for it stops at its next token.
            ticket.end("answered")
            self._open.discard(ticket)
            self._count(scope["path"], status, ticket)

    def _check_key(self, scope: MutableMapping[str, Any]) -> None:
        if self.api_key is None or scope["path"] in OPEN_PATHS:
            return
        given = b""
        for name, value in scope["headers"]:
            if name == b"authorization" and value[:7].lower() == b"bearer ":
                given = value[7:].strip()
        # In a time that does not tell how much of the key was right.
        if not hmac.compare_digest(given, self.api_key):
            raise _Refused(401, "needs the header Authorization: Bearer KEY with this server's key")

    async def _body(self, receive: Receive) -> bytes | None:
        """The whole body; None if the client left before its end.

        Raises: _Refused: too large, or too slow.
        """
        # Not a list of what came: of chunks of two bytes each one would take twenty times its bytes.
        body = bytearray()
        size = 0
        deadline = time.monotonic() + BODY_SECONDS
        more = True
        while more and size <= DRAINED * self.max_body:
            try:
                message = await asyncio.wait_for(receive(), deadline - time.monotonic())
            except asyncio.TimeoutError:
                raise _Refused(408, f"the body must arrive within {BODY_SECONDS:g} s") from None
            if message["type"] == "http.disconnect":
                return None
            chunk = message.get("body", b"")
            size += len(chunk)
            if size > self.max_body:
                body = bytearray()  # nothing is kept of what will be refused, and a new one gives its memory back
            else:
                body += chunk
            more = message.get("more_body", False)
        if size > self.max_body:
            raise _Refused(413, f"the body must be at most {self.max_body} bytes, got {'at least ' * more}{size}")
        return bytes(body)

    async def _answer(
        self,
        scope: MutableMapping[str, Any],
        body: bytes,
        ticket: Ticket,
        receive: Receive,
        send: Send,
        has_begun: Callable[[], bool],
    ) -> None:
        left = asyncio.Event()
        unread: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def watch() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            ticket.end("left")
            left.set()

        async def replay() -> Message:
            if unread:
                return unread.pop()
            await left.wait()
            return {"type": "http.disconnect"}

        watcher = asyncio.create_task(watch())
        work = asyncio.ensure_future(self.app(scope, replay, send))
        try:
            done, _ = await asyncio.wait({work}, timeout=self.timeout)
            if not done:
                ticket.end("timed_out")
                # Its turn reads that and the answer ends with an error. A stream may hang on a client that does not
                # read, or behind another's turn.
                if has_begun():
                    await asyncio.wait({work}, timeout=STREAM_ENDS_SECONDS)
                    work.cancel()
            await work
        except asyncio.CancelledError:
            if not work.cancelled():  # not the stream that was cancelled above: the server stops
                work.cancel()
                raise
        finally:
            watcher.cancel()

    def _count(self, path: str, status: int | None, ticket: Ticket) -> None:
        # 499, as nginx has it: the client left before an answer began. Paths that do not exist share a label.
        shown = status or 499
        self.metrics.requests.labels(path if path in PATHS else "other", str(shown)).inc()
        kind = None
        if ticket.ended in ("left", "timed_out"):
            kind = ticket.ended
        elif status is None or status >= 500 or ticket.failed or ticket.ended == "stopped":
            kind = "failed"
        elif status >= 400:
            kind = "refused"
        if kind is not None:
            self.metrics.errors.labels(kind).inc()
        if self.on_answer is not None and path in ANSWERS:
            self.on_answer(ticket, shown, kind is not None)


async def _send_json(send: Send, status: int, content: dict[str, Any]) -> None:
    body = json.dumps(content).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        # What is left of the body is not read.
        (b"connection", b"close"),
    ]
    if status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": False})
