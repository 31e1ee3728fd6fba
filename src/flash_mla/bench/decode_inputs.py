"""The tensors of a measured decode call: random rows in page sets that together do not fit into L2."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..codec import encode_rows
from .decode_shapes import DecodeShape

__all__ = ["Inputs", "make_inputs"]

# Bytes that a turn over the rotating page sets reads at least: four times the L2 of an H200 (60 MB).
ROTATION_BYTES = 240 * 10**6
# FP8 rows encoded at once: their latents in fp32 and what encoding holds beside them stay below 1 GiB.
ENCODED_ROWS = 2**16


@dataclass(frozen=True)
class Inputs:
    """A shape's tensors: several page sets in one pool, each with queries of its own.

    Attributes:
        q: `[batch, seqlen_q, num_heads, d_qk]` per set.
        kv_cache: `[num_blocks, block_size, 1, d_qk]`, or uint8 `[num_blocks, block_size, 1, row_bytes]`.
        block_table: int32 `[batch, max_blocks]` per set; sparse sets have none.
        cache_seqlens: int32 `[batch]`.
        indices: int32 `[batch, seqlen_q, topk]` per set; only sparse sets have them.
    """

    q: list[torch.Tensor]
    kv_cache: torch.Tensor
    block_table: list[torch.Tensor]
    cache_seqlens: torch.Tensor
    indices: list[torch.Tensor]


def make_inputs(shape: DecodeShape, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Inputs:
    """Random queries and pages of a shape, in as many page sets as it takes to be out of L2 each time."""
    generator = torch.Generator(device=device).manual_seed(seed)
    lengths = shape.lengths()
    pages = [-(-length // shape.block_size) for length in lengths]
    row_bytes = shape.row_bytes(dtype.itemsize)
    if shape.topk is None:
        draws = 1  # page sets that share pages
        num_sets = _sets_out_of_l2(sum(pages) * shape.block_size * row_bytes)
    else:
        # Sets on the same pages name other rows of them: a pool of its own for each would be many times as large.
        draws = max(1, shape.seqlen_k // (shape.seqlen_q * shape.topk))
        num_sets = _sets_out_of_l2(shape.batch * shape.seqlen_q * shape.topk * row_bytes)
    num_tables = -(-num_sets // draws)
    num_blocks = num_tables * sum(pages)
    kv_cache = _random_pool(shape, num_blocks, dtype, generator)
    order = torch.randperm(num_blocks, generator=generator, device=device).to(torch.int32)
    begins = [0]
    for count in pages:
        begins.append(begins[-1] + count)
    tables, queries = [], []
    for index in range(num_tables):
        own = order[index * sum(pages) : (index + 1) * sum(pages)]
        table = torch.zeros((shape.batch, max(pages)), dtype=torch.int32, device=device)
        for request, count in enumerate(pages):
            table[request, :count] = own[begins[request] : begins[request] + count]
        tables.append(table)
    for _ in range(num_sets):
        q = torch.empty((shape.batch, shape.seqlen_q, shape.num_heads, shape.d_qk), dtype=dtype, device=device)
        queries.append(q.normal_(generator=generator))
    seqlens = torch.tensor(lengths, dtype=torch.int32, device=device)
    if shape.topk is None:
        return Inputs(queries, kv_cache, tables, seqlens, [])
    indices = [named for table in tables for named in _named_rows(shape, shape.topk, table, draws, generator)]
    return Inputs(queries, kv_cache, [], seqlens, indices[:num_sets])


def _sets_out_of_l2(set_bytes: int) -> int:
    return max(2, -(-ROTATION_BYTES // set_bytes))


def _random_pool(shape: DecodeShape, num_blocks: int, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """Normal rows; FP8 ones encode latents and rotated keys that are."""
    device = generator.device
    if not shape.fp8:
        pool = torch.empty((num_blocks, shape.block_size, 1, shape.d_qk), dtype=dtype, device=device)
        return pool.normal_(generator=generator)
    pool = torch.empty((num_blocks, shape.block_size, 1, shape.row_bytes()), dtype=torch.uint8, device=device)
    for chunk in pool.flatten(0, 2).split(ENCODED_ROWS):
        new = torch.randn((len(chunk), shape.d_qk), generator=generator, device=device)
        chunk.copy_(encode_rows(*new.split((shape.kv_lora_rank, shape.qk_rope_head_dim), dim=-1)))
    return pool


def _named_rows(
    shape: DecodeShape, topk: int, table: torch.Tensor, draws: int, generator: torch.Generator
) -> list[torch.Tensor]:
    """`draws` times int32 `[batch, seqlen_q, topk]`: rows of each request at random, none in two draws.

    The queries of a request share no row either where seqlen_k is long enough for that, so that what is read is what
    `work_of` counts.
    """
    device = table.device
    order = torch.rand((shape.batch, shape.seqlen_k), generator=generator, device=device).argsort(dim=1)
    blocks = table.gather(1, order // shape.block_size)
    rows = (blocks * shape.block_size + order % shape.block_size).to(torch.int32)
    width = shape.seqlen_k // draws
    place = torch.arange(shape.seqlen_q * topk, device=device).view(shape.seqlen_q, topk) % width
    return [rows[:, draw * width + place].contiguous() for draw in range(draws)]
