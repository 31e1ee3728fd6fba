"""The state of a cache of fixed capacity: every row owns its pages from the start, everything stays where it is.

For compiled decoding: all that a step changes lives in tensors at stable addresses, changed in place, and no Python
number differs from step to step. So one graph serves every step and may be replayed.
"""

from __future__ import annotations

import torch

from .. import ops
from .pages import pages_for
from .state import PagedState

__all__ = ["FixedState"]


class FixedState(PagedState):
    """Pages by reservation.

    Args:
        batch: rows.
        block_size: tokens per page.
        device: where the tensors live.
        max_cache_len: positions (padding included) that a row can hold. What is given beyond is not stored: eagerly
            `check_room` refuses it, a compiled step sends it to page 0 and `validate` raises afterwards.
    """

    layers_move_rows = True

    max_cache_len: int
    history: torch.Tensor
    seen: torch.Tensor

    def __init__(self, batch: int, block_size: int, device: torch.device, max_cache_len: int) -> None:
        super().__init__(batch, block_size, device)
        self.max_cache_len = max_cache_len
        if torch.compiler.is_compiling():
            self._reserve()
            return
        # Changed in place later, so they may not be inference tensors, whatever mode the first forward runs in.
        with torch.inference_mode(False):
            self._reserve()
        stable = (self.block_table, self.cache_seqlens, self.seen, self.history, self.overflowed, self.slots)
        for tensor in stable:
            torch._dynamo.mark_static_address(tensor)

    def _reserve(self) -> None:
        batch, block_size, device, max_cache_len = self.batch, self.block_size, self.device, self.max_cache_len
        per_row = pages_for(max_cache_len, block_size)
        self._num_blocks = 1 + batch * per_row
        self.block_table = torch.arange(1, self._num_blocks, dtype=torch.int32, device=device).view(batch, per_row)
        self.cache_seqlens = torch.zeros(batch, dtype=torch.int32, device=device)
        self.seen = torch.zeros((), dtype=torch.int64, device=device)
        # One column more than positions: what lies past the capacity is noted there and never read.
        self.history = torch.zeros((batch, max_cache_len + 1), dtype=torch.bool, device=device)
        self.overflowed = torch.zeros((), dtype=torch.bool, device=device)
        self.decode_slots = torch.zeros((batch, 1), dtype=torch.int64, device=device)
        self.slots = self.decode_slots
        # The padded length as the host knows it; None after a compiled step, which may not touch Python numbers.
        self.seen_on_host: int | None = 0

    @property
    def num_blocks(self) -> int:
        """Pages that a layer's pool must have, page 0 included."""
        return self._num_blocks

    def part_prompts(self) -> None:
        """Nothing to do: each row owns its pages."""

    def seen_int(self) -> int:
        """The padded length as a number; waits for the device if compiled steps moved it."""
        if self.seen_on_host is None:
            self.seen_on_host = int(self.seen)
        return self.seen_on_host

    def start(self, batch: int) -> None:
        """Refused: raises ValueError."""
        raise ValueError(
            f"flash_mla.PagedLatentCache: a fixed-capacity cache keeps its batch of {self.batch}, got {batch} rows"
        )

    def _advance(self, seqlen_q: int, valid: torch.Tensor | None) -> None:
        if torch.compiler.is_compiling():
            self.seen_on_host = None
        else:
            self.seen_on_host = self.seen_int() + seqlen_q
        self.context_len = None
        # The lengths change in place. One token on a context needs no copy of them: it sees itself too.
        is_chunk = seqlen_q > 1 and not torch.compiler.is_compiling()
        self.context_seqlens = self.cache_seqlens.clone() if is_chunk else None
        steps = torch.arange(seqlen_q, device=self.device)
        # Past the capacity a token goes to page 0 like padding: a live page is never overwritten.
        slots, lengths = ops.next_slots(
            self.block_table,
            self.cache_seqlens,
            seqlen_q,
            self.block_size,
            valid,
            self.max_cache_len,
            backend=self.backend,
        )
        self.history[:, (self.seen + steps).clamp(max=self.max_cache_len)] = slots >= self.block_size
        self.cache_seqlens.copy_(lengths)
        self.seen.add_(seqlen_q)
        self.overflowed.logical_or_(self.seen > self.max_cache_len)
        if seqlen_q == 1:
            self.decode_slots.copy_(slots)
            slots = self.decode_slots
        self.slots = slots

    def _stored(self) -> torch.Tensor:
        return self.history[:, : self.max_cache_len]

    def _crop(self, kept: int, num_positions: int) -> None:
        self.cache_seqlens.sub_(self.history[:, kept : kept + num_positions].sum(1, dtype=torch.int32))
        self.history[:, kept:] = False
        self.seen.fill_(kept)
        self.seen_on_host = kept

    def select(self, indices: torch.Tensor) -> None:
        """Row i becomes what row `indices[i]` was: lengths and history here, the rows themselves by each layer."""
        if len(indices) != self.batch:
            self.start(len(indices))
        self.plan = self._slot_map = None
        indices = indices.to(self.device)
        self.cache_seqlens.copy_(self.cache_seqlens[indices])
        self.history.copy_(self.history[indices])

    def _reset(self) -> None:
        for tensor in (self.cache_seqlens, self.seen, self.history, self.overflowed):
            tensor.zero_()
        self.seen_on_host = 0

    def pages_in_use(self) -> int:
        """Pages that hold at least one token."""
        return sum(pages_for(length, self.block_size) for length in self.cache_seqlens.tolist())

    def _check_lengths(self, lengths: list[int]) -> None:
        if bool(self.overflowed):
            raise ValueError(
                f"flash_mla.PagedLatentCache: {int(self.seen)} positions were given to a fixed capacity of "
                f"max_cache_len={self.max_cache_len}; what came past it was not stored, results after that are wrong"
            )
