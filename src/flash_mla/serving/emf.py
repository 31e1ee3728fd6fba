"""How a request's numbers become one CloudWatch metric line: embedded metric format (EMF), JSON, no SDK and no network.

CloudWatch Logs reads metrics out of a log event that is such a document and nothing else. So one line is one write:
with anything before or after it on its line CloudWatch stores the line as text and finds no metric.

Source: docs.aws.amazon.com/AmazonCloudWatch/latest/monitoring/CloudWatch_Embedded_Metric_Format_Specification.html
"""

from __future__ import annotations

import json
import math
import os
import re
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["NAMESPACE", "UNITS", "EmfWriter", "RequestNumbers", "emf_document"]

NAMESPACE = "FlashMLA"
# What each number is called in CloudWatch, and its unit there.
UNITS = {
    "Requests": "Count",
    "Errors": "Count",
    "PromptTokens": "Count",
    "GeneratedTokens": "Count",
    "TimePerToken": "Milliseconds",
    "TimeToFirstToken": "Milliseconds",
    "KVPagesUsed": "Count",
    "KVPagesTotal": "Count",
}
MAX_DIMENSIONS = 30


@dataclass(frozen=True)
class RequestNumbers:
    """What one request adds; None where there is nothing to say, and then no such metric is written.

    Attributes:
        prompt_tokens, generated_tokens: over all rows, without padding.
        time_per_token_ms: milliseconds per decode step, all rows at once.
        time_to_first_token_ms: milliseconds from the start of prefill.
        kv_pages_used: pages that held tokens when the request ended, before they were given back.
        kv_pages_total: pages that may be held at once.
        is_error: whether it was answered with an error.
    """

    prompt_tokens: int | None = None
    generated_tokens: int | None = None
    time_per_token_ms: float | None = None
    time_to_first_token_ms: float | None = None
    kv_pages_used: int | None = None
    kv_pages_total: int | None = None
    is_error: bool = False

    def metrics(self) -> dict[str, float]:
        """By CloudWatch's name. Errors is 0 too: an alarm on a rate needs the requests that went well."""
        named = {
            "Requests": 1,
            "Errors": int(self.is_error),
            "PromptTokens": self.prompt_tokens,
            "GeneratedTokens": self.generated_tokens,
            "TimePerToken": self.time_per_token_ms,
            "TimeToFirstToken": self.time_to_first_token_ms,
            "KVPagesUsed": self.kv_pages_used,
            "KVPagesTotal": self.kv_pages_total,
        }
        return {name: value for name, value in named.items() if value is not None}


def emf_document(
    metrics: Mapping[str, float],
    *,
    dimensions: Mapping[str, str],
    namespace: str = NAMESPACE,
    timestamp_ms: int | None = None,
    properties: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """One EMF document.

    Args:
        metrics: by name, of `UNITS`.
        dimensions: what tells this series from others, as one set; every value makes a series that is paid for, so no
            request id belongs here. Empty: one series.
        namespace: of CloudWatch.
        timestamp_ms: milliseconds since 1970; default: now.
        properties: other members, searchable in the log and no metric.
    Raises: ValueError: what CloudWatch would not take, or would drop without a word.
    """
    if not re.fullmatch(r"[0-9A-Za-z._/#:-]{1,255}", namespace) or namespace.startswith("AWS/"):
        raise ValueError(
            "flash_mla.emf: namespace must be 1 to 255 of letters, digits and . - _ / # :, and not begin with AWS/, "
            f"got {namespace!r}"
        )
    if not metrics:
        raise ValueError("flash_mla.emf: a document needs at least one metric, got none")
    for name, value in metrics.items():
        if name not in UNITS:
            raise ValueError(f"flash_mla.emf: metrics must be of {', '.join(UNITS)}, got {name!r}")
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value < 0:
            raise ValueError(f"flash_mla.emf: {name} must be a finite number >= 0, got {value!r}")
    if len(dimensions) > MAX_DIMENSIONS:
        raise ValueError(f"flash_mla.emf: at most {MAX_DIMENSIONS} dimensions, got {len(dimensions)}")
    for name, text in dimensions.items():
        for what, word, most in (("name", name, 250), ("value", text, 1024)):
            if not isinstance(word, str) or not word.strip() or len(word) > most or not word.isascii():
                raise ValueError(
                    f"flash_mla.emf: the {what} of a dimension must be 1 to {most} ASCII characters, got {word!r}"
                )
        if name.startswith(":"):
            raise ValueError(f"flash_mla.emf: the name of a dimension must not begin with a colon, got {name!r}")
    extra = dict(properties or {})
    # Metrics, dimensions and properties are members of one object: the later of two of a name would win.
    taken = ["_aws", *metrics, *dimensions, *extra]
    doubled = sorted({name for name in taken if taken.count(name) > 1})
    if doubled:
        raise ValueError(f"flash_mla.emf: metrics, dimensions and properties need names of their own: {doubled}")
    return {
        "_aws": {
            "Timestamp": time.time_ns() // 10**6 if timestamp_ms is None else timestamp_ms,
            "CloudWatchMetrics": [
                {
                    "Namespace": namespace,
                    "Dimensions": [list(dimensions)],
                    "Metrics": [{"Name": name, "Unit": UNITS[name]} for name in metrics],
                }
            ],
        },
        **dimensions,
        **metrics,
        **extra,
    }


class EmfWriter:
    """Writes a line per request.

    Args:
        dimensions: of every line.
        namespace: of CloudWatch.
        path: a file that lines are appended to; None: standard output. In a container whose server reads the worker's
            output and puts words of its own in front of each line, "/proc/1/fd/1": the output of the container itself.
    Raises: ValueError: of `emf_document`, at once and not at the first request. OSError: the file cannot be opened.
    """

    def __init__(self, dimensions: Mapping[str, str], *, namespace: str = NAMESPACE, path: str | None = None) -> None:
        emf_document({"Requests": 1}, dimensions=dimensions, namespace=namespace)
        self.dimensions = dict(dimensions)
        self.namespace = namespace
        # Without O_CREAT: a path that is mistyped is an error, not a file that nobody reads.
        self.descriptor = None if path is None else os.open(path, os.O_WRONLY | os.O_APPEND)

    def write(self, numbers: RequestNumbers, **properties: Any) -> dict[str, Any]:
        """Write the line of one request; returns its document."""
        document = emf_document(
            numbers.metrics(), dimensions=self.dimensions, namespace=self.namespace, properties=properties
        )
        line = json.dumps(document, separators=(",", ":"), allow_nan=False) + "\n"
        if self.descriptor is None:
            sys.stdout.write(line)
            sys.stdout.flush()
        else:
            # One call: a pipe keeps up to 4,096 bytes together, whoever else writes to it. A line has about 700.
            os.write(self.descriptor, line.encode())
        return document
