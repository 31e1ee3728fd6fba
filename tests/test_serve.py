"""`flash-mla serve` over loopback: real uvicorn, real `openai` client, the tiny checkpoint.

Faults it must catch: pages that stay allocated when a client leaves, streamed or not; a generation that goes on for
nobody; tokens of one request in the answer to another; a body parsed before its key or size is checked; an error that
is no JSON; options that hand a client more than a request; `/ping` that is ready before the model is.
"""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
import transformers
from emf_rules import assert_is_emf
from prometheus_client.parser import text_string_to_metric_families
from safetensors.torch import load_file
from tiny_models import build, greedy, need, prompt
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from flash_mla import ops
from flash_mla.backends import torch as definition
from flash_mla.cli.app import app
from flash_mla.codec import row_layout
from flash_mla.contract import UnsupportedError
from flash_mla.serving import gate, serve
from flash_mla.serving.gate import Ticket
from flash_mla.serving.metrics import Metrics
from flash_mla.serving.serve import Server, Settings
from flash_mla.serving.turn import EndedError, Turns, _Turn

ROOT = Path(__file__).resolve().parents[1]
MODEL = "examples/tiny-deepseek-v3"
KEY = "correct horse"
CTX, MAX_NEW, MAX_BODY = 640, 512, 8192
PATIENCE = 60  # seconds, on a slow core
QUESTION = [{"role": "user", "content": "Licensed under"}]
# Of token 2, the end of a text, which the model knows to put after 191 tokens.
NO_END = {"2": -100}


