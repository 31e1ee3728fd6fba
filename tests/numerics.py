"""When a result is right: no further from fp64 than twice what plain torch in the same dtype is."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from cases import Problem
from torch.utils._python_dispatch import TorchDispatchMode

from flash_mla import decode

# lse is accumulated in fp32 whatever the dtype; absolute, natural log, for scores of ordinary size (q_factor 1).
LSE_ERROR = 1e-5


def reference(problem: Problem) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition in fp64 on the same values."""
    q, kv_cache, block_table, cache_seqlens = in_double(problem).arguments()
    return decode(q, kv_cache, block_table, cache_seqlens, **problem.options(), backend="torch")


def in_double(problem: Problem) -> Problem:
    """The same values in fp64; FP8 rows stay what they are."""
    kv_cache = problem.kv_cache if problem.case.fp8 else problem.kv_cache.double()
    return dataclasses.replace(problem, q=problem.q.double(), kv_cache=kv_cache)


def plain(problem: Problem) -> torch.Tensor:
    """Scores, softmax and values as anybody would write them, every step in the dtype of the inputs."""
    case = problem.case
    out = torch.zeros((*problem.q.shape[:3], case.kv_lora_rank), dtype=problem.q.dtype, device=problem.q.device)
    group = case.num_heads // case.h_kv
    rows = problem.latents()
    for request, length in enumerate(case.lengths):
        num_pages = -(-length // case.block_size)
        pages = problem.block_table[request, :num_pages].long()
        latents = rows[pages].flatten(0, 1)[:length]
        for query in range(case.seqlen_q):
            seen = length - (case.seqlen_q - 1 - query) if case.causal else length
            for head in range(case.h_kv if seen > 0 else 0):
                k = latents[:seen, head]
                heads = slice(head * group, (head + 1) * group)
                p = torch.softmax(problem.q[request, query, heads] @ k.T * case.softmax_scale, dim=-1)
                out[request, query, heads] = p @ k[:, : case.kv_lora_rank]
    return out


def largest_score(problem: Problem, of_magnitudes: bool = False) -> float:
    """The largest |score| of any query with any token of its request, in fp64; or of its products' magnitudes' sum."""
    case, largest = problem.case, 0.0
    q_all, rows = in_double(problem).q, in_double(problem).latents()
    if of_magnitudes:
        q_all, rows = q_all.abs(), rows.abs()
    group = case.num_heads // case.h_kv
    for request, length in enumerate(case.lengths):
        pages = problem.block_table[request, : -(-length // case.block_size)].long()
        latents = rows[pages].flatten(0, 1)[:length]
        for head in range(case.h_kv if length else 0):
            q = q_all[request, :, head * group : (head + 1) * group]
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
    if problem.case.fp8:
        # A kernel may round a latent, code times scale, to the dtype of the queries: every product is off by as much.
        allowed += torch.finfo(problem.q.dtype).eps / 2 * largest_score(problem, of_magnitudes=True)
    return allowed


def assert_right(problem: Problem, out: torch.Tensor, lse: torch.Tensor) -> None:
    """Compare a backend's result with fp64, infinities and zeros in the same places."""
    right_out, right_lse = reference(problem)
    # The definition has a witness in every case: what is written plainly below, in fp64 too.
    torch.testing.assert_close(right_out, plain(in_double(problem)), rtol=1e-10, atol=1e-12)
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


class OneByOne(TorchDispatchMode):
    """Batched products in fp32 as of a device that adds every column to one running sum."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.bmm.default, torch.ops.aten.baddbmm_.default) and args[0].dtype == torch.float32:
            left, right = args[-2:]
            total = left.new_zeros((*left.shape[:2], right.shape[2]))
            for column in range(left.shape[2]):
                total += left[:, :, column, None] * right[:, None, column]
            return total if func is torch.ops.aten.bmm.default else args[0].add_(total)
        return func(*args, **(kwargs or {}))
