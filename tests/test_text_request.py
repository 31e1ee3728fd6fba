"""Requests for text: what is taken, and what a client is told of everything else, before any model sees it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from flash_mla.serving.text_request import Limits, RequestError, parse_request

LIMITS = Limits(max_body_bytes=400, max_rows=3, max_new_tokens=100)


def body(inputs: Any = "text", **parameters: Any) -> str:
    return json.dumps({"inputs": inputs, "parameters": parameters})


def test_what_is_taken() -> None:
    request = parse_request(json.dumps({"inputs": "Latents é"}).encode(), LIMITS)
    assert (request.prompts, request.max_new_tokens, request.sampling) == (("Latents é",), 64, {"do_sample": False})
    request = parse_request(
        body(["a", "b"], max_new_tokens=100, do_sample=True, temperature=1, top_p=0.5, top_k=7), LIMITS
    )
    assert request.prompts == ("a", "b")
    assert request.max_new_tokens == 100
    assert request.sampling == {"do_sample": True, "temperature": 1.0, "top_p": 0.5, "top_k": 7}
    assert parse_request(bytearray(body().encode()), LIMITS).prompts == ("text",)
    # A limit below the default is the default.
    assert parse_request(body(), Limits(max_new_tokens=5)).max_new_tokens == 5


@pytest.mark.parametrize(
    ("given", "status", "reason"),
    [
        (b"", 400, "must be JSON"),
        (b"\xff\xfe{", 400, "UTF-8"),
        (b'{"inputs": "\xff"}', 400, "must be UTF-8: invalid start byte at byte 12"),
        ('{"inputs": "a", "parameters": {"temperature": NaN}}', 400, "NaN is not JSON"),
        ("[" * 390, 400, "JSON"),
        ('"text"', 400, "must be a JSON object, got a string"),
        ("[1]", 400, "must be a JSON object, got an array"),
        ('{"inputs": "a", "stream": true}', 400, "must be of inputs, parameters, got 'stream'"),
        ('{"inputs": "a", "parameters": []}', 400, "parameters must be a JSON object, got an array"),
        ("{}", 400, "inputs must be a string or an array of strings, got null"),
        (body([]), 400, "got an empty array"),
        (body(7), 400, "got a number"),
        (body(["a", 7]), 400, "got a number as number 1"),
        (body(["a", " \n"]), 400, "got an empty one as number 1"),
        (body(["a"] * 4), 413, "at most 3 strings, got 4"),
        ('{"inputs": "\\ud800"}', 400, "number 0 has a lone surrogate"),
        (body("a" * 400), 413, "at most 400 bytes, got 4"),
        ('{"inputs": "' + "é" * 194 + '"}', 413, "at most 400 bytes, got 402"),
        (body(max_new_tokens=0), 400, "max_new_tokens must be a whole number from 1 to 100, got 0"),
        (body(max_new_tokens=101), 400, "from 1 to 100, got 101"),
        (body(max_new_tokens=2.0), 400, "from 1 to 100, got 2.0"),
        (body(max_new_tokens=True), 400, "got true"),
        (body(max_new_tokens="5"), 400, 'got "5"'),
        (body(num_beams=4), 400, "parameters must be of max_new_tokens, .*, got 'num_beams'"),
        (body(do_sample=1), 400, "do_sample must be true or false, got a number"),
        (body(temperature=0.5), 400, "temperature: only with do_sample true"),
        (body(do_sample=True, temperature=0), 400, "temperature must be a number above 0 and at most 100, got 0"),
        ('{"inputs": "a", "parameters": {"do_sample": true, "temperature": 1e999}}', 400, "got Infinity"),
        (body(do_sample=True, top_p=1.5), 400, "top_p must be a number above 0 and at most 1, got 1.5"),
        (body(do_sample=True, top_k=0), 400, "top_k must be a whole number >= 1, got 0"),
    ],
)
def test_what_is_refused_says_why(given: str | bytes, status: int, reason: str) -> None:
    with pytest.raises(RequestError, match=reason) as caught:
        parse_request(given, LIMITS)
    assert caught.value.status == status


def test_json_that_is_nested_deeper_than_python_goes() -> None:
    with pytest.raises(RequestError, match="not nested so deep"):
        parse_request('{"inputs": ' + "[" * 100_000 + "]" * 100_000 + "}", Limits())


def test_limits_come_from_the_environment() -> None:
    assert Limits.from_environment({}) == Limits()
    given = {"FLASH_MLA_MAX_ROWS": "2", "FLASH_MLA_KV_PAGES": " 9 ", "FLASH_MLA_MAX_NEW_TOKENS": ""}
    assert Limits.from_environment(given) == Limits(max_rows=2, kv_pages=9)
    for wrong in ("0", "-1", "2.5", "many", "²"):
        with pytest.raises(ValueError, match="FLASH_MLA_MAX_ROWS must be a whole number >= 1"):
            Limits.from_environment({"FLASH_MLA_MAX_ROWS": wrong})
