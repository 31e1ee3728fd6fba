"""A decode step's append, decode and merge, made ready once: from step to step of a layer addresses alone change."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...contract import AppendCall, DecodeCall
from . import driver
from .append import ADDRESSES, MAX_UNIT, launch_form
from .decode import prepared_for
from .params import COMBINE_ADDRESSES, DECODE_ADDRESSES, TENSOR_MAP_BYTES

__all__ = ["Results", "StepLaunches", "ready_step"]


@dataclass(frozen=True)
class Results:
    """What the layers' decodes write into, one after the other on a stream.

    Attributes:
        out: `[batch, seqlen_q, num_heads, kv_lora_rank]`.
        lse: fp32 `[batch, num_heads, seqlen_q]`.
        workspace: uint8, of partial results; at least one byte.
    """

    out: torch.Tensor
    lse: torch.Tensor
    workspace: torch.Tensor


@dataclass(frozen=True)
class StepLaunches:
    """Launches on one stream, for tensors of the same shapes, strides and dtypes, on one pool and into one query.

    Attributes:
        results: what `run` leaves its results in.
        append, decode, merge: in this order; no merge where nothing can be cut.
        pool, columns: addresses of the pool, and of the rotated columns of the query that decode reads.
        pointers: addresses of out, lse, partial results and their log-sums.
    """

    device_index: int
    results: Results
    append: driver.Launch
    decode: driver.Launch
    merge: driver.Launch | None
    pool: int
    columns: int
    pointers: tuple[int, int, int, int]

    def run(
        self,
        latent: torch.Tensor,
        k_rope: torch.Tensor,
        slots: torch.Tensor,
        q_rope: int,
        items: torch.Tensor,
        splits: torch.Tensor,
        block_table: torch.Tensor,
        cache_seqlens: torch.Tensor,
    ) -> bool:
        """Store, attend, merge. False, and nothing done, where these tensors need the general way.

        Args: as of `append` and `decode`; of `q_rope` the address.
        """
        source, rope = latent.data_ptr(), k_rope.data_ptr()
        if (source | rope | q_rope) % MAX_UNIT:
            return False
        append, decode, merge = self.append, self.decode, self.merge
        ADDRESSES.pack_into(append.params, 0, self.pool, source, rope, slots.data_ptr(), q_rope, self.columns)
        of_items, of_splits = items.data_ptr(), splits.data_ptr()
        addresses = (*self.pointers, of_items, of_splits, block_table.data_ptr(), cache_seqlens.data_ptr())
        DECODE_ADDRESSES.pack_into(decode.params, 2 * TENSOR_MAP_BYTES, *addresses)
        launches = [append, decode]
        if merge is not None:
            COMBINE_ADDRESSES.pack_into(merge.params, 0, *self.pointers, of_items, of_splits)
            launches.append(merge)
        driver.launch_all(self.device_index, launches)
        return True


def ready_step(
    append_call: AppendCall,
    decode_call: DecodeCall,
    kv_cache: torch.Tensor,
    latent: torch.Tensor,
    k_rope: torch.Tensor,
    slots: torch.Tensor,
    q: torch.Tensor,
    q_rope: torch.Tensor,
    cache_seqlens: torch.Tensor,
    num_slots: int,
    softmax_scale: float,
    results: Results | None,
) -> StepLaunches | None:
    """Launches of a step on the current stream, or None where the general way has more to do than to launch.

    Args: as of `append` and `decode`; `num_slots` of the plans to come, and `results` of a step before, to be used
        again if they are large enough.
    """
    device_index = decode_call.device_index
    form = launch_form(append_call, kv_cache, latent, k_rope, slots, q, q_rope)
    prepared = prepared_for(decode_call, q, kv_cache, cache_seqlens, num_slots, softmax_scale)
    if form is None or prepared is None or len(prepared.pieces) != 1 or prepared.pieces[0].items_offset:
        return None
    if results is None or results.workspace.numel() < prepared.workspace_bytes:
        results = _results(decode_call, q, prepared.workspace_bytes)
    (piece,), stream = prepared.pieces, driver.raw_stream(device_index)
    of_decode, shared = prepared.form, prepared.form.shared_bytes
    kernel = driver.function(device_index, of_decode.file, of_decode.name, shared)
    decode = driver.Launch(kernel, piece.grid, of_decode.threads, shared, stream, piece.decode, programmatic=True)
    merge = None
    if piece.merge is not None:
        kernel = driver.function(device_index, "combine", piece.merge)
        shape = (piece.merge_grid, piece.merge_threads)
        merge = driver.Launch(kernel, *shape, 0, stream, piece.combine, programmatic=True)
    name, grid, threads, params = form
    append = driver.Launch(driver.function(device_index, "append", name), grid, threads, 0, stream, params)
    partial = (results.workspace.data_ptr(), results.workspace.data_ptr() + prepared.sums_offset)
    return StepLaunches(
        device_index=device_index,
        results=results,
        append=append,
        decode=decode,
        merge=merge,
        pool=kv_cache.data_ptr(),
        columns=q.data_ptr() + decode_call.kv_lora_rank * q.element_size(),
        pointers=(
            results.out.data_ptr(),
            results.lse.data_ptr(),
            *(partial if prepared.workspace_bytes else (0, 0)),
        ),
    )


def _results(call: DecodeCall, q: torch.Tensor, workspace_bytes: int) -> Results:
    with torch.inference_mode(False):  # used again in whatever mode
        return Results(
            torch.empty((*q.shape[:3], call.kv_lora_rank), dtype=q.dtype, device=q.device),
            torch.empty((call.batch, call.num_heads, call.seqlen_q), dtype=torch.float32, device=q.device),
            torch.empty(max(1, workspace_bytes), dtype=torch.uint8, device=q.device),
        )
