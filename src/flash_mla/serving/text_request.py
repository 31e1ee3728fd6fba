"""What a request for text is: JSON, checked before any of it reaches a model, against limits that bound its cost."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

__all__ = ["Limits", "RequestError", "TextRequest", "parse_request"]

SAMPLING = ("temperature", "top_p", "top_k")
PARAMETERS = ("max_new_tokens", "do_sample", *SAMPLING)


class RequestError(ValueError):
    """A request that the client has to change.

    Args:
        status: HTTP status, 400 to 499.
        message: what must hold and what came.
    """

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Limits:
    """What one request may ask for.

    Attributes:
        max_body_bytes: of the JSON.
        max_rows: prompts.
        max_new_tokens: to generate per row.
        kv_pages: pages of 64 tokens that the rows may take together, prompt and new tokens.
    """

    max_body_bytes: int = 1 << 20
    max_rows: int = 8
    max_new_tokens: int = 512
    kv_pages: int = 512

    @classmethod
    def from_environment(cls, environ: Mapping[str, str]) -> Limits:
        """The defaults, each replaced by a variable of its name: FLASH_MLA_MAX_ROWS for `max_rows`.

        Raises: ValueError: not a whole number >= 1.
        """
        given = {}
        for field in fields(cls):
            name = f"FLASH_MLA_{field.name.upper()}"
            text = environ.get(name, "").strip()
            if text:
                if not (text.isascii() and text.isdecimal() and int(text) >= 1):
                    raise ValueError(f"flash_mla.serving: {name} must be a whole number >= 1, got {text!r}")
                given[field.name] = int(text)
        return cls(**given)


@dataclass(frozen=True)
class TextRequest:
    """A checked request.

    Attributes:
        prompts: one per row, none of them empty.
        max_new_tokens: per row.
        sampling: arguments of `generate`: `do_sample` and, where it is true, what the client said of the rest.
    """

    prompts: tuple[str, ...]
    max_new_tokens: int
    sampling: dict[str, Any]


def parse_request(body: str | bytes | bytearray, limits: Limits) -> TextRequest:
    """Check `{"inputs": text or [texts], "parameters": {...}}`; no other member and no other parameter is taken.

    Raises: RequestError: 413: body or rows over the limit. 400: everything else, with what came.
    """
    size = len(body.encode("utf-8", "surrogatepass") if isinstance(body, str) else body)
    if size > limits.max_body_bytes:
        raise RequestError(413, f"the body must be at most {limits.max_body_bytes} bytes, got {size}")
    try:
        given = json.loads(body, parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise RequestError(400, f"the body must be UTF-8: {error.reason} at byte {error.start}") from None
    except RecursionError:
        raise RequestError(400, "the body must be JSON that is not nested so deep") from None
    except ValueError as error:
        raise RequestError(400, f"the body must be JSON: {error}") from None
    if not isinstance(given, dict):
        raise RequestError(400, f"the body must be a JSON object, got {_kind(given)}")
    _only("members of the body", given, ("inputs", "parameters"))
    parameters = given.get("parameters", {})
    if not isinstance(parameters, dict):
        raise RequestError(400, f"parameters must be a JSON object, got {_kind(parameters)}")
    _only("parameters", parameters, PARAMETERS)
    prompts = _prompts(given.get("inputs"), limits)
    most = limits.max_new_tokens
    new_tokens = _integer(parameters, "max_new_tokens", min(64, most), most)
    return TextRequest(prompts, new_tokens, _sampling(parameters))


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "an array", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")


def _only(what: str, given: dict[str, Any], known: tuple[str, ...]) -> None:
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise RequestError(400, f"{what} must be of {', '.join(known)}, got {', '.join(map(repr, unknown))}")


def _prompts(inputs: Any, limits: Limits) -> tuple[str, ...]:
    prompts = [inputs] if isinstance(inputs, str) else inputs
    if not isinstance(prompts, list) or not prompts:
        what = "an empty array" if prompts == [] else _kind(inputs)
        raise RequestError(400, f"inputs must be a string or an array of strings, got {what}")
    if len(prompts) > limits.max_rows:
        raise RequestError(413, f"inputs must hold at most {limits.max_rows} strings, got {len(prompts)}")
    for row, prompt in enumerate(prompts):
        if not isinstance(prompt, str) or not prompt.strip():
            what = "an empty one" if isinstance(prompt, str) else _kind(prompt)
            raise RequestError(400, f"inputs must be strings with text, got {what} as number {row}")
        try:
            prompt.encode()
        except UnicodeEncodeError:
            # JSON may name half of a surrogate pair; no tokenizer takes it.
            raise RequestError(400, f"inputs must be whole characters: number {row} has a lone surrogate") from None
    return tuple(prompts)


def _integer(parameters: dict[str, Any], name: str, default: int, most: int | None) -> int:
    value = parameters.get(name, default)
    if type(value) is not int or value < 1 or (most is not None and value > most):
        span = ">= 1" if most is None else f"from 1 to {most}"
        raise RequestError(400, f"{name} must be a whole number {span}, got {json.dumps(value)[:40]}")
    return value


def _sampling(parameters: dict[str, Any]) -> dict[str, Any]:
    do_sample = parameters.get("do_sample", False)
    if type(do_sample) is not bool:
        raise RequestError(400, f"do_sample must be true or false, got {_kind(do_sample)}")
    chosen = [name for name in SAMPLING if name in parameters]
    if not do_sample:
        if chosen:
            raise RequestError(400, f"{', '.join(chosen)}: only with do_sample true; without it decoding is greedy")
        return {"do_sample": False}
    sampling: dict[str, Any] = {"do_sample": True}
    for name, most in (("temperature", 100.0), ("top_p", 1.0)):
        if name in parameters:
            value = parameters[name]
            if type(value) not in (int, float) or not 0 < value <= most:
                what = json.dumps(value)[:40]
                raise RequestError(400, f"{name} must be a number above 0 and at most {most:g}, got {what}")
            sampling[name] = float(value)
    if "top_k" in parameters:
        sampling["top_k"] = _integer(parameters, "top_k", 1, None)
    return sampling
