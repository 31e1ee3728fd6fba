"""Whether a measured call was right: a few of its requests beside fp64, so that a fast wrong kernel is no figure."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

__all__ = ["WrongResultError", "attend", "check_outputs", "requests_to_check"]

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
        q, kv_cache, block_table: its arguments; one kv head.
        lengths: tokens per request, on the host; none shorter than seqlen_q.
    Returns: distance from fp64 over that of plain torch in the dtype of `q`, of the checked requests together.
    Raises: WrongResultError: more than twice, or anything in `out` that is not finite.
    """
    if not bool(out.isfinite().all()):
        bad = (~out.isfinite()).flatten(1).any(1).nonzero().flatten().tolist()
        raise WrongResultError(f"not finite in {len(bad)} of {len(out)} requests, first in request {bad[0]}")
    requests = requests_to_check(lengths)
    errors, yardsticks, norms = [], [], []
    for request in requests:
        num_pages = -(-lengths[request] // kv_cache.shape[1])
        pages = block_table[request, :num_pages].long()
        latents = kv_cache[pages, :, 0].flatten(0, 1)[: lengths[request]]
        exact = attend(q[request].double(), latents.double(), kv_lora_rank, softmax_scale)
        plain = attend(q[request], latents, kv_lora_rank, softmax_scale)
        errors.append((out[request].double() - exact).norm().item())
        yardsticks.append((plain.double() - exact).norm().item())
        norms.append(exact.norm().item())
    error, yardstick, norm = (math.hypot(*parts) for parts in (errors, yardsticks, norms))
    if not error <= ALLOWED * yardstick:
        raise WrongResultError(
            f"wrong result: relative error {error / norm:.2e} over requests {requests}, "
            f"plain torch in {str(q.dtype).removeprefix('torch.')} has {yardstick / norm:.2e}; allowed is {ALLOWED:g}x"
        )
    return error / yardstick
