"""The state of a cache that grows: pages are dealt out on the host, one forward at a time, and shared until written."""

from __future__ import annotations

import torch

from .. import ops
from ..contract import PLAN_BLOCK
from .pages import PageTable
from .state import PagedState

__all__ = ["GrowingState"]


def _to_device(values: list[int] | list[list[int]], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A small host list as a device tensor; from pinned memory on CUDA, so that the host does not wait."""
    host = torch.tensor(values, dtype=dtype)
    if device.type == "cuda":
        return host.pin_memory().to(device, non_blocking=True)
    return host.to(device)


class GrowingState(PagedState):
    """Pages by need.

    Args:
        batch: rows.
        block_size: tokens per page.
        device: where the tensors live.
        prompt_repeats: rows come in groups of this many with the same prompt (beams, `num_return_sequences`); a group
            shares its pages until its first single-token step, or until its rows are given different tokens.
    """

    seen: int
    _was_capturing = False  # in the forward before

    def __init__(self, batch: int, block_size: int, device: torch.device, prompt_repeats: int = 1) -> None:
        super().__init__(batch, block_size, device)
        self._empty(batch, prompt_repeats, num_blocks=1)

    def _empty(self, batch: int, prompt_repeats: int, num_blocks: int) -> None:
        self.batch = batch
        self.prompt_repeats = prompt_repeats
        self.pages = PageTable(self.block_size, batch // prompt_repeats, num_blocks)
        self.block_table = torch.zeros((batch, 1), dtype=torch.int32, device=self.device)
        self.cache_seqlens = torch.zeros(batch, dtype=torch.int32, device=self.device)
        self.slots = torch.zeros((batch, 0), dtype=torch.int64, device=self.device)
        self.history = None
        self.seen = 0
        self._uploaded: tuple[int, int] | None = None  # version and rows of what block_table was made from

    @property
    def num_blocks(self) -> int:
        """Pages that a layer's pool must have, page 0 included."""
        return self.pages.num_blocks

    def seen_int(self) -> int:
        """The padded length."""
        return self.seen

    def start(self, batch: int) -> None:
        """Take up an empty state for a batch of another size; the pools keep theirs."""
        self._empty(batch, 1, self.pages.num_blocks)

    def _keeps_plan(self, seqlen_q: int) -> bool:
        """One step in 64 of equal rows plans anew: in the others there is a launch less, and the host's time for it.

        Not in or after a capture: a graph owns the plan that it uses, and what it made it leaves unwritten.
        """
        was_capturing, self._was_capturing = self._was_capturing, self._is_capturing()
        return not (was_capturing or self._was_capturing) and self._plan_outlasts(seqlen_q)

    def _is_capturing(self) -> bool:
        return self.device.type == "cuda" and torch.cuda.is_current_stream_capturing()

    def _plan_outlasts(self, change: int) -> bool:
        """A plan follows from the numbers of units (PLAN_BLOCK tokens) of the rows, in order, and from nothing else."""
        if self.plan is None:
            return False
        fewer, more = min(change, 0), max(change, 0)
        bounds = set(zip(self.pages.at_least, self.pages.at_most, strict=True))  # asked once per step
        return all((least + fewer - 1) // PLAN_BLOCK == (most + more - 1) // PLAN_BLOCK for least, most in bounds)

    def _advance(self, seqlen_q: int, valid: torch.Tensor | None) -> None:
        if seqlen_q == 1:
            self.part_prompts()
        rows = len(self.pages.rows)
        self.context_seqlens = self.cache_seqlens
        if valid is None:
            least = most = [seqlen_q] * rows
        elif seqlen_q == 1:
            # Reading the mask would make the host wait in every decode step: provide for one token in each row.
            least, most = [0] * rows, [1] * rows
        else:
            both = torch.stack((self.cache_seqlens, valid.sum(1)))[:, :: self.prompt_repeats]
            lengths, new = both.tolist()  # the one wait of a padded multi-token forward
            self.pages.learn(lengths)
            least = most = new
        if seqlen_q > 1:
            held = set(zip(self.pages.at_least, self.pages.at_most, strict=True))
            least_held, most_held = held.pop()
            self.context_len = least_held if least_held == most_held and not held else None
        copies = self.pages.extend(least, most)
        self.copies = None
        if copies:
            source, destination = zip(*copies, strict=True)
            self.copies = (
                _to_device(list(source), torch.int64, self.device),
                _to_device(list(destination), torch.int64, self.device),
            )
        self._upload_table()
        # Lengths are replaced, not changed in place: an attention call still in flight may hold the old ones.
        self.slots, self.cache_seqlens = ops.next_slots(
            self.block_table, self.cache_seqlens, seqlen_q, self.block_size, valid, backend=self.backend
        )
        self._note(valid, seqlen_q)
        self.seen += seqlen_q

    def _note(self, valid: torch.Tensor | None, seqlen_q: int) -> None:
        """Append this forward's columns to the history, which is kept only once there was padding."""
        if self.history is None and valid is None:
            return
        if self.history is None:
            self.history = torch.ones((self.batch, self.seen), dtype=torch.bool, device=self.device)
        if valid is None:
            valid = torch.ones((self.batch, seqlen_q), dtype=torch.bool, device=self.device)
        self.history = torch.cat((self.history, valid), dim=1)

    def _upload_table(self) -> None:
        rows = self.pages.rows
        made_from = (self.pages.version, self.prompt_repeats)
        if made_from == self._uploaded:
            return
        width = max(1, *(len(pages) for pages in rows)) if len(rows) > 1 else max(1, len(rows[0]))
        padded = [pages + [0] * (width - len(pages)) for pages in rows]
        table = _to_device(padded, torch.int32, self.device)
        self.block_table = table.repeat_interleave(self.prompt_repeats, 0) if self.prompt_repeats > 1 else table
        self._uploaded = made_from

    def part_prompts(self) -> None:
        """End the phase in which groups of rows share their prompt: from now on each row has a table row of its own."""
        if self.prompt_repeats > 1:
            groups = range(len(self.pages.rows))
            self.pages.select([group for group in groups for _ in range(self.prompt_repeats)])
            self.prompt_repeats = 1

    def _learn_lengths(self) -> None:
        """Let the page table know the real lengths where it only has bounds; waits for the device if so."""
        if self.pages.at_least != self.pages.at_most:
            self.pages.learn(self.cache_seqlens[:: self.prompt_repeats].tolist())

    def _crop(self, kept: int, num_positions: int) -> None:
        if self.history is None:
            self._learn_lengths()
            self.cache_seqlens = self.cache_seqlens - num_positions
            lengths = [length - num_positions for length in self.pages.at_most]
        else:
            removed = self.history[:, kept:].sum(1, dtype=torch.int32)
            self.history = self.history[:, :kept]
            self.cache_seqlens = self.cache_seqlens - removed
            lengths = self.cache_seqlens[:: self.prompt_repeats].tolist()
        for row, length in enumerate(lengths):
            self.pages.truncate(row, length)
            self.pages.at_least[row] = length
        self.seen = kept
        self._upload_table()

    def select(self, indices: torch.Tensor) -> None:
        """Row i becomes what row `indices[i]` was; pages are shared. Reads `indices` on the host."""
        self.plan = self._slot_map = None
        chosen = indices.tolist()
        if not chosen or not all(0 <= index < self.batch for index in chosen):
            raise ValueError(
                f"flash_mla.PagedLatentCache: rows must be numbers in 0..{self.batch - 1}, at least one, got {chosen}"
            )
        self.part_prompts()
        self._learn_lengths()
        self.pages.select(chosen)
        self.batch = len(self.pages.rows)
        indices = indices.to(self.device)
        self.cache_seqlens = self.cache_seqlens[indices]
        if self.history is not None:
            self.history = self.history[indices]
        self._upload_table()

    def _reset(self) -> None:
        self._empty(self.batch, 1, self.pages.num_blocks)

    def pages_in_use(self) -> int:
        """Pages that hold tokens of at least one row; shared ones count once."""
        return self.pages.num_allocated

    def _check_lengths(self, lengths: list[int]) -> None:
        self.pages.check()
        for row, (least, most) in enumerate(zip(self.pages.at_least, self.pages.at_most, strict=True)):
            length = lengths[row * self.prompt_repeats]
            if not least <= length <= most:
                raise ValueError(
                    f"flash_mla.PagedLatentCache: row {row} holds {length} tokens, its pages are for {least}..{most}"
                )
