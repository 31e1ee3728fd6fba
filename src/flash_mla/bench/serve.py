"""Whether `flash-mla serve` stands a crowd of which a third is broken or malicious: answers, pages, memory.

It starts a server of its own, learns from it, alone, what the answers to a few prompts are, then lets the clients in.
Good clients ask over and over, streamed and not in turns, and compare every answer with the one that was learnt: tokens
of somebody else's request in it would be seen. Others send what the server must refuse, or leave, or are slow.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import secrets
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

try:
    import openai
    from prometheus_client.parser import text_string_to_metric_families
except ImportError as error:
    raise ImportError(
        f"flash-mla bench serve needs {error.name}: pip install 'transformers-flash-mla[serve]'", name=error.name
    ) from None

__all__ = ["Found", "Setting", "checks", "measure"]

PROMPTS = ("Licensed under", "You may", "The latent is", "Unless required by applicable law", "A page of 64 tokens")
START_SECONDS = 600.0
ANSWER_SECONDS = 300.0
# Tokens that a client asks for which will not wait for them.
ABANDONED_TOKENS = 256
MIB = 1 / 2**20


@dataclass(frozen=True)
class Setting:
    """One load run.

    Attributes:
        model: Hub id or path.
        clients: at a time; every third one is broken or malicious.
        seconds: how long they go on.
        new_tokens: of every answer that is waited for.
        max_body: bytes of a body that the server is told to take.
        server_options: more words for `flash-mla serve`.
        seed: of who does what and when.
    """

    model: str
    clients: int = 32
    seconds: float = 600.0
    new_tokens: int = 16
    max_body: int = 1 << 16
    server_options: tuple[str, ...] = ()
    seed: int = 0


@dataclass
class Found:
    """What a load run saw.

    Attributes:
        good: answers that were complete and right.
        wrong: what good clients got instead, one line each.
        broken: requests of the others, by kind.
        unexpected: answers to those that were not the refusal they should be, one line each.
        latency: seconds of good answers.
        memory: (seconds since the start, MiB resident) of the server, about once a second.
        metrics: of the server when all had gone, by name.
        ping: its status then.
    """

    good: int = 0
    wrong: list[str] = field(default_factory=list)
    broken: Counter[str] = field(default_factory=Counter)
    unexpected: list[str] = field(default_factory=list)
    latency: list[float] = field(default_factory=list)
    memory: list[tuple[float, float]] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)
    ping: int = 0

    def growth_MiB(self) -> float:
        """Median resident memory of the last quarter of the run less that of the second quarter."""
        sizes = [size for _, size in self.memory]
        quarter = max(1, len(sizes) // 4)
        return statistics.median(sizes[-quarter:]) - statistics.median(sizes[quarter : 2 * quarter] or sizes)

    def latency_ms(self) -> dict[str, float]:
        """Median, 95th and 99th percentile of good answers, waiting included."""
        if len(self.latency) < 2:
            return {}
        cuts = statistics.quantiles(self.latency, n=100)
        return {f"p{percent}": round(cuts[percent - 1] * 1e3, 1) for percent in (50, 95, 99)}


def checks(found: Found, max_growth_MiB: float) -> dict[str, bool]:
    """What must hold at the end of a run, by name."""
    at_end = found.metrics
    return {
        "every good request was answered": found.good > 0 and not found.wrong,
        "every bad request was refused with JSON": sum(found.broken.values()) > 0 and not found.unexpected,
        "no page is allocated": at_end["flash_mla_kv_pages_used"] == 0 < at_end["flash_mla_kv_pages_total"],
        "nobody runs or waits": at_end["flash_mla_requests_running"] + at_end["flash_mla_requests_waiting"] == 0,
        "nothing failed in the server": at_end["flash_mla_errors_total failed"] == 0,
        "/ping says 200": found.ping == 200,
        f"memory grew by at most {max_growth_MiB:g} MiB": found.growth_MiB() <= max_growth_MiB,
    }


def measure(setting: Setting, progress: Callable[[float], None] = lambda seconds: None) -> Found:
    """Start a server, run the crowd, stop the server.

    Args:
        setting: who and how long.
        progress: called about once a second with the seconds that passed.
    Raises: RuntimeError: the server did not start.
    """
    key = secrets.token_urlsafe(32)
    with _server(setting, key) as url:
        return asyncio.run(_Crowd(setting, url, key).run(progress))


@contextlib.contextmanager
def _server(setting: Setting, key: str) -> Iterator[str]:
    """URL of a `flash-mla serve` in a process of its own."""
    command = [sys.executable, "-c", "from flash_mla.cli import main; main()", "serve", setting.model, "--port", "0"]
    # Room for everybody: being turned away is not what is tested here.
    limits = ["--max-body", str(setting.max_body), "--max-waiting", str(8 * setting.clients)]
    process = subprocess.Popen(
        [*command, *limits, *setting.server_options],
        env={**os.environ, "FLASH_MLA_API_KEY": key},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        if not line.startswith("ready: "):
            raise RuntimeError(f"flash-mla bench serve: the server did not start: {line.strip() or 'see above'}")
        yield line.rpartition(" on ")[2].strip()
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


class _Crowd:
    """The clients of one run, all in this thread."""

    def __init__(self, setting: Setting, url: str, key: str) -> None:
        self.setting = setting
        self.key = key
        self.host, _, port = url.removeprefix("http://").rpartition(":")
        self.port = int(port)
        self.client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=ANSWER_SECONDS)
        self.found = Found()
        self.answers: dict[str, str] = {}
        self.random = random.Random(setting.seed)
        self.deadline = 0.0
        self.bad_kinds: list[Callable[[], Awaitable[None]]] = [
            self.garbage,
            self.leaves_mid_stream,
            self.huge_body,
            self.leaves_waiting,
            self.wrong_key,
            self.slow_body,
            self.bad_fields,
            self.never_reads,
            self.no_http,
        ]

    async def run(self, progress: Callable[[float], None]) -> Found:
        """Learn the answers, let everybody loose, wait until nobody is left."""
        for prompt in PROMPTS:
            self.answers[prompt] = await self.ask(prompt, streamed=False)
        begin = time.monotonic()
        self.deadline = begin + self.setting.seconds
        crowd = [
            self.bad(number // 3) if number % 3 == 2 else self.good(number) for number in range(self.setting.clients)
        ]
        await asyncio.gather(self.watch(begin, progress), *crowd)
        while True:
            self.found.metrics = await self.metrics()
            at_end = self.found.metrics
            if at_end["flash_mla_requests_running"] + at_end["flash_mla_requests_waiting"] == 0:
                break
            if time.monotonic() > self.deadline + ANSWER_SECONDS:
                break
            await asyncio.sleep(0.1)
        self.found.ping, _ = await self.plain("/ping")
        await self.client.close()
        return self.found

    def going(self) -> bool:
        """Whether the run is not over."""
        return time.monotonic() < self.deadline

    async def watch(self, begin: float, progress: Callable[[float], None]) -> None:
        """Note the server's memory about once a second."""
        while self.going():
            size = (await self.metrics()).get("process_resident_memory_bytes", 0.0)
            passed = time.monotonic() - begin
            self.found.memory.append((round(passed, 1), round(size * MIB, 2)))
            progress(passed)
            await asyncio.sleep(min(1.0, self.setting.seconds / 20))

    # --- who asks and waits -------------------------------------------------------------------------------------------

    async def good(self, number: int) -> None:
        """Asks again and again."""
        while self.going():
            prompt = PROMPTS[number % len(PROMPTS)]
            number += 1
            begin = time.perf_counter()
            try:
                text = await self.ask(prompt, streamed=number % 2 == 0)
            except openai.OpenAIError as error:
                self.found.wrong.append(f"{prompt!r}: {type(error).__name__}: {error}")
                continue
            if text != self.answers[prompt]:
                self.found.wrong.append(f"{prompt!r}: {text!r} instead of {self.answers[prompt]!r}")
            else:
                self.found.good += 1
                self.found.latency.append(time.perf_counter() - begin)

    async def ask(self, prompt: str, streamed: bool) -> str:
        """One answer, whole."""
        asked: dict[str, Any] = {
            "model": self.setting.model,
            "messages": [{"role": "user", "content": prompt}],
            "max_tokens": self.setting.new_tokens,
            "temperature": 0,
        }
        if not streamed:
            answer = await self.client.chat.completions.create(**asked)
            return answer.choices[0].message.content or ""
        pieces = [
            chunk.choices[0].delta.content or ""
            async for chunk in await self.client.chat.completions.create(**asked, stream=True)
        ]
        return "".join(pieces)

    # --- who does not -------------------------------------------------------------------------------------------------

    async def bad(self, number: int) -> None:
        """Does one kind of harm after the other, from its own place in the list."""
        while self.going():
            kind = self.bad_kinds[number % len(self.bad_kinds)]
            number += 1
            try:
                await kind()
            except (OSError, EOFError) as error:  # of this client's socket: the server may close it, but only then
                if kind not in (self.huge_body, self.no_http):
                    self.found.unexpected.append(f"{kind.__name__}: {type(error).__name__}: {error}")
            self.found.broken[kind.__name__] += 1
            await asyncio.sleep(self.random.uniform(0, 0.2))

    async def garbage(self) -> None:
        """Bodies that are no JSON, or too deep, or no UTF-8."""
        body = self.random.choice([b"{", b"\xff\x00", b"[" * 4000, b"null", self.random.randbytes(300)])
        await self.refused("garbage", 400, body)

    async def bad_fields(self) -> None:
        """JSON of the wrong shape."""
        more: dict[str, Any] = self.random.choice(
            [
                {"messages": "hello"},
                {"max_tokens": 10**9},
                {"temperature": "hot"},
                {"model": "another"},
                {"generation_config": '{"num_beams": 1000}'},
                {"messages": [{"role": "user", "content": "x y " * 10_000}]},
                {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///"}}]}]},
            ]
        )
        await self.refused("bad_fields", 400, self.body(**more))

    async def wrong_key(self) -> None:
        """A good request with another key."""
        await self.refused("wrong_key", 401, self.body(), key=secrets.token_urlsafe(32))

    async def huge_body(self) -> None:
        """Much more than the server takes."""
        size = self.setting.max_body * self.random.choice([2, 8, 64])
        await self.refused("huge_body", 413, self.body(user="x" * size))

    async def no_http(self) -> None:
        """Noise on the port."""
        async with self.connection() as (reader, writer):
            writer.write(self.random.randbytes(200) + b"\r\n\r\n")
            await writer.drain()
            await reader.read()

    async def slow_body(self) -> None:
        """Drips the beginning of a body, then leaves."""
        async with self.connection() as (_, writer):
            body = self.body()
            writer.write(self.head(len(body)))
            for byte in body[:5]:
                writer.write(bytes([byte]))
                await writer.drain()
                await asyncio.sleep(0.2)

    async def leaves_waiting(self) -> None:
        """Asks for a long answer, not streamed, and leaves before it comes."""
        async with self.connection() as (_, writer):
            body = self.body(max_tokens=ABANDONED_TOKENS)
            writer.write(self.head(len(body)) + body)
            await writer.drain()
            await asyncio.sleep(self.random.uniform(0, 1.5))

    async def leaves_mid_stream(self) -> None:
        """Reads the beginning of a long stream, then leaves."""
        async with self.connection() as (reader, writer):
            body = self.body(max_tokens=ABANDONED_TOKENS, stream=True)
            writer.write(self.head(len(body)) + body)
            await writer.drain()
            for _ in range(self.random.randrange(40)):
                if not await reader.readline():
                    break

    async def never_reads(self) -> None:
        """Asks for a long stream, reads none of it, leaves late."""
        async with self.connection() as (_, writer):
            body = self.body(max_tokens=ABANDONED_TOKENS, stream=True)
            writer.write(self.head(len(body)) + body)
            await writer.drain()
            await asyncio.sleep(self.random.uniform(1, 4))

    # --- bytes --------------------------------------------------------------------------------------------------------

    def body(self, **more: Any) -> bytes:
        """A chat request."""
        messages = [{"role": "user", "content": self.random.choice(PROMPTS)}]
        return json.dumps({"messages": messages, "max_tokens": self.setting.new_tokens, **more}).encode()

    def head(
        self, length: int, path: str = "/v1/chat/completions", key: str | None = None, method: str = "POST"
    ) -> bytes:
        """Request line and headers."""
        return (
            f"{method} {path} HTTP/1.1\r\nHost: {self.host}\r\nAuthorization: Bearer {key or self.key}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n"
        ).encode()

    @contextlib.asynccontextmanager
    async def connection(self) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
        """A connection that is cut without a word at the end."""
        reader, writer = await asyncio.open_connection(self.host, self.port)
        try:
            yield reader, writer
        finally:
            writer.transport.abort()

    async def plain(self, path: str, body: bytes | None = None, key: str | None = None) -> tuple[int, bytes]:
        """Status and body of an answer that ends with its connection."""
        method = "GET" if body is None else "POST"
        async with self.connection() as (reader, writer):
            writer.write(self.head(len(body or b""), path, key, method) + (body or b""))
            await writer.drain()
            answer = await asyncio.wait_for(reader.read(), ANSWER_SECONDS)
        head, _, content = answer.partition(b"\r\n\r\n")
        return int(head.split(b" ", 2)[1]), content

    async def refused(self, kind: str, status: int, body: bytes, key: str | None = None) -> None:
        """Send what must be refused with `status` and JSON."""
        got, content = await self.plain("/v1/chat/completions", body, key)
        try:
            is_error = "error" in json.loads(content)
        except ValueError:
            is_error = False
        if got != status or not is_error:
            self.found.unexpected.append(f"{kind}: {got} {content[:200]!r} instead of {status}")

    async def metrics(self) -> dict[str, float]:
        """The server's metrics, labels joined to the names."""
        _, text = await self.plain("/metrics")
        return {
            " ".join([sample.name, *sample.labels.values()]): sample.value
            for family in text_string_to_metric_families(text.decode())
            for sample in family.samples
        }
