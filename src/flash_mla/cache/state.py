"""What the paged layers of one device share: block table, lengths, and where the tokens of this forward go.

The first paged layer of a forward (the leader) advances the state; the others reuse its slots, lengths and split plan.
Growing: pages are dealt out by `PageTable` on the host. Fixed (`max_cache_len`): every row owns its pages from the
start and everything lives in tensors at stable addresses, so that a compiled decode step is one graph and may be
replayed; nothing here then depends on a Python number that changes from step to step.
"""

from __future__ import annotations

from typing import Any

import torch

from ..ops import SplitPlan
from .pages import PageTable, pages_for

__all__ = ["PagedGroup", "PagedState"]


def _to_device(values: list[int] | list[list[int]], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A small host list as a device tensor; from pinned memory on CUDA, so that the host does not wait."""
    host = torch.tensor(values, dtype=dtype)
    if device.type == "cuda":
        return host.pin_memory().to(device, non_blocking=True)
    return host.to(device)


class PagedState:
    """Lengths and pages of one batch on one device.

    Args:
        batch: rows.
        block_size: tokens per page.
        device: where the tensors live.
        max_cache_len: positions (padding included) that a row can hold, or None to grow by pages.
        prompt_repeats: rows come in groups of this many with the same prompt (beams, `num_return_sequences`); until the
            first single-token step a group shares its pages.

    Attributes:
        block_table: int32 `[batch, max_blocks]`.
        cache_seqlens: int32 `[batch]`, real tokens, new ones of this forward included.
        slots: int64 `[batch, seqlen_q]` of this forward: block * block_size + offset; padding goes to page 0.
        seen: padded length; an int, or with fixed capacity an int64 tensor without dimensions.
        history: bool `[batch, positions]`, which positions are stored (padding is not); None while all are.
        has_context: whether anything was stored since the last reset.
        had_context: the same, before the forward under way.
        padding_unknown: positions were stored under an attention ("eager", "sdpa") whose mask the cache never saw, so
            some of them may be padding: only the caller's mask over the whole context tells.
    """

    def __init__(
        self,
        batch: int,
        block_size: int,
        device: torch.device,
        max_cache_len: int | None = None,
        prompt_repeats: int = 1,
    ) -> None:
        self.batch = batch
        self.block_size = block_size
        self.device = device
        self.max_cache_len = max_cache_len
        self.has_context = False
        self.had_context = False
        self.padding_unknown = False
        self.history: torch.Tensor | None = None
        self.copies: tuple[torch.Tensor, torch.Tensor] | None = None
        self.plan: SplitPlan | None = None
        self.cache_seqlens = torch.zeros(batch, dtype=torch.int32, device=device)
        self.slots = torch.zeros((batch, 1), dtype=torch.int64, device=device)
        self.seen: int | torch.Tensor
        if max_cache_len is None:
            self.prompt_repeats = prompt_repeats
            self._uploaded: list[tuple[int, ...]] | None = None  # what block_table holds
            self.pages = PageTable(block_size, batch // prompt_repeats)
            self.block_table = torch.zeros((batch, 0), dtype=torch.int32, device=device)
            self.seen = 0
            return
        self.prompt_repeats = 1
        per_row = pages_for(max_cache_len, block_size)
        self.num_blocks_fixed = 1 + batch * per_row
        pages = torch.arange(1, self.num_blocks_fixed, dtype=torch.int32, device=device)
        self.block_table = pages.view(batch, per_row)
        self.seen = torch.zeros((), dtype=torch.int64, device=device)
        # One column more than positions: what lies past the capacity is noted there and never read.
        self.history = torch.zeros((batch, max_cache_len + 1), dtype=torch.bool, device=device)
        self.overflowed = torch.zeros((), dtype=torch.bool, device=device)
        self.decode_slots = self.slots
        # The padded length as the host knows it; None after a compiled step, which may not touch Python numbers.
        self.seen_on_host: int | None = 0
        for tensor in (self.block_table, self.cache_seqlens, self.seen, self.history, self.overflowed, self.slots):
            if not torch.compiler.is_compiling():
                torch._dynamo.mark_static_address(tensor)

    @property
    def is_fixed(self) -> bool:
        """Whether the capacity is fixed."""
        return self.max_cache_len is not None

    @property
    def num_blocks(self) -> int:
        """Pages that a layer's pool must have, page 0 included."""
        return self.num_blocks_fixed if self.is_fixed else self.pages.num_blocks

    def seen_int(self) -> int:
        """The padded length as a number; waits for the device if compiled steps moved it."""
        if isinstance(self.seen, int):
            return self.seen
        if self.seen_on_host is None:
            self.seen_on_host = int(self.seen)
        return self.seen_on_host

    def start(self, batch: int) -> None:
        """Take up an empty state for a batch of another size; raises ValueError if the capacity is fixed."""
        if self.is_fixed:
            raise ValueError(
                f"flash_mla.PagedLatentCache: a fixed-capacity cache keeps its batch of {self.batch}, got {batch} rows"
            )
        self.batch = batch
        self.prompt_repeats = 1
        self.pages = PageTable(self.block_size, batch, self.pages.num_blocks)
        self.block_table = torch.zeros((batch, 0), dtype=torch.int32, device=self.device)
        self.cache_seqlens = torch.zeros(batch, dtype=torch.int32, device=self.device)
        self._uploaded = None

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
        self.plan = None
        if self.is_fixed:
            self._advance_fixed(seqlen_q, valid)
        else:
            self._advance_growing(seqlen_q, valid)
        self.had_context = self.has_context
        self.has_context = True

    # --- growing ------------------------------------------------------------------------------------------------------

    def _advance_growing(self, seqlen_q: int, valid: torch.Tensor | None) -> None:
        assert isinstance(self.seen, int)
        if seqlen_q == 1:
            self.part_prompts()
        rows = self.batch // self.prompt_repeats
        if valid is None:
            least = most = [seqlen_q] * rows
        elif seqlen_q == 1:
            # Reading the mask would make the host wait in every decode step: provide for one token in each row.
            least, most = [0] * rows, [1] * rows
        else:
            leaders = torch.stack((self.cache_seqlens, valid.sum(1)))[:, :: self.prompt_repeats]
            lengths, new = leaders.tolist()  # the one wait of a padded multi-token forward
            self.pages.learn(lengths)
            least = most = new
        copies = self.pages.extend(least, most)
        self.copies = None
        if copies:
            source, destination = zip(*copies, strict=True)
            self.copies = (
                _to_device(list(source), torch.int64, self.device),
                _to_device(list(destination), torch.int64, self.device),
            )
        self._upload_table()
        before = self.cache_seqlens.long()
        if valid is None:
            position = before[:, None] + torch.arange(seqlen_q, device=self.device)
            # Out of place: an attention call still in flight, or a user, may hold the old lengths.
            self.cache_seqlens = self.cache_seqlens + seqlen_q
        else:
            position = before[:, None] + valid.cumsum(1) - 1
            self.cache_seqlens = self.cache_seqlens + valid.sum(1, dtype=torch.int32)
        self._place(position, valid)
        self._note(valid, seqlen_q)
        self.seen += seqlen_q

    def _place(self, position: torch.Tensor, valid: torch.Tensor | None) -> None:
        block = position.clamp(min=0) // self.block_size
        if valid is not None:  # a row of padding only may stand one page past its table
            block = block.clamp(max=self.block_table.shape[1] - 1)
        slots = self.block_table.gather(1, block).long() * self.block_size + position % self.block_size
        self.slots = slots if valid is None else torch.where(valid, slots, 0)

    def _note(self, valid: torch.Tensor | None, seqlen_q: int) -> None:
        """Append this forward's column(s) to the validity history; kept only once there was padding."""
        assert isinstance(self.seen, int)
        if self.history is None and valid is None:
            return
        if self.history is None:
            self.history = torch.ones((self.batch, self.seen), dtype=torch.bool, device=self.device)
        if valid is None:
            valid = torch.ones((self.batch, seqlen_q), dtype=torch.bool, device=self.device)
        self.history = torch.cat((self.history[:, : self.seen], valid), dim=1)

    def _upload_table(self) -> None:
        rows = self.pages.rows
        key = [tuple(pages) for pages in rows]
        if key == self._uploaded:
            return
        width = max(1, *(len(pages) for pages in rows)) if rows else 1
        padded = [pages + [0] * (width - len(pages)) for pages in rows]
        table = _to_device(padded, torch.int32, self.device).view(len(rows), width)
        self.block_table = table.repeat_interleave(self.prompt_repeats, 0) if self.prompt_repeats > 1 else table
        self._uploaded = key

    def part_prompts(self) -> None:
        """End the phase in which groups of rows share their prompt: from now on each row has a table row of its own."""
        if self.prompt_repeats > 1:
            groups = range(len(self.pages.rows))
            self.pages.select([group for group in groups for _ in range(self.prompt_repeats)])
            self.prompt_repeats = 1

    def learn_lengths(self) -> None:
        """Let the page table know the real lengths where it only has bounds; waits for the device if so."""
        if self.pages.at_least != self.pages.at_most:
            self.pages.learn(self.cache_seqlens[:: self.prompt_repeats].tolist())

    # --- fixed capacity -----------------------------------------------------------------------------------------------

    def _advance_fixed(self, seqlen_q: int, valid: torch.Tensor | None) -> None:
        assert isinstance(self.seen, torch.Tensor) and self.history is not None and self.max_cache_len is not None
        if torch.compiler.is_compiling():
            self.seen_on_host = None
        else:
            self.seen_on_host = self.seen_int() + seqlen_q
        before = self.cache_seqlens.long()[:, None]
        steps = torch.arange(seqlen_q, device=self.device)
        if valid is None:
            position = before + steps
            fits = position < self.max_cache_len
        else:
            position = before + valid.cumsum(1) - 1
            fits = valid & (position < self.max_cache_len)
        block = (position.clamp(min=0) // self.block_size).clamp(max=self.block_table.shape[1] - 1)
        slots = self.block_table.gather(1, block).long() * self.block_size + position.clamp(min=0) % self.block_size
        # Past the capacity a token goes to page 0 like padding: a live page is never overwritten.
        slots = torch.where(fits, slots, 0)
        columns = (self.seen + steps).clamp(max=self.max_cache_len)
        self.history[:, columns] = fits
        self.cache_seqlens.add_(fits.sum(1, dtype=torch.int32))
        self.seen.add_(seqlen_q)
        self.overflowed.logical_or_(self.seen > self.max_cache_len)
        if seqlen_q == 1:
            self.decode_slots.copy_(slots)
            self.slots = self.decode_slots
        else:
            self.slots = slots

    # --- both ---------------------------------------------------------------------------------------------------------

    def positions(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Slot of every position seen so far, in padded order, for gathering.

        Returns: slots int64 `[batch, positions]` (0 where nothing is stored) and bool `[batch, positions]` or None if
        every position holds a real token. With fixed capacity all `max_cache_len` positions are returned.
        """
        if self.is_fixed:
            assert self.history is not None and self.max_cache_len is not None
            stored: torch.Tensor | None = self.history[:, : self.max_cache_len]
        else:
            stored = self.history
        if stored is None:
            rank = torch.arange(self.seen_int(), device=self.device).expand(self.batch, -1)
        else:
            rank = (stored.cumsum(1) - 1).clamp(min=0)
        if rank.shape[1] == 0:
            return rank, stored
        block = (rank // self.block_size).clamp(max=self.block_table.shape[1] - 1)
        slots = self.block_table.gather(1, block).long() * self.block_size + rank % self.block_size
        return (slots if stored is None else torch.where(stored, slots, 0)), stored

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
        self.plan = None
        kept = self.seen_int() - num_positions
        if self.history is not None:
            removed = self.history[:, kept : kept + num_positions].sum(1, dtype=torch.int32)
        else:
            removed = torch.full_like(self.cache_seqlens, num_positions)
        if self.is_fixed:
            assert isinstance(self.seen, torch.Tensor) and self.history is not None
            self.history[:, kept:] = False
            self.cache_seqlens.sub_(removed)
            self.seen.fill_(kept)
            self.seen_on_host = kept
        else:
            if self.history is None:
                self.learn_lengths()
                lengths = [length - num_positions for length in self.pages.at_most]
            else:
                lengths = (self.cache_seqlens - removed)[:: self.prompt_repeats].tolist()
            for row, length in enumerate(lengths):
                self.pages.truncate(row, length)
                self.pages.at_least[row] = length
            if self.history is not None:
                self.history = self.history[:, :kept]
            self.cache_seqlens = self.cache_seqlens - removed
            self.seen = kept
            self._upload_table()
        self.has_context = kept > 0

    def select(self, indices: torch.Tensor) -> None:
        """Row i becomes what row `indices[i]` was (beams, subsets, repeats). Reads `indices` on the host."""
        self.plan = None
        if self.is_fixed:
            return self._select_fixed(indices)
        self.part_prompts()
        self.learn_lengths()
        self.pages.select(indices.tolist())
        indices = indices.to(self.device)
        self.batch = len(self.pages.rows)
        self.cache_seqlens = self.cache_seqlens[indices]
        if self.history is not None:
            self.history = self.history[indices]
        self._upload_table()
        return None

    def _select_fixed(self, indices: torch.Tensor) -> None:
        """Lengths and history only: each layer moves the rows themselves (`PagedLatentLayer.select_rows`)."""
        assert self.history is not None
        indices = indices.to(self.device)
        if len(indices) != self.batch:
            raise ValueError(
                f"flash_mla.PagedLatentCache: a fixed-capacity cache keeps its batch of {self.batch}, "
                f"got {len(indices)} rows"
            )
        self.cache_seqlens.copy_(self.cache_seqlens[indices])
        self.history.copy_(self.history[indices])

    def reset(self) -> None:
        """Forget every token; tensors of a fixed cache keep their addresses."""
        self.plan = None
        self.has_context = False
        self.padding_unknown = False
        if self.is_fixed:
            assert isinstance(self.seen, torch.Tensor) and self.history is not None
            for tensor in (self.cache_seqlens, self.seen, self.history, self.overflowed):
                tensor.zero_()
            self.seen_on_host = 0
            return
        self.pages.clear()
        self.cache_seqlens = torch.zeros_like(self.cache_seqlens)
        self.history = None
        self.seen = 0
        self._upload_table()

    def validate(self) -> None:
        """Raise ValueError if what is on the device cannot be right. Waits for the device."""
        lengths = self.cache_seqlens.tolist()
        if self.is_fixed:
            if bool(self.overflowed):
                raise ValueError(
                    f"flash_mla.PagedLatentCache: {int(self.seen)} positions were given to a fixed capacity of "
                    f"max_cache_len={self.max_cache_len}; tokens past it were not stored, results after them are wrong"
                )
        else:
            self.pages.check()
            repeats = self.prompt_repeats
            for row, (least, most) in enumerate(zip(self.pages.at_least, self.pages.at_most, strict=True)):
                if not least <= lengths[row * repeats] <= most:
                    raise ValueError(
                        f"flash_mla.PagedLatentCache: row {row} holds {lengths[row * repeats]} tokens, "
                        f"its pages are for {least}..{most}"
                    )
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


class PagedGroup:
    """What all paged layers of one cache share: its options and one `PagedState` per device.

    Layers refer to this and not to the cache, so that a dropped cache frees its pools at once, without a collector run.
    """

    def __init__(
        self,
        config: Any,
        block_size: int,
        max_cache_len: int | None,
        prompt_repeats: int,
        backend: str | None,
        kv_lora_ranks: list[int | None],
    ) -> None:
        self.config = config
        self.block_size = block_size
        self.max_cache_len = max_cache_len
        self.prompt_repeats = prompt_repeats
        self.backend = backend
        self.kv_lora_ranks = kv_lora_ranks
        self.states: dict[torch.device, PagedState] = {}

    @property
    def attention(self) -> str | None:
        """The attention implementation that the model runs now."""
        attention: str | None = self.config._attn_implementation
        return attention

    def join(self, batch: int, device: torch.device) -> tuple[PagedState, bool]:
        """The state of `device` and whether it was just made, which makes the asking layer its leader."""
        if device in self.states:
            return self.states[device], False
        repeats = self.prompt_repeats if batch % self.prompt_repeats == 0 else 1
        self.states[device] = PagedState(batch, self.block_size, device, self.max_cache_len, repeats)
        return self.states[device], True

    def check_crop(self, tokens_to_remove: int) -> None:
        """Raise ValueError unless every state can crop by `tokens_to_remove` (zero or negative)."""
        for state in self.states.values():
            state.check_crop(tokens_to_remove)
