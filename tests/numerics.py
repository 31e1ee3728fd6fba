"""When a result is right: no further from fp64 than twice what plain torch in the same dtype is."""

from __future__ import annotations

import dataclasses

import torch
from cases import Problem

from flash_mla import decode

# lse is accumulated in fp32 whatever the dtype; absolute, natural log, for scores of ordinary size (q_factor 1).
LSE_ERROR = 1e-5


def reference(problem: Problem) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition in fp64 on the same values."""
    q, kv_cache, block_table, cache_seqlens = problem.arguments()
    return decode(q.double(), kv_cache.double(), block_table, cache_seqlens, **problem.options(), backend="torch")


def plain(problem: Problem) -> torch.Tensor:
    """Scores, softmax and values as anybody would write them, every step in the dtype of the inputs."""
    case = problem.case
    out = torch.zeros((*problem.q.shape[:3], case.kv_lora_rank), dtype=problem.q.dtype, device=problem.q.device)
    group = case.num_heads // case.h_kv
    for request, length in enumerate(case.lengths):
        num_pages = -(-length // case.block_size)
        pages = problem.block_table[request, :num_pages].long()
        latents = problem.kv_cache[pages].flatten(0, 1)[:length]
        for query in range(case.seqlen_q):
            seen = length - (case.seqlen_q - 1 - query) if case.causal else length
            for head in range(case.h_kv if seen > 0 else 0):
                k = latents[:seen, head]
                heads = slice(head * group, (head + 1) * group)
                p = torch.softmax(problem.q[request, query, heads] @ k.T * case.softmax_scale, dim=-1)
                out[request, query, heads] = p @ k[:, : case.kv_lora_rank]
    return out


def largest_score(problem: Problem) -> float:
    """The largest |score| of any query with any token of its request, in fp64."""
    case, largest = problem.case, 0.0
    group = case.num_heads // case.h_kv
    for request, length in enumerate(case.lengths):
        pages = problem.block_table[request, : -(-length // case.block_size)].long()
        latents = problem.kv_cache[pages].flatten(0, 1)[:length].double()
        for head in range(case.h_kv if length else 0):
            q = problem.q[request, :, head * group : (head + 1) * group].double()
            largest = max(largest, (q @ latents[:, head].T * case.softmax_scale).abs().max().item())
    return largest


def lse_allowed(problem: Problem, right_lse: torch.Tensor) -> torch.Tensor:
    """How far each lse may be off.

    Two roundings of fp32 at the size of the value come on top of LSE_ERROR: a value of 100 has no 1e-5. Where scores
    are large, LSE_ERROR does not cover what they are off themselves, and lse is off by as much: a tensor core adds 16
    products to a sum and cuts off what is below its last bit, up to 2^-23 of it, d_qk / 16 times.
    """
    allowed = LSE_ERROR + 2**-22 * right_lse.abs()
    if problem.case.q_factor > 1:
        allowed += 2**-23 * problem.case.d_qk / 16 * largest_score(problem)
    return allowed


def assert_right(problem: Problem, out: torch.Tensor, lse: torch.Tensor) -> None:
    """Compare a backend's result with fp64, infinities and zeros in the same places."""
    right_out, right_lse = reference(problem)
    # The definition has a witness in every case: what is written plainly below, in fp64 too.
    exact = dataclasses.replace(problem, q=problem.q.double(), kv_cache=problem.kv_cache.double())
    torch.testing.assert_close(right_out, plain(exact), rtol=1e-10, atol=1e-12)
    assert out.dtype == problem.q.dtype
    assert out.shape == right_out.shape
    assert lse.shape == right_lse.shape
    sees_nothing = torch.isinf(right_lse)
    assert torch.equal(torch.isposinf(lse), sees_nothing)
    assert not out.transpose(1, 2)[sees_nothing].any()
    lse_error = (lse.double() - right_lse)[~sees_nothing].abs()
    allowed = lse_allowed(problem, right_lse[~sees_nothing])
    assert bool((lse_error <= allowed).all()), f"lse is off by {lse_error.max().item():.1e}"
    error = (out.double() - right_out).norm().item()
    yardstick = (plain(problem).double() - right_out).norm().item()
    assert error <= 2 * yardstick, f"error {error:.2e}, plain torch in {out.dtype} has {yardstick:.2e}"
