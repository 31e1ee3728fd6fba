"""Which way each attention call went: counters by model type and path, and one INFO line for each new pair.

A compiled graph increments nothing: its trace records the path once.
"""

from __future__ import annotations

import logging
import threading

import torch

__all__ = ["path_counts", "record", "reset_path_counts"]

logger = logging.getLogger(__name__)

_counts: dict[tuple[str, str], int] = {}
_lock = threading.Lock()

MEANING = {
    "dense": "expanded keys and values through SDPA, as without flash_mla",
    "prefill": "empty cache: only the new tokens expanded, SDPA among them",
    "absorbed": "attends to the latents in their pages",
    "sparse": "attends to the latents that an indexer chose, in their pages",
    "sliced": "a chunk on a context: its own tokens through SDPA, the context in slices or absorbed",
    "gathered": "context gathered from its pages and expanded, SDPA",
}


def path_counts() -> dict[tuple[str, str], int]:
    """Attention calls so far in this process, by (model type, path); paths: dense, prefill, absorbed, sparse,
    sliced, gathered.

    One call is one layer in one forward. Under `torch.compile` a path is counted once per trace.
    """
    with _lock:
        return dict(_counts)


def reset_path_counts() -> None:
    """Set every counter back to nothing."""
    with _lock:
        _counts.clear()


def _count(model_type: str, path: str, why: str) -> None:
    with _lock:
        first = (model_type, path) not in _counts
        _counts[model_type, path] = _counts.get((model_type, path), 0) + 1
    if first:
        logger.info("%s: %s path (%s)%s", model_type, path, MEANING[path], f": {why}" if why else "")


# Run when a graph is traced and left out of it: neither the dict nor its guards become part of the graph.
_count_at_trace = torch.compiler.assume_constant_result(_count)


def record(model_type: str, path: str, why: str = "") -> None:
    """Count one attention call.

    Args:
        model_type: of the attention module's config.
        path: one of MEANING.
        why: the reason, for the INFO line.
    """
    if torch.compiler.is_compiling():
        _count_at_trace(model_type, path, why)
    else:
        _count(model_type, path, why)
