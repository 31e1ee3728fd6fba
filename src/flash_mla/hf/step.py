"""A decode step of one layer in five launches and little of the host's time: what the step before found out is kept.

The product with W_UK writes into the query, `append` puts the rotated columns beside it and the new latents into their
page, then the kernel and its merge, then the product with W_UV. Shapes, strides, backends and the views of the weights
are the same from step to step, so they are looked at once, and the compiled kernels' launches are written down. On a
host that needs 20 µs for a launch, a layer of DeepSeek-V2-Lite waits for the host and not for the GPU until batches are
large. What can wait is done behind decode, while the device attends.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .. import debug, ops
from ..cache import Latents, PagedLatentLayer
from ..cache.state import PagedState

if TYPE_CHECKING:
    from ..backends.cuda.step import Results, StepLaunches

__all__ = ["Step", "prepare", "run"]


# Of one state: a batch size or two, on a stream or two.
MOST_BUFFERS = 4
# Shape, strides and offset of a view of the weight.
Place = tuple[tuple[int, ...], tuple[int, ...], int]


@dataclass
class Step:
    """What is the same in the next decode step of a layer, and by what one knows that it is.

    Attributes:
        linear: `kv_b_proj`, not kept alive: the cache may outlive the model.
        weight: shape and dtype of its weight, which is contiguous.
        kv_cache: the pool.
        signature: shapes, strides and dtypes of what comes anew with every step.
        checked: both calls with their backends.
        w_uk: shape, strides and offset of W_UK `[num_heads, qk_nope_head_dim, kv_lora_rank]` in the weight.
        w_uv: the same of W_UV `[num_heads, kv_lora_rank, v_head_dim]`.
        buffer: takes the query.
        launches: the compiled kernels' launches, once a step ran; None where the backends have none.
        launches_for: number of slots and multiplier of the scores that `launches` was looked for with.
    """

    linear: weakref.ref[nn.Linear]
    weight: tuple[torch.Size, torch.dtype]
    kv_cache: torch.Tensor
    signature: tuple[Any, ...]
    checked: ops.CheckedStep
    w_uk: Place
    w_uv: Place
    buffer: Query
    launches: StepLaunches | None = None
    launches_for: tuple[int, float] | None = None

    def fits(self, module: Any, layer: PagedLatentLayer, query: torch.Tensor, new: Latents) -> bool:
        """Whether this is still how the layer's step goes: nothing was hooked, adapted, grown or given anew."""
        linear = self.linear()
        if linear is None or module.kv_b_proj is not linear or type(linear) is not nn.Linear or debug.is_on():
            return False
        weight = linear._parameters.get("weight")  # pruning and weight norms take it out
        return (
            not linear._forward_hooks
            and not linear._forward_pre_hooks
            and "forward" not in linear.__dict__
            and type(weight) is nn.Parameter
            and (weight.shape, weight.dtype) == self.weight
            and weight.is_contiguous()
            and linear._parameters.get("bias") is None
            and layer.kv_cache is self.kv_cache
            and _signature(query, new) == self.signature
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """A copied cache finds it out anew."""
        return

    def __reduce__(self) -> tuple[Any, ...]:
        return _nothing, ()


def _nothing() -> None:
    return None


@dataclass
class Query:
    """The absorbed query of every layer in turn, `[batch, seqlen_q, num_heads, d_qk]`: a stream runs one after another.

    `latent` is its part for the product with W_UK, `[num_heads, batch * seqlen_q, kv_lora_rank]`; `results` takes what
    the launches of every layer compute, where they are written down.
    """

    q: torch.Tensor
    latent: torch.Tensor
    results: Results | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """Nothing in it outlasts a layer's step."""
        return

    def __reduce__(self) -> tuple[Any, ...]:
        return _nothing, ()


def _signature(query: torch.Tensor, new: Latents) -> tuple[Any, ...]:
    state = new.layer.state
    assert state is not None
    latent, table = new.latent, state.block_table
    return (
        *_place_in_time(query),
        new.layer.group.backend,
        query.shape,
        query.stride(),
        query.dtype,
        latent.shape,
        latent.stride(),
        latent.dtype,
        new.k_rope.stride(),
        new.k_rope.dtype,
        state.slots.stride(),
        table.shape,
        table.stride(),
        state.cache_seqlens.stride(),
    )


def _place_in_time(query: torch.Tensor) -> tuple[int, bool]:
    """The stream, and whether it is being captured: a graph must own what it writes to."""
    if not query.is_cuda:
        return 0, False
    return torch._C._cuda_getCurrentRawStream(query.get_device()), torch.cuda.is_current_stream_capturing()


def _buffer(state: PagedState, query: torch.Tensor, kv_lora_rank: int, d_qk: int) -> Query:
    batch, num_heads, seqlen_q, _ = query.shape
    stream, is_capturing = _place_in_time(query)
    key = (batch, seqlen_q, num_heads, kv_lora_rank, d_qk, query.dtype, stream)
    found = state.buffers.get(key)
    if isinstance(found, Query) and not is_capturing:
        return found
    with torch.inference_mode(False):  # written in place later, in whatever mode
        q = torch.empty((batch, seqlen_q, num_heads, d_qk), dtype=query.dtype, device=query.device)
    rows = q.view(batch * seqlen_q, num_heads, d_qk)[..., :kv_lora_rank]
    made = Query(q, rows.transpose(0, 1))
    if not is_capturing:
        if len(state.buffers) >= MOST_BUFFERS:
            state.buffers.clear()
        state.buffers[key] = made
    return made


def prepare(
    module: Any,
    query: torch.Tensor,
    new: Latents,
    weights: tuple[torch.Tensor, torch.Tensor],
) -> Step | None:
    """What the next steps of this layer need, or None where the weight is not a plain one that can be looked through.

    Args:
        module: the attention module.
        query: `[batch, num_heads, 1, head_dim]`.
        new: its latents.
        weights: W_UK and W_UV, views of `module.kv_b_proj.weight`.
    """
    layer, state = new.layer, new.layer.state
    assert state is not None and layer.kv_cache is not None
    if debug.is_on():
        return None  # values are looked at where calls are checked, in every step
    linear, kv_cache, (w_uk, w_uv) = module.kv_b_proj, layer.kv_cache, weights
    weight = linear._parameters.get("weight") if type(linear) is nn.Linear else None
    if type(weight) is not nn.Parameter or not weight.is_contiguous() or w_uk.data_ptr() != weight.data_ptr():
        return None
    if not query.dtype == weight.dtype == layer.dtype == new.latent.dtype == new.k_rope.dtype:
        return None
    signature = _signature(query, new)
    buffer = _buffer(state, query, layer.kv_lora_rank, layer.d_qk)
    checked = ops.check_step(
        buffer.q,
        query[..., module.qk_nope_head_dim :].transpose(1, 2),
        kv_cache,
        new.latent.transpose(1, 2),
        new.k_rope.transpose(1, 2),
        state.slots,
        state.block_table,
        state.cache_seqlens,
        kv_lora_rank=layer.kv_lora_rank,
        causal=False,  # one token sees everything
        backend=layer.group.backend,
    )
    begin = int(weight.storage_offset())

    def place(view: torch.Tensor) -> Place:
        return tuple(view.shape), view.stride(), int(view.storage_offset()) - begin

    form = (weight.shape, weight.dtype)
    return Step(weakref.ref(linear), form, kv_cache, signature, checked, place(w_uk), place(w_uv.mT), buffer)


def run(step: Step, query: torch.Tensor, new: Latents, plan: ops.SplitPlan | None, scaling: float) -> torch.Tensor:
    """Store the new tokens and attend; `[batch, 1, num_heads, v_head_dim]`, contiguous.

    The caller sees to it that no gradient is wanted.
    """
    linear = step.linear()
    assert linear is not None
    weight = linear._parameters["weight"]  # as `fits` saw it
    assert weight is not None
    (num_heads, nope, rank), strides, _ = step.w_uk
    w_uk = weight.as_strided((num_heads, nope, rank), strides, weight.storage_offset())
    batch, of_row, of_head, of_column = query.shape[0], query.stride(0), query.stride(1), query.stride(3)
    # A view: cuBLAS walks the heads of a transposed query.
    rows = query.as_strided((num_heads, batch, nope), (of_head, of_row, of_column), query.storage_offset())
    torch.bmm(rows, w_uk, out=step.buffer.latent)
    out = _attend(step, query, new, plan, scaling)
    # The device attends now: the host's time from here on is hidden.
    shape, strides, offset = step.w_uv
    w_uv = weight.as_strided(shape, strides, weight.storage_offset() + offset)
    result = query.new_empty((batch, num_heads, shape[2]))
    torch.bmm(out.view(batch, num_heads, rank).transpose(0, 1), w_uv, out=result.transpose(0, 1))
    new.layer.stored()
    step.checked.count()
    return result.unsqueeze(1)


def _attend(step: Step, query: torch.Tensor, new: Latents, plan: ops.SplitPlan | None, scaling: float) -> torch.Tensor:
    """Append and decode; `[batch, 1, num_heads, kv_lora_rank]`, which the next layer may overwrite."""
    state, q, nope = new.layer.state, step.buffer.q, step.w_uk[0][1]
    assert state is not None
    if plan is not None:
        if step.launches_for != (plan.num_slots, scaling):
            step.launches_for = step.launches = None  # should the next line raise
            step.launches = _launches(step, query, new, plan, scaling)
            step.launches_for = (plan.num_slots, scaling)
        launches = step.launches
        if launches is not None:
            q_rope = query.data_ptr() + nope * query.element_size() * query.stride(3)
            tensors = (plan.items, plan.splits, state.block_table, state.cache_seqlens)
            if launches.run(new.latent, new.k_rope, state.slots, q_rope, *tensors):
                return launches.results.out
    step.checked.append(
        step.kv_cache,
        new.latent.transpose(1, 2),
        new.k_rope.transpose(1, 2),
        state.slots,
        q,
        query[..., nope:].transpose(1, 2),
    )
    return step.checked.decode(q, step.kv_cache, state.block_table, state.cache_seqlens, plan, scaling)


def _launches(
    step: Step, query: torch.Tensor, new: Latents, plan: ops.SplitPlan, scaling: float
) -> StepLaunches | None:
    state = new.layer.state
    assert state is not None
    if step.signature[1]:  # in a capture every layer would have results of its own: a graph owns what it writes to
        return None
    launches = step.checked.ready(
        step.kv_cache,
        new.latent.transpose(1, 2),
        new.k_rope.transpose(1, 2),
        state.slots,
        step.buffer.q,
        query[..., step.w_uk[0][1] :].transpose(1, 2),
        state.cache_seqlens,
        plan,
        scaling,
        step.buffer.results,
    )
    if launches is not None:
        step.buffer.results = launches.results
    return launches
