"""Whether a measured call was right: a few of its requests beside fp64, so that a fast wrong kernel is no figure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

import torch

from ..codec import decode_rows

__all__ = ["WrongResultError", "attend", "check_outputs", "check_sparse_outputs", "requests_to_check"]

# Distance from fp64 that is allowed, in units of what plain torch in the same dtype has.
ALLOWED = 2.0


class WrongResultError(RuntimeError):
    """A backend's result is further from fp64 than rounding explains."""


def requests_to_check(lengths: Sequence[int]) -> list[int]:
    """Indices of the first, the last and the longest request."""
    longest = max(range(len(lengths)), key=lengths.__getitem__)
    return sorted({0, len(lengths) - 1, longest})


def attend(q: torch.Tensor, latents: torch.Tensor, kv_lora_rank: int, softmax_scale: float) -> torch.Tensor:
    """Causal attention of one request as anybody would write it, every step in the dtype of the inputs.

    Args:
        q: `[seqlen_q, num_heads, d_qk]`.
        latents: `[length, d_qk]`.
    Returns: `[seqlen_q, num_heads, kv_lora_rank]`.
    """
    seqlen_q, length = q.shape[0], latents.shape[0]
    scores = q @ latents.T * softmax_scale
    position = torch.arange(length, device=q.device)
    last_seen = length - seqlen_q + torch.arange(seqlen_q, device=q.device)
    scores = scores.masked_fill((position > last_seen[:, None])[:, None], float("-inf"))
    return torch.softmax(scores, dim=-1) @ latents[:, :kv_lora_rank]


# What a backend returned for some queries, these queries, and the rows of the pool that they attend to.
_Part = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def check_outputs(
    out: torch.Tensor,
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    lengths: Sequence[int],
    *,
    kv_lora_rank: int,
    softmax_scale: float,
) -> float:
    """Compare some requests of a decode call with fp64.

    Args:
        out: `[batch, seqlen_q, num_heads, kv_lora_rank]`, what a backend returned.
        q, kv_cache, block_table: its arguments; one kv head. FP8 rows are decoded: the same bytes, in fp64.
        lengths: tokens per request, on the host; none shorter than seqlen_q.
    Returns: distance from fp64 over that of plain torch in the dtype of `q`, of the checked requests together.
    Raises: WrongResultError: more than twice, or anything in `out` that is not finite.
    """
    requests = requests_to_check(lengths)

    def parts() -> Iterator[_Part]:
        for request in requests:
            num_pages = -(-lengths[request] // kv_cache.shape[1])
            pages = block_table[request, :num_pages].long()
            yield out[request], q[request], kv_cache[pages, :, 0].flatten(0, 1)[: lengths[request]]

    return _error_over_plain(out, parts(), requests, kv_lora_rank, softmax_scale)


def check_sparse_outputs(
    out: torch.Tensor,
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    indices: torch.Tensor,
    *,
    kv_lora_rank: int,
    softmax_scale: float,
) -> float:
    """Compare the first and the last request of a sparse decode call with fp64.

    Args:
        out: `[batch, seqlen_q, num_heads, kv_lora_rank]`, what a backend returned.
        q, kv_cache: its arguments, as in `check_outputs`.
        indices: int32 `[batch, seqlen_q, topk]`, all inside the pool.
    Returns, Raises: as `check_outputs`.
    """
    requests = sorted({0, len(out) - 1})

    def parts() -> Iterator[_Part]:
        for request in requests:
            for query in range(q.shape[1]):
                named = indices[request, query].long()
                rows = kv_cache[named // kv_cache.shape[1], named % kv_cache.shape[1], 0]
                yield out[request, query, None], q[request, query, None], rows

    return _error_over_plain(out, parts(), requests, kv_lora_rank, softmax_scale)


def _latents(rows: torch.Tensor, kv_lora_rank: int, d_qk: int, dtype: torch.dtype) -> torch.Tensor:
    """`[length, d_qk]` in `dtype` of rows of a pool, whatever they are made of."""
    if rows.dtype != torch.uint8:
        return rows.to(dtype)
    return torch.cat(decode_rows(rows, kv_lora_rank, d_qk - kv_lora_rank, dtype), dim=-1)


def _error_over_plain(
    out: torch.Tensor, parts: Iterable[_Part], requests: Sequence[int], kv_lora_rank: int, softmax_scale: float
) -> float:
    if not bool(out.isfinite().all()):
        bad = (~out.isfinite()).flatten(1).any(1).nonzero().flatten().tolist()
        raise WrongResultError(f"not finite in {len(bad)} of {len(out)} requests, first in request {bad[0]}")
    errors, yardsticks, norms = [], [], []
    for found, q, rows in parts:
        in_fp64 = _latents(rows, kv_lora_rank, q.shape[-1], torch.float64)
        exact = attend(q.double(), in_fp64, kv_lora_rank, softmax_scale)
        plain = attend(q, _latents(rows, kv_lora_rank, q.shape[-1], q.dtype), kv_lora_rank, softmax_scale)
        errors.append((found.double() - exact).norm().item())
        yardsticks.append((plain.double() - exact).norm().item())
        norms.append(exact.norm().item())
    error, yardstick, norm = (math.hypot(*several) for several in (errors, yardsticks, norms))
    if not error <= ALLOWED * yardstick:
        raise WrongResultError(
            f"wrong result: relative error {error / norm:.2e} over requests {requests}, "
            f"plain torch in {str(out.dtype).removeprefix('torch.')} has {yardstick / norm:.2e}; "
            f"allowed is {ALLOWED:g}x"
        )
    return error / yardstick