class Running:
    """A server process, or one in a thread, and ways to talk to it."""

    def __init__(self, url: str, emf: Path | None = None) -> None:
        self.url = url
        self.emf = emf
        self.port = int(url.rpartition(":")[2])
        self.openai = openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0, timeout=PATIENCE)

    def chat(self, content: str = "Licensed under", **more: Any) -> Any:
        more = {"max_tokens": 12, "model": MODEL, **more}
        return self.openai.chat.completions.create(messages=[{"role": "user", "content": content}], **more)

    def request(
        self, path: str, body: bytes | None = None, key: str | None = KEY, **headers: str
    ) -> tuple[int, dict[str, Any]]:
        """Status and JSON of one plain request."""
        status, text = self.raw(path, body, key, **headers)
        return status, json.loads(text)

    def raw(self, path: str, body: bytes | None, key: str | None, **headers: str) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        sent = {"Content-Type": "application/json", **headers} if body is not None else headers
        if key is not None:
            sent["Authorization"] = f"Bearer {key}"
        with contextlib.closing(connection):
            connection.request("GET" if body is None else "POST", path, body, sent)
            answer = connection.getresponse()
            return answer.status, answer.read()

    def send(self, **body: Any) -> socket.socket:
        """A chat request on a connection of its own that nobody has read from."""
        text = json.dumps({"messages": QUESTION, **body}).encode()
        head = (
            f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(text)}\r\n\r\n"
        )
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=PATIENCE)
        connection.sendall(head.encode() + text)
        return connection

    def metrics(self) -> dict[str, float]:
        """Values by name, labels joined to it."""
        status, text = self.raw("/metrics", None, KEY)
        assert status == 200
        return {
            "_".join([sample.name.removeprefix("flash_mla_"), *sample.labels.values()]): sample.value
            for family in text_string_to_metric_families(text.decode())
            for sample in family.samples
        }

    def until(self, holds: Callable[[dict[str, float]], bool]) -> dict[str, float]:
        """The metrics, once they are so."""
        deadline = time.monotonic() + PATIENCE
        while True:
            found = self.metrics()
            if holds(found):
                return found
            assert time.monotonic() < deadline, found
            time.sleep(0.01)

    def idle(self) -> dict[str, float]:
        """The metrics once nobody runs or waits."""
        found = self.until(lambda now: now["requests_running"] == now["requests_waiting"] == 0)
        assert found["kv_pages_used"] == 0
        assert found["kv_pages_total"] == CTX / 64
        return found

    def idle_after(self, before: dict[str, float], **errors: int) -> dict[str, float]:
        """The metrics once nobody runs or waits and so many errors more of these kinds are counted, and no more: each
        by its own handler, a moment after the answer has ended."""

        def more(now: dict[str, float]) -> dict[str, float]:
            return {kind: now[f"errors_total_{kind}"] - before[f"errors_total_{kind}"] for kind in errors}

        self.until(lambda now: all(more(now)[kind] >= number for kind, number in errors.items()))
        found = self.idle()
        assert more(found) == errors
        return found


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    emf = tmp_path_factory.mktemp("serve") / "emf"
    emf.touch()
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "FLASH_MLA_API_KEY": KEY}
    environment.pop("TRITON_INTERPRET", None)  # the tests' own; a user does not set it
    limits = ("--ctx", CTX, "--max-new-tokens", MAX_NEW, "--max-body", MAX_BODY, "--max-waiting", 3)
    lines = ("--emf", emf, "--emf-service", "loopback")
    command = ("serve", MODEL, "--port", 0, "--device", "cpu", "--dtype", "float32", *limits, *lines)
    code = "from flash_mla.cli import main; main()"
    process = subprocess.Popen(
        [sys.executable, "-c", code, *map(str, command)], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    line = process.stdout.readline()
    found = re.fullmatch(rf"ready: {MODEL} on (http://127\.0\.0\.1:\d+)\n", line)
    assert found, line
    yield Running(found.group(1), emf)
    process.terminate()
    assert process.wait(PATIENCE) in (0, -15)


# --- answers ----------------------------------------------------------------------------------------------------------


def test_json_is_what_generate_says(server: Running) -> None:
    tokenizer = AutoTokenizer.from_pretrained(ROOT / MODEL)
    model = AutoModelForCausalLM.from_pretrained(ROOT / MODEL, dtype=torch.float32, attn_implementation="sdpa")
    inputs = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    # Over a page's end: 64 tokens per page.
    ids = model.generate(**inputs, max_new_tokens=80, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    before, begin = server.idle(), time.perf_counter()
    answer = server.chat(max_tokens=80)
    seconds = time.perf_counter() - begin
    assert answer.choices[0].message.content == tokenizer.decode(ids, skip_special_tokens=True)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 80
    assert answer.usage.prompt_tokens == inputs["input_ids"].shape[1]
    assert answer.object == "chat.completion"
    answers = "requests_total_/v1/chat/completions_200"  # counted a moment after the answer has ended
    server.until(lambda now: now.get(answers, 0) > before.get(answers, 0))
    after = server.idle()
    moved = {name: after[name] - before.get(name, 0) for name in after}
    assert moved["prompt_tokens_total"] == answer.usage.prompt_tokens
    assert moved["generated_tokens_total"] == 80
    assert moved["time_per_token_seconds_count"] == 79
    assert moved["time_to_first_token_seconds_count"] == 1
    generating = moved["time_per_token_seconds_sum"] + moved["time_to_first_token_seconds_sum"]
    assert seconds / 4 < generating < seconds
    assert moved[answers] == 1
    assert not any(moved[f"errors_total_{kind}"] for kind in ("refused", "failed", "left", "timed_out"))


def test_sse_is_the_same_text(server: Running) -> None:
    whole = server.chat(max_tokens=100).choices[0].message.content
    chunks = list(server.chat(max_tokens=100, stream=True, stream_options={"include_usage": True}))
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks]
    assert "".join(pieces) == whole
    assert len(pieces) > 20
    assert chunks[-1].choices[0].finish_reason == "length"
    assert chunks[-1].usage.completion_tokens == 100


def test_pages_are_counted_while_they_fill(server: Running) -> None:
    server.idle()
    stream = server.chat(max_tokens=MAX_NEW, logit_bias=NO_END, stream=True)
    used = []

    def enough(now: dict[str, float]) -> bool:
        used.append(now["kv_pages_used"])
        return used[-1] >= 3

    server.until(enough)
    stream.close()
    assert used == sorted(used)
    assert len(set(used)) > 2
    server.idle()


def test_text_completions_models_and_stop_strings(server: Running) -> None:
    answer = server.openai.completions.create(model=MODEL, prompt="Licensed under", max_tokens=12)
    assert answer.choices[0].text == server.chat().choices[0].message.content
    assert [one.id for one in server.openai.models.list()] == [MODEL]
    stopped = server.chat(max_tokens=80, stop=["Version"])
    assert stopped.choices[0].finish_reason == "stop"
    assert stopped.choices[0].message.content.endswith("Version")


def test_without_a_limit_the_answer_ends_within_the_servers(server: Running) -> None:
    answer = server.chat(max_tokens=openai.omit, logit_bias=NO_END)
    assert (answer.usage.completion_tokens, answer.choices[0].finish_reason) == (MAX_NEW, "length")


def test_the_newer_name_of_the_limit_comes_first(server: Running) -> None:
    assert server.chat(max_completion_tokens=3, max_tokens=5).usage.completion_tokens == 3


def test_the_snippet_of_the_page_runs(server: Running, capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs" / "serving.md").read_text(), re.M | re.S)
    for said, meant in (("http://127.0.0.1:8000", server.url), ('"none"', repr(KEY))):
        assert said in code
        code = code.replace(said, meant)
    exec(compile(code, "docs/serving.md", "exec"), {})
    text = server.chat().choices[0].message.content
    assert capsys.readouterr().out == f"{text}\n{text}"


def test_each_request_for_an_answer_is_a_cloudwatch_line(server: Running) -> None:
    server.idle()
    assert server.emf is not None
    before = len(server.emf.read_text().splitlines())
    begin = time.perf_counter()
    answer = server.chat(max_tokens=80)
    milliseconds = (time.perf_counter() - begin) * 1e3
    list(server.chat(max_tokens=1, stream=True))
    assert server.request("/v1/chat/completions", b"{}")[0] == 400
    assert server.request("/v1/chat/completions", b"{}", key="wrong")[0] == 401
    server.request("/v1/models")  # no answer of the model
    deadline = time.monotonic() + PATIENCE  # a line comes after the answer has gone out
    while len(lines := server.emf.read_text().splitlines()[before:]) < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    documents = [json.loads(line) for line in lines]
    for document in documents:
        assert_is_emf(document)
        assert (document["Service"], document["Requests"]) == ("loopback", 1)
        assert document["KVPagesTotal"] == CTX / 64
    assert [(document["Status"], document["Errors"]) for document in documents] == [
        (200, 0),
        (200, 0),
        (400, 1),
        (401, 1),
    ]
    whole, one, *refused = documents
    prompt_tokens = answer.usage.prompt_tokens
    assert (whole["PromptTokens"], whole["GeneratedTokens"]) == (prompt_tokens, 80)
    assert whole["KVPagesUsed"] == -(-(prompt_tokens + 79) // 64) == 2  # the last token is not fed back
    assert milliseconds / 4 < whole["TimeToFirstToken"] + 79 * whole["TimePerToken"] < milliseconds
    assert (one["PromptTokens"], one["GeneratedTokens"], one["KVPagesUsed"]) == (prompt_tokens, 1, 1)
    assert "TimePerToken" not in one
    assert not any({"PromptTokens", "GeneratedTokens", "KVPagesUsed"} & set(document) for document in refused)


def test_a_file_of_lines_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Server(Settings(MODEL, port=0, emf=str(tmp_path / "mistyped")))


# --- who leaves -------------------------------------------------------------------------------------------------------


def test_a_client_that_leaves_mid_stream_frees_its_pages(server: Running) -> None:
    expected = server.chat().choices[0].message.content
    before = server.idle()
    stream = server.chat(max_tokens=MAX_NEW, logit_bias=NO_END, stream=True)
    for _ in range(4):
        next(stream)
    server.until(lambda now: now["kv_pages_used"] >= 1)
    stream.close()
    after = server.idle_after(before, left=1)
    assert after["generated_tokens_total"] - before["generated_tokens_total"] < MAX_NEW / 2
    assert server.chat().choices[0].message.content == expected


def test_a_client_that_leaves_an_answer_that_is_not_streamed(server: Running) -> None:
    expected = server.chat().choices[0].message.content
    before = server.idle()
    connection = server.send(max_tokens=MAX_NEW, logit_bias=NO_END)
    server.until(lambda now: now["requests_running"] == 1 and now["kv_pages_used"] >= 1)
    connection.close()
    after = server.idle_after(before, left=1)
    assert after["generated_tokens_total"] - before["generated_tokens_total"] < MAX_NEW / 2
    assert server.chat().choices[0].message.content == expected


def test_who_leaves_while_waiting_never_gets_a_turn_and_too_many_are_turned_away(server: Running) -> None:
    prompt_tokens = server.chat().usage.prompt_tokens
    before = server.idle()
    first = server.send(max_tokens=MAX_NEW, logit_bias=NO_END)
    server.until(lambda now: now["requests_running"] == 1)
    waiting = [server.send(stream=stream) for stream in (False, True, False)]
    server.until(lambda now: now["requests_waiting"] == 3)
    with pytest.raises(openai.RateLimitError, match="3 requests are waiting"):
        server.chat()
    for connection in (*waiting, first):
        connection.close()
    after = server.idle_after(before, left=4)
    assert after["prompt_tokens_total"] - before["prompt_tokens_total"] == prompt_tokens  # of the first one
    assert server.chat().choices


# --- bad requests -----------------------------------------------------------------------------------------------------


def chat_body(**more: Any) -> bytes:
    return json.dumps({"model": MODEL, "messages": QUESTION, "max_tokens": 2, **more}).encode()


BAD = {
    "no JSON": b"{",
    "not UTF-8": b"\xff\xfe{}",
    "deep": b'{"messages":' + b"[" * 4000,
    "a list": b"[]",
    "null": b"null",
    "empty": b"",
    "a number of 5000 digits": b'{"max_tokens":' + b"9" * 5000 + b"}",
    "NaN": chat_body(temperature=float("nan")),
    "half a surrogate": b'{"messages":[{"role":"user","content":"\\ud800"}]}',
    "no messages": json.dumps({"model": MODEL}).encode(),
    "messages empty": chat_body(messages=[]),
    "a message that is text": chat_body(messages=["hello"]),
    "no role": chat_body(messages=[{"content": "x"}]),
    "an image": chat_body(
        messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]}]
    ),
    "arguments that are no JSON": chat_body(
        messages=[{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]
    ),
    "a tool call without arguments": chat_body(messages=[{"role": "assistant", "tool_calls": [{"function": {}}]}]),
    "unknown model": chat_body(model="gpt-4"),
    "unknown field": chat_body(best_guess=1),
    "options of generate": chat_body(generation_config='{"num_beams": 64}'),
    "a template of one's own": chat_body(chat_template_kwargs={"chat_template": "{{ messages }}"}),
    "an argument of the template call": chat_body(chat_template_kwargs={"tokenize": False}),
    "max_tokens 0": chat_body(max_tokens=0),
    "max_tokens as text": chat_body(max_tokens="12"),
    "max_tokens over the limit": chat_body(max_tokens=MAX_NEW + 1),
    "max_tokens over what the prompt leaves": chat_body(
        messages=[{"role": "user", "content": "the License " * 100}], max_tokens=MAX_NEW
    ),
    "a prompt over the context": chat_body(messages=[{"role": "user", "content": "x y " * 700}]),
    "temperature": chat_body(temperature=-1),
    "frequency_penalty": chat_body(frequency_penalty=-1),
    "seed": chat_body(seed=2**70),
    "two answers": chat_body(n=2),
    "logprobs": chat_body(logprobs=True),
    "JSON mode": chat_body(response_format={"type": "json_object"}),
    "five stop strings": chat_body(stop=["a", "b", "c", "d", "e"]),
    "an empty stop string": chat_body(stop=""),
    "a bias of no token": chat_body(logit_bias={"5000": 1}),
    "a bias of a word": chat_body(logit_bias={"the": 1}),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_requests_get_400_and_json(server: Running, name: str) -> None:
    status, answer = server.request("/v1/chat/completions", BAD[name])
    assert status == 400, answer
    assert answer["error"]["type"] == "invalid_request_error"
    assert answer["error"]["message"]


def test_messages_say_what_must_hold_and_what_came(server: Running) -> None:
    said = {name: server.request("/v1/chat/completions", BAD[name])[1]["error"]["message"] for name in BAD}
    assert f"max_tokens must be at most {MAX_NEW}" in said["max_tokens over the limit"]
    assert f"got {MAX_NEW + 1}" in said["max_tokens over the limit"]
    assert f"the prompt must have 1 to {CTX - 1} tokens, got " in said["a prompt over the context"]
    assert "Server is pinned to" in said["unknown model"]
    assert said["options of generate"].startswith("generation_config: ")
    assert said["no role"].startswith("messages.0.role: ")
    assert "got chat_template" in said["a template of one's own"]
    assert "1024 tokens, got 5000" in said["a bias of no token"]


def test_refused_requests_are_counted_and_use_nothing(server: Running) -> None:
    before = server.idle()
    for body in BAD.values():
        server.request("/v1/chat/completions", body)
    after = server.idle_after(before, refused=len(BAD))
    assert after["generated_tokens_total"] == before["generated_tokens_total"]
    assert after["errors_total_failed"] == before["errors_total_failed"]


def test_the_openai_client_sees_its_own_errors(server: Running) -> None:
    with pytest.raises(openai.BadRequestError, match="Server is pinned"):
        server.chat(model="gpt-4")
    with pytest.raises(openai.BadRequestError, match="must be at most"):
        server.chat(max_tokens=10**6, stream=True)
    with pytest.raises(openai.AuthenticationError, match="Authorization: Bearer"):
        server.openai.with_options(api_key="wrong").models.list()


def test_other_content_types_paths_and_methods(server: Running) -> None:
    status, answer = server.request("/v1/chat/completions", chat_body(), **{"Content-Type": "text/plain"})
    assert (status, set(answer)) == (400, {"error"})  # what a form of another site may send
    for path in ("/reset", "/load_model", "/v1/responses", "/docs", "/openapi.json"):
        status, answer = server.request(path, b"{}")
        assert (status, set(answer)) == (404, {"error"}), path
    status, answer = server.request("/v1/chat/completions")
    assert (status, set(answer)) == (405, {"error"})


# --- key and sizes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", [None, "", "wrong", KEY + "x", KEY[:-1], "\xe9"])
def test_without_the_key_there_is_only_ping(server: Running, key: str | None) -> None:
    for path, body in (("/v1/chat/completions", b"{"), ("/v1/models", None), ("/metrics", None), ("/nowhere", None)):
        status, answer = server.request(path, body, key)
        assert status == 401, path  # and not 400: nothing was parsed
        assert "Bearer" in answer["error"]["message"]
    assert server.request("/ping", None, key) == (200, {"status": "ok"})


def test_a_body_over_the_limit_is_413(server: Running) -> None:
    for size in (MAX_BODY + 1, 12 * MAX_BODY, 1000 * MAX_BODY):
        padding = b" " * (size - len(chat_body()))
        try:
            status, answer = server.request("/v1/chat/completions", chat_body() + padding)
        except (BrokenPipeError, ConnectionResetError):
            assert size > 16 * MAX_BODY  # so much more that the server does not read it all
            continue
        assert status == 413
        assert f"at most {MAX_BODY} bytes" in answer["error"]["message"]
        assert ("got at least" in answer["error"]["message"]) == (size > 16 * MAX_BODY)
    padding = b" " * (MAX_BODY - len(chat_body()))
    assert server.request("/v1/chat/completions", chat_body() + padding)[0] == 200


def test_a_chunked_body_is_counted_too(server: Running) -> None:
    chunks = iter([chat_body(), b" " * MAX_BODY, b" "])
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=PATIENCE)
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"}
    with contextlib.closing(connection):
        connection.request("POST", "/v1/chat/completions", chunks, headers, encode_chunked=True)
        assert connection.getresponse().status == 413


def received(max_body: int, chunk: bytes, number: int) -> tuple[int, int, bytes]:
    """Of a body of `number` chunks: the answer's status, the most bytes held meanwhile, what the application got."""
    left, sent, passed, held = number, [], [], []

    async def application(scope: Any, receive: Any, send: Any) -> None:
        passed.append((await receive())["body"])
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def receive() -> dict[str, Any]:
        nonlocal left
        if left == 0:
            await asyncio.sleep(PATIENCE)
        left -= 1
        if left % 64 == 0:
            held.append(tracemalloc.get_traced_memory()[0])
        # A new object each time, as a server makes them.
        return {"type": "http.request", "body": bytes(bytearray(chunk)), "more_body": left > 0}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    guarded = gate.Gate(application, Metrics(), api_key=None, max_body=max_body, timeout=PATIENCE)
    tracemalloc.start()
    begin = tracemalloc.get_traced_memory()[0]
    try:
        asyncio.run(guarded({"type": "http", "path": "/v1/completions", "headers": []}, receive, send))
    finally:
        tracemalloc.stop()
    return sent[0]["status"], max(held) - begin, b"".join(passed)


@pytest.mark.parametrize("size", [2, 4096])
def test_a_body_takes_its_bytes_and_one_over_the_limit_none(size: int) -> None:
    limit, chunk = 1 << 15, b"x" * size
    # A quarter more than its bytes, however small the pieces in which it comes.
    status, held, passed = received(limit, chunk, limit // size)
    assert (status, passed) == (200, b"x" * limit)
    assert held < 1.25 * limit + 2**16
    status, held, passed = received(limit, chunk, 2 * limit // size)
    assert (status, passed) == (413, b"")
    assert held < 1.25 * limit + 2**16


def test_of_a_body_over_the_limit_nothing_is_kept() -> None:
    limit = 1 << 18
    # One chunk over the limit, then small ones: what is held at the end, once the limit is far behind.
    left, held = 100, []

    async def receive() -> dict[str, Any]:
        nonlocal left
        left -= 1
        held.append(tracemalloc.get_traced_memory()[0])
        return {"type": "http.request", "body": bytes(limit if left > 97 else 1), "more_body": left > 0}

    async def read() -> None:
        guarded = gate.Gate(None, Metrics(), api_key=None, max_body=limit, timeout=PATIENCE)
        with pytest.raises(gate._Refused) as refused:
            await guarded._body(receive)
        assert refused.value.message == f"the body must be at most {limit} bytes, got {2 * limit + 98}"

    tracemalloc.start()
    try:
        asyncio.run(read())
    finally:
        tracemalloc.stop()
    assert held[1] - held[0] > limit, "the first chunk, which is all that is allowed, is kept"
    assert held[-1] - held[0] < limit / 4


def test_a_slow_client_keeps_nobody_waiting(server: Running) -> None:
    slow = socket.create_connection(("127.0.0.1", server.port))
    with contextlib.closing(slow):
        slow.sendall(f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n".encode())
        slow.sendall(b"Content-Type: application/json\r\nContent-Length: 100\r\n\r\n{")
        assert server.chat().choices
    server.idle()


# --- in this process --------------------------------------------------------------------------------------------------


@pytest.fixture
def definition_only(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Not Triton's interpreter, which the tests switch on: seconds per step."""
    monkeypatch.setattr(ops, "BACKENDS", {"torch": definition})
    ops._choose.cache_clear()
    yield
    ops._choose.cache_clear()


@contextlib.contextmanager
def started(server: Server) -> Iterator[Running]:
    """A server in a thread of this process, from the moment that its port is open."""
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server._uvicorn.started:
        assert thread.is_alive()
        time.sleep(0.01)
    yield Running(server.address())
    server.stop()
    thread.join(PATIENCE)
    assert not thread.is_alive()


def settings(**more: Any) -> Settings:
    return Settings(str(ROOT / MODEL), port=0, device="cpu", dtype="float32", ctx=CTX, **more)


@pytest.mark.usefixtures("definition_only")
def test_ping_is_503_until_the_model_is_warm_and_after_the_device_is_gone() -> None:
    may_load, ready = threading.Event(), threading.Event()

    class Slow(Server):
        def _load_and_warm(self) -> None:
            assert may_load.wait(PATIENCE)
            super()._load_and_warm()

    server = Slow(settings(), on_ready=lambda url: ready.set())
    with started(server) as running:
        assert running.request("/ping") == (503, {"status": "loading"})
        status, answer = running.request("/v1/chat/completions", chat_body())
        assert (status, answer["error"]["type"]) == (503, "server_error")
        assert not ready.is_set()
        may_load.set()
        assert ready.wait(PATIENCE)
        assert running.request("/ping") == (200, {"status": "ok"})
        assert running.chat(model=str(ROOT / MODEL)).usage.completion_tokens == 12

        (loaded,) = server._models.loaded_models.values()
        loaded.model.generation_config.do_sample = True
        sampled = [
            running.chat(model=str(ROOT / MODEL), seed=seed, temperature=2).choices[0].message.content
            for seed in (1, 2, 1)
        ]
        assert sampled[0] == sampled[2] != sampled[1]

        def gone() -> None:
            raise RuntimeError("CUDA error: device-side assert triggered")

        server.turns.cache.reset = gone
        running.request("/v1/chat/completions", chat_body(model=str(ROOT / MODEL)))
        status, answer = running.request("/ping")
        assert (status, answer["status"]) == (503, "broken: RuntimeError while the cache was emptied")


@pytest.mark.usefixtures("definition_only")
def test_failures_and_deadlines_are_json_and_leave_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    ready = threading.Event()
    server = Server(settings(cache_dtype="fp8"), on_ready=lambda url: ready.set())
    with started(server) as running:
        assert ready.wait(PATIENCE)
        (loaded,) = server._models.loaded_models.values()
        forward = type(loaded.model).forward
        calls = []

        def failing(self: Any, *args: Any, **kwargs: Any) -> Any:
            calls.append(1)
            if len(calls) == 3:
                raise RuntimeError('a "quoted" path\n/secret/place')
            return forward(self, *args, **kwargs)

        def slow(self: Any, *args: Any, **kwargs: Any) -> Any:
            time.sleep(0.2)
            return forward(self, *args, **kwargs)

        asks: dict[str, Any] = {"model": str(ROOT / MODEL), "max_tokens": 40}
        with monkeypatch.context() as patch:
            patch.setattr(type(loaded.model), "forward", failing)
            status, answer = running.request("/v1/chat/completions", chat_body(**asks))
            assert status == 500
            assert "generation failed with RuntimeError" in answer["error"]["message"]
            assert "secret" not in str(answer)
            calls.clear()
            with pytest.raises(openai.APIError) as failure:
                list(running.chat(stream=True, **asks))
            assert str(failure.value.body).startswith("generation failed with RuntimeError")
        running.idle()
        with monkeypatch.context() as patch:
            patch.setattr(type(loaded.model), "forward", slow)
            patch.setattr(server._uvicorn._gate, "timeout", 1.0)
            status, answer = running.request("/v1/chat/completions", chat_body(**asks))
            assert (status, answer["error"]["message"]) == (504, "timed_out")
            with pytest.raises(openai.APIError) as failure:
                list(running.chat(stream=True, **asks))
            assert failure.value.body == "timed_out"
        running.idle_after(dict.fromkeys(("errors_total_failed", "errors_total_timed_out"), 0.0), failed=2, timed_out=2)
        assert running.chat(**{**asks, "max_tokens": 3}).usage.completion_tokens == 3
        assert server.turns.cache.dtype == "fp8"
        assert server.turns.cache.memory_report().tokens_used == 0


@pytest.mark.usefixtures("definition_only")
def test_a_server_that_stops_says_so_to_who_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "GOODBYE_SECONDS", 0.3)
    monkeypatch.setattr(gate, "BODY_SECONDS", 0.5)
    ready = threading.Event()
    server = Server(settings(), on_ready=lambda url: ready.set())
    long = chat_body(model=str(ROOT / MODEL), max_tokens=500, logit_bias=NO_END)
    with started(server) as running, ThreadPoolExecutor() as pool:
        assert ready.wait(PATIENCE)
        with contextlib.closing(socket.create_connection(("127.0.0.1", running.port), timeout=PATIENCE)) as slow:
            slow.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
            assert slow.recv(100).startswith(b"HTTP/1.1 408 ")
        first = pool.submit(running.request, "/v1/chat/completions", long)
        running.until(lambda now: now["requests_running"] == 1)
        second = pool.submit(running.raw, "/v1/chat/completions", long[:-1] + b', "stream": true}', KEY)
        running.until(lambda now: now["requests_waiting"] == 1)
        server.stop()
        status, answer = first.result(PATIENCE)
        assert (status, answer["error"]["message"]) == (503, "stopped")
        status, text = second.result(PATIENCE)
        assert (status, text.split(b"\n\n")[1]) == (200, b'data: {"error": "stopped"}')


@pytest.mark.usefixtures("definition_only")
@pytest.mark.parametrize("family", ["deepseek_v32", "kimi_linear", "dots3_note", "longcat_flash", "mistral4"])
def test_the_one_cache_is_as_new_in_every_turn(family: str) -> None:
    need(family)
    model = build(family, "flash_mla")
    turns = Turns(Metrics(), max_new_tokens=8, max_waiting=0)
    turns.warm(model, max_cache_len=96, block_size=16, dtype=None)
    inputs = prompt((40,))
    expected = greedy(model, inputs).tolist()
    for _ in range(2):
        ticket = Ticket()
        turn = _Turn(turns, model, ticket, prompt_tokens=40)
        assert greedy(turn, inputs).tolist() == expected
        assert turns.cache.memory_report().tokens_used == 0
        ticket.end("left")
        with pytest.raises(EndedError, match="left"):
            greedy(turn, inputs)


def test_a_family_without_pages_is_refused() -> None:
    need("glm5_next")
    with pytest.raises(UnsupportedError, match="glm5_next_text keeps Transformers' own cache"):
        Turns(Metrics(), max_new_tokens=8, max_waiting=0).warm(
            build("glm5_next", "flash_mla"), max_cache_len=64, block_size=16, dtype=None
        )


# --- the command ------------------------------------------------------------------------------------------------------


def refused(*arguments: object) -> str:
    result = CliRunner().invoke(app, ["serve", *map(str, arguments)])
    assert result.exit_code == 1, result.output
    return " ".join(result.output.split())


def test_continuous_batching_is_refused_with_the_reason() -> None:
    assert "stores expanded keys and values" in refused("nowhere", "--port", 0, "--continuous-batching")


def test_a_path_without_a_model_ends_the_command(tmp_path: Path) -> None:
    assert "no-such-folder" in refused(tmp_path / "no-such-folder", "--port", 0)


def not_served(folder: Path) -> str:
    """Why a server for a checkpoint does not start. One that does is stopped at once, without an error."""
    server = Server(Settings(str(folder), port=0, device="cpu"), on_ready=lambda url: server.stop())
    with pytest.raises(ValueError, match="flash") as error:
        server.run()
    return str(error.value)


@pytest.mark.usefixtures("definition_only")
def test_a_checkpoint_that_cannot_be_served_is_an_error_and_no_server(tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((ROOT / MODEL / name).read_bytes())
    torch.save(load_file(ROOT / MODEL / "model.safetensors"), tmp_path / "pytorch_model.bin")
    AutoModelForCausalLM.from_pretrained(tmp_path)  # Transformers takes it
    assert "has no safetensors, and pickled weights are not read" in not_served(tmp_path)
    tiny = LlamaConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=99)
    LlamaForCausalLM(tiny).save_pretrained(tmp_path)
    assert "has no kv_lora_rank" in not_served(tmp_path)


@contextlib.contextmanager
def served_as_json(*flags: object) -> Iterator[tuple[subprocess.Popen[str], dict[str, Any]]]:
    """A server process with --json, and the object of its first line."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "FLASH_MLA_API_KEY": KEY}
    environment.pop("TRITON_INTERPRET", None)
    code = "from flash_mla.cli import main; main()"
    command = ("serve", MODEL, "--port", 0, "--device", "cpu", "--json", *flags)
    process = subprocess.Popen(
        [sys.executable, "-c", code, *map(str, command)],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    try:
        yield process, json.loads(process.stdout.readline())
    finally:
        process.terminate()
        process.communicate()


def test_json_is_one_line_that_says_what_is_served() -> None:
    limits = ("--dtype", "float32", "--cache", "fp8", "--block-size", 32, "--max-body", 4096, "--max-waiting", 5)
    with served_as_json(*limits, "--timeout", 7, "--max-new-tokens", 9) as (process, facts):
        running = Running(facts["url"])
        assert running.request("/ping") == (200, {"status": "ok"})
        assert running.chat(max_tokens=3).usage.completion_tokens == 3
        pages = running.metrics()["kv_pages_total"]
        process.terminate()
        rest, errors = process.communicate(timeout=PATIENCE)
    assert rest == ""
    assert KEY not in json.dumps(facts)
    assert "Loading weights" not in errors, "no bar beside --json"
    versions = facts.pop("versions")
    assert versions == {"torch": torch.__version__, "transformers": transformers.__version__}
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+", facts.pop("url"))
    config = json.loads((ROOT / MODEL / "config.json").read_text())
    ctx = config["max_position_embeddings"]
    layout = row_layout(config["kv_lora_rank"], config["qk_rope_head_dim"])
    assert facts.pop("cache_bytes") >= config["num_hidden_layers"] * ctx * layout.row_bytes
    assert facts == {
        "ready": True, "model": MODEL, "pid": process.pid, "needs_key": True, "device": "cpu", "dtype": "float32",
        "cache_dtype": "fp8", "block_size": 32, "kv_pages_total": ctx / 32, "ctx": ctx, "max_new_tokens": 9,
        "max_body": 4096, "max_waiting": 5, "timeout": 7.0,
    }  # fmt: skip
    assert facts["kv_pages_total"] == pages


def test_json_leaves_standard_output_empty_where_nothing_can_be_served(tmp_path: Path) -> None:
    bars = transformers.utils.logging.is_progress_bar_enabled()
    result = CliRunner().invoke(app, ["serve", str(tmp_path / "no-such-folder"), "--port", "0", "--json"])
    assert transformers.utils.logging.is_progress_bar_enabled() == bars
    assert (result.exit_code, result.stdout) == (1, "")
    assert "no-such-folder" in result.stderr


def test_without_the_extra_the_error_is_a_pip_line() -> None:
    code = "import sys; sys.modules['uvicorn'] = None\nfrom flash_mla.cli import main\nmain()"
    done = subprocess.run([sys.executable, "-c", code, "serve", MODEL], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.strip().endswith("needs uvicorn: pip install 'transformers-flash-mla[serve]'")
