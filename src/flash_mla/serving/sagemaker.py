"""SageMaker's four functions over a model on pages: load it, check a request, generate, answer; a metric line for each.

    SAGEMAKER_PROGRAM=flash_mla.serving.sagemaker

tells sagemaker-inference to take them from here. A worker answers one request at a time. Settings are environment
variables: those of `Limits`, and FLASH_MLA_EMF_NAMESPACE, FLASH_MLA_EMF_SERVICE (the one dimension) and
FLASH_MLA_EMF_PATH of the metric lines. Nothing is unpickled: weights are safetensors, requests and answers JSON.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager

from .emf import NAMESPACE, EmfWriter, RequestNumbers
from .text_answer import Answer, Served, generate_text, load
from .text_request import Limits, RequestError, TextRequest, parse_request

__all__ = [
    "check",
    "count_error",
    "input_fn",
    "model_fn",
    "model_warmup_fn",
    "output_fn",
    "predict_fn",
]

JSON = "application/json"


@functools.lru_cache(maxsize=1)
def _settings() -> tuple[Limits, EmfWriter]:
    writer = EmfWriter(
        {"Service": os.environ.get("FLASH_MLA_EMF_SERVICE", "flash-mla")},
        namespace=os.environ.get("FLASH_MLA_EMF_NAMESPACE", NAMESPACE),
        path=os.environ.get("FLASH_MLA_EMF_PATH") or None,
    )
    return Limits.from_environment(os.environ), writer


@contextmanager
def _counted() -> Iterator[None]:
    """Whatever goes wrong inside is a metric line, and a client's mistake an error with its status for the toolkit."""
    try:
        yield
    except RequestError as error:
        count_error(error.status)
        raise _toolkit_error(error) from None
    except Exception:
        count_error(500)
        raise


def count_error(status: int) -> None:
    """Write the metric line of a request that is answered with this HTTP status."""
    limits, writer = _settings()
    writer.write(RequestNumbers(kv_pages_total=limits.kv_pages, is_error=True), Status=status)


def _toolkit_error(error: RequestError) -> Exception:
    try:
        from sagemaker_inference.errors import BaseInferenceToolkitError
    except ImportError:
        raise ImportError(
            "flash_mla.serving.sagemaker needs sagemaker-inference: pip install 'transformers-flash-mla[sagemaker]'"
        ) from None
    made: Exception = BaseInferenceToolkitError(error.status, str(error), str(error))
    return made


def check(model_dir: str) -> None:
    """Find out what can be known before weights are loaded: settings, and whether the model decodes on pages.

    Raises: ValueError: a wrong setting, or another kind of model. OSError: no such files.
    """
    from transformers import AutoConfig

    from ..quality import require_paged

    _settings()
    require_paged(AutoConfig.from_pretrained(model_dir))


def model_fn(model_dir: str) -> Served:
    """Load a checkpoint of safetensors onto the first GPU in its own dtype, or onto the CPU in float32.

    Raises: ValueError, OSError: of `check`, or of loading.
    """
    check(model_dir)
    return load(model_dir)


def model_warmup_fn(model_dir: str, served: Served) -> None:
    """Generate once, so that kernels are compiled before the endpoint is in service; no metric line."""
    generate_text(TextRequest(("warm", "up, twice as long"), 4, {"do_sample": False}), served, Limits())


def input_fn(body: str | bytes | bytearray, content_type: str | None) -> TextRequest:
    """Check a request.

    Raises: BaseInferenceToolkitError: 415 for anything but JSON, 413 and 400 as `parse_request` says.
    """
    with _counted():
        if (content_type or "").split(";")[0].strip().lower() != JSON:
            raise RequestError(415, f"Content-Type must be {JSON}, got {content_type}")
        return parse_request(body, _settings()[0])


def predict_fn(request: TextRequest, served: Served) -> Answer:
    """Generate; greedy unless the request samples.

    Raises: BaseInferenceToolkitError: 400: more tokens than the model has positions or the rows have pages.
    """
    with _counted():
        return generate_text(request, served, _settings()[0])


def output_fn(answer: Answer, accept: str) -> tuple[str, str]:
    """The answer as JSON with its content type; writes the request's metric line.

    Returns: `{"outputs": [...]}`, one per prompt in their order: `generated_text`, `prompt_tokens`, `generated_tokens`
        (an end token is one) and `finish_reason`, "stop" for an end token and "length" for the limit.
    Raises: BaseInferenceToolkitError: 406: the client takes no JSON.
    """
    with _counted():
        kinds = [kind.split(";")[0].strip().lower() for kind in accept.split(",")]
        if not {JSON, "application/*", "*/*"} & set(kinds):
            raise RequestError(406, f"Accept must allow {JSON}, got {accept}")
        body = json.dumps({"outputs": answer.outputs}, ensure_ascii=False)
        _settings()[1].write(answer.numbers, Status=200, Rows=len(answer.outputs))
        return body, JSON
