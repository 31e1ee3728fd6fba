"""What the paged layers of one device share: block table, lengths, and where the tokens of this forward go.

The first paged layer of a forward (the leader) advances the state; the others reuse its slots, lengths and split plan.
`growing.py` deals pages out on the host; `fixed.py` reserves them once, at addresses that never change.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch

from ..ops import SplitPlan

__all__ = ["PagedState"]


class PagedState(ABC):
    """Lengths and pages of one batch on one device.

    Attributes:
        block_table: int32 `[batch, max_blocks]`.
        cache_seqlens: int32 `[batch]`, real tokens, new ones of this forward included.
        slots: int64 `[batch, seqlen_q]` of this forward: block * block_size + offset; padding goes to page 0.
        seen: padded length; an int, or with fixed capacity an int64 tensor without dimensions.
        history: bool `[batch, positions]`, which positions are stored (padding is not); None while all are.
        copies: pages (source, destination), int64 each, that every layer must copy before it writes; None: none.
        plan: the split plan of this forward, made by the first layer that decodes; or by one of an earlier forward, if
            made anew it would be the same.
        context_len: of a forward of several tokens: what every row held before it, if the host knows them to be as many
            in each; None: it does not, or they differ.
        context_seqlens: int32 `[batch]`, the same by row, on the device; None while compiling.
        has_context: whether anything was stored since the last reset.
        had_context: the same, before the forward under way.
        padding_unknown: positions were stored under an attention ("eager", "sdpa") whose mask the cache never saw, so
            some of them may be padding: only the caller's mask over the whole context tells.
    """

    # Positions that fit, or None; and whether each layer has to move its rows when the batch is reordered.
    max_cache_len: int | None = None
    layers_move_rows = False
    # As in PagedLatentCache: obeyed or refused.
    backend: str | None = None
    # Rows that share one prompt and its pages; see GrowingState.
    prompt_repeats = 1

    block_table: torch.Tensor
    cache_seqlens: torch.Tensor
    slots: torch.Tensor
    seen: int | torch.Tensor

    def __init__(self, batch: int, block_size: int, device: torch.device) -> None:
        self.batch = batch
        self.block_size = block_size
        self.device = device
        self.history: torch.Tensor | None = None
        self.copies: tuple[torch.Tensor, torch.Tensor] | None = None
        self.plan: SplitPlan | None = None
        self._slot_map: torch.Tensor | None = None
        # Of a decode step of sparse attention: what one layer found out for the others (hf/sparse.py).
        self.visible_slots: tuple[Any, torch.Tensor] | None = None
        self.chosen_slots: tuple[Any, Any, torch.Tensor] | None = None
        # What the layers' steps write into one after the other (hf/step.py), by shape and stream.
        self.buffers: dict[Any, Any] = {}
        self.context_len: int | None = 0
        self.context_seqlens: torch.Tensor | None = None
        self.has_context = False
        self.had_context = False
        self.padding_unknown = False
        # Layers of this state, the last one's number, how many of them the forward under way has reached, and forwards
        # since the last reset.
        self.num_layers = 0
        self.last_index = 0
        self.num_written = 0
        self.num_forwards = 0

    @property
    @abstractmethod
    def num_blocks(self) -> int:
        """Pages that a layer's pool must have, page 0 included."""

    @abstractmethod
    def seen_int(self) -> int:
        """The padded length as a number; waits for the device if compiled steps moved it."""

    @abstractmethod
    def start(self, batch: int) -> None:
        """Take up an empty state for a batch of another size; raises ValueError if the capacity is fixed."""

    def check_room(self, seqlen_q: int) -> None:
        """Raise ValueError if `seqlen_q` more positions do not fit; nothing is changed."""
        if self.max_cache_len is not None and self.seen_int() + seqlen_q > self.max_cache_len:
            raise ValueError(
                f"flash_mla.PagedLatentCache: max_cache_len={self.max_cache_len} positions are the capacity, "
                f"{self.seen_int()} are filled and {seqlen_q} more were given"
            )

    def advance(self, seqlen_q: int, valid: torch.Tensor | None) -> None:
        """Give each new token its slot and count it; called once per forward, by the leader.

        Args:
            seqlen_q: new positions per row.
            valid: bool `[batch, seqlen_q]`, False where a position is padding; None if all are real.
        """
        if torch.compiler.is_compiling() or not self._keeps_plan(seqlen_q):
            self.plan = None
        self._slot_map = self.visible_slots = self.chosen_slots = None
        if not torch.compiler.is_compiling():
            self.check_complete()
            self.num_written = 0
            self.num_forwards += 1
        self._advance(seqlen_q, valid)
        self.had_context = self.has_context
        self.has_context = True

    @abstractmethod
    def _advance(self, seqlen_q: int, valid: torch.Tensor | None) -> None: ...

    def _keeps_plan(self, seqlen_q: int) -> bool:
        """Whether the plan of the forward before, made anew for this one, would be the same; asked once per forward."""
        return False

    def _plan_outlasts(self, change: int) -> bool:
        """Whether the plan stays the same if each row's length changes by so many tokens, or fewer."""
        return False

    def check_complete(self) -> None:
        """Raise ValueError if the last forward stopped (out of memory, interrupt) before it reached every layer."""
        if self.num_forwards and self.num_written < self.num_layers:
            raise ValueError(
                f"flash_mla.PagedLatentCache: the last forward stopped after {self.num_written} of {self.num_layers} "
                "layers, so its tokens are stored in some layers only: reset() the cache or use a new one"
            )

    @abstractmethod
    def part_prompts(self) -> None:
        """End the phase in which rows share the pages of one prompt."""

    def slots_of(self, rank: torch.Tensor) -> torch.Tensor:
        """Slots int64 `[batch, n]` of the tokens number `rank` (int64 `[batch, n]`, counted from 0) of each row.

        A number outside the row gives some slot of the row: the caller puts page 0 in its place.
        """
        rank = rank.clamp(min=0)
        block = (rank // self.block_size).clamp(max=self.block_table.shape[1] - 1)
        return self.block_table.gather(1, block).long() * self.block_size + rank % self.block_size

    def _stored(self) -> torch.Tensor | None:
        """Bool `[batch, positions]`, which positions a gather returns and hold something; None: all of them do."""
        return self.history

    def positions(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Slot of every position, in padded order, for gathering.

        Returns: slots int64 `[batch, positions]` (0 where nothing is stored) and bool `[batch, positions]` or None if
        every position is stored. With fixed capacity all `max_cache_len` positions are returned.
        """
        stored = self._stored()
        if stored is None:
            rank = torch.arange(self.seen_int(), device=self.device).expand(self.batch, -1)
            return (self.slots_of(rank) if rank.shape[1] else rank), None
        return torch.where(stored, self.slots_of(stored.cumsum(1) - 1), 0), stored

    def slot_map(self) -> torch.Tensor:
        """Slot of every position in padded order, int32 `[batch, positions]`, -1 where nothing is stored.

        Made once per forward (per layer in a graph, whose compiler makes it once).
        """
        if self._slot_map is None or torch.compiler.is_compiling():
            slots, stored = self.positions()
            made = (slots if stored is None else torch.where(stored, slots, -1)).int()
            if torch.compiler.is_compiling():
                return made
            self._slot_map = made
        return self._slot_map

    def check_crop(self, tokens_to_remove: int) -> None:
        """Raise ValueError unless `tokens_to_remove` is zero or negative and that many positions are there."""
        if tokens_to_remove > 0 or -tokens_to_remove > self.seen_int():
            raise ValueError(
                "flash_mla.PagedLatentCache.crop: needs minus the number of positions to remove, at most the "
                f"{self.seen_int()} that are there, got {tokens_to_remove}"
            )

    def crop(self, num_positions: int) -> None:
        """Forget the last `num_positions` positions (padded count) of every row; the caller checked that they exist."""
        if num_positions == 0:
            return
        if not self._plan_outlasts(-num_positions):
            self.plan = None
        self._slot_map = None
        kept = self.seen_int() - num_positions
        self._crop(kept, num_positions)
        self.has_context = kept > 0

    @abstractmethod
    def _crop(self, kept: int, num_positions: int) -> None: ...

    @abstractmethod
    def select(self, indices: torch.Tensor) -> None:
        """Row i becomes what row `indices[i]` was (beams, subsets, repeats)."""

    def reset(self) -> None:
        """Forget every token."""
        self.plan = self._slot_map = None
        self.has_context = False
        self.padding_unknown = False
        self.num_written = self.num_forwards = 0
        self._reset()

    @abstractmethod
    def _reset(self) -> None: ...

    @abstractmethod
    def pages_in_use(self) -> int:
        """Pages that hold tokens; shared ones count once. Waits for the device."""

    def validate(self) -> None:
        """Raise ValueError if what is on the device cannot be right. Waits for the device."""
        self.check_complete()
        lengths = self.cache_seqlens.tolist()
        self._check_lengths(lengths)
        table = self.block_table
        used = torch.arange(table.shape[1], device=self.device) * self.block_size < self.cache_seqlens[:, None]
        wrong = used & ((table < 1) | (table >= self.num_blocks))
        if bool(wrong.any()):
            row, index = wrong.nonzero()[0].tolist()
            raise ValueError(
                f"flash_mla.PagedLatentCache: block_table[{row}, {index}] = {int(table[row, index])} is not a page of "
                f"the pool (1..{self.num_blocks - 1})"
            )
        if self.history is not None:
            stored = self.history[:, : self.seen_int()].sum(1).tolist()
            if stored != lengths:
                raise ValueError(f"flash_mla.PagedLatentCache: lengths {lengths} differ from the history's {stored}")

    @abstractmethod
    def _check_lengths(self, lengths: list[int]) -> None: ...
