"""What `/metrics` counts: requests, errors, tokens, their times, and the pages of the pool."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

__all__ = ["Metrics"]

# Seconds. A small model on a GPU takes about 10 ms per token, a large one on a CPU a second.
PER_TOKEN = (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5)
TO_FIRST = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class Metrics:
    """Counters of one server, in a registry of their own: two servers in one process do not share them."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        # Resident memory, CPU seconds, open files: on Linux.
        ProcessCollector(registry=registry)
        self.requests = Counter(
            "flash_mla_requests", "Answers by path and status.", ["path", "status"], registry=registry
        )
        self.errors = Counter(
            "flash_mla_errors",
            "Requests that got no whole answer: refused (4xx), failed, left (by the client), timed_out.",
            ["kind"],
            registry=registry,
        )
        for kind in ("refused", "failed", "left", "timed_out"):
            self.errors.labels(kind)  # a rate needs the zero
        self.prompt_tokens = Counter("flash_mla_prompt_tokens", "Tokens of prompts.", registry=registry)
        self.generated_tokens = Counter("flash_mla_generated_tokens", "Tokens that were generated.", registry=registry)
        self.time_per_token = Histogram(
            "flash_mla_time_per_token_seconds",
            "From one token of a request to its next.",
            buckets=PER_TOKEN,
            registry=registry,
        )
        self.time_to_first_token = Histogram(
            "flash_mla_time_to_first_token_seconds",
            "From a request's arrival to its first token, waiting included.",
            buckets=TO_FIRST,
            registry=registry,
        )
        self.pages_used = Gauge("flash_mla_kv_pages_used", "Pages that hold tokens.", registry=registry)
        self.pages_total = Gauge("flash_mla_kv_pages_total", "Pages of the pool.", registry=registry)
        self.running = Gauge("flash_mla_requests_running", "Requests that generate now: 0 or 1.", registry=registry)
        self.waiting = Gauge("flash_mla_requests_waiting", "Requests that wait for their turn.", registry=registry)

    def text(self) -> bytes:
        """Everything, in the text format of Prometheus."""
        text: bytes = generate_latest(self.registry)
        return text
