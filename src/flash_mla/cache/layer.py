"""One layer's pool of latent pages, in the shape of a Transformers cache layer.

Under "flash_mla" `update` writes nothing: it returns a handle, and the attention function, which is the first to see
the mask, writes the real tokens (`write`). Under any other attention `update` writes everything and returns the whole
context in padded order, as Transformers' own layers do.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import CacheLayerMixin

from .. import ops
from ..codec import decode_rows, row_layout
from .group import PagedGroup
from .growing import GrowingState
from .pool import Pool
from .state import PagedState

__all__ = ["Latents", "PagedLatentLayer"]


class Latents:
    """New tokens of one layer on their way to the attention function; stands where keys and values would.

    Attributes:
        layer: the cache layer that they belong to.
        latent: `[batch, 1, seqlen_q, kv_lora_rank]`, normalised.
        k_rope: `[batch, 1, seqlen_q, qk_rope_head_dim]`, rotated.
        stored: whether they are in their pages; layers that share keys and values are given the same handle.
    """

    __slots__ = ("k_rope", "latent", "layer", "stored")

    def __init__(self, layer: PagedLatentLayer, latent: torch.Tensor, k_rope: torch.Tensor) -> None:
        self.layer = layer
        self.latent = latent
        self.k_rope = k_rope
        self.stored = False

    def to(self, device: Any, **kwargs: Any) -> Latents:
        """Itself: pages stay on the device of their layer.

        Raises: ValueError: another device, to which a model that shares keys and values between layers was split.
        """
        if torch.device(device) != self.latent.device:
            raise ValueError(
                f"flash_mla: layer {self.layer.index} has its pages on {self.latent.device}, a layer that shares them "
                f"is on {device}: put layers that share keys and values on one device"
            )
        return self

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"flash_mla.Latents has no {name!r}: a PagedLatentCache whose config says attn_implementation='flash_mla' "
            "was given to a model that runs another one (make the cache with that model's own config), or to an "
            "attention class that flash_mla does not know (generate() finds it; a forward of one's own does not)"
        )


class PagedLatentLayer(CacheLayerMixin):  # type: ignore[misc]
    """Pages `[num_blocks, block_size, 1, kv_lora_rank + qk_rope_head_dim]` of one MLA layer, in the latents' dtype; or
    FP8 rows, uint8 `[num_blocks, block_size, 1, row_bytes]`. `dtype` is that of the latents either way.

    Args:
        group: what it shares with the other paged layers: options, the attention in use, lengths and pages.
        index: its number among the model's layers.
    """

    is_sliding = False
    is_croppable = True
    supports_early_init = False

    def __init__(self, group: PagedGroup, index: int) -> None:
        super().__init__()
        self.group = group
        self.index = index
        self.is_leader = False
        self.pool = Pool(grows=group.max_cache_len is None)
        self.kv_cache: torch.Tensor | None = None
        self.state: PagedState | None = None
        self.kv_lora_rank = 0
        self.qk_rope_head_dim = 0
        # Up-projections of modules that are not plain linear layers, as matrices (hf/absorb.py), by the module's layer:
        # layers that share keys and values have each its own. They are kept here so that they die with the generation;
        # the key says which numbers and adapters a matrix was made from.
        self.absorbed: dict[int, tuple[object, torch.Tensor | None]] = {}
        # What the last decode step found out for the next one (hf/step.py).
        self.step: Any = None

    @property
    def d_qk(self) -> int:
        """Columns of a latent row, rotated key included."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def is_compileable(self) -> bool:
        """Fixed capacity only: growing hands out pages on the host."""
        return self.group.max_cache_len is not None

    @property
    def batch_size(self) -> int:
        """Rows; missing (AttributeError) before the first token, as in Transformers' layers."""
        if self.state is None:
            raise AttributeError("batch_size")
        return self.state.batch

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Make the pool for latents of this shape, dtype and device, and join the state of that device.

        Args:
            key_states: `[batch, 1, seqlen_q, kv_lora_rank]`; only shape, dtype and device are used.
            value_states: `[batch, 1, seqlen_q, qk_rope_head_dim]`, likewise.
        """
        batch, device = key_states.shape[0], key_states.device
        self.state, self.is_leader = self.group.join(batch, device, self.index)
        self.kv_lora_rank, self.qk_rope_head_dim = key_states.shape[-1], value_states.shape[-1]
        dtype = torch.promote_types(key_states.dtype, value_states.dtype)
        width = row_layout(self.kv_lora_rank, self.qk_rope_head_dim).row_bytes if self.group.is_fp8 else self.d_qk
        shape = (self.state.num_blocks, self.state.block_size, 1, width)
        self.kv_cache = self.pool.zeros(shape, torch.uint8 if self.group.is_fp8 else dtype, device)
        if self.group.max_cache_len is not None and not torch.compiler.is_compiling():
            torch._dynamo.mark_static_address(self.kv_cache)
        self.dtype, self.device = dtype, device
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Any, Any]:
        """Take new latents.

        Args:
            key_states: `[batch, 1, seqlen_q, kv_lora_rank]`, the normalised latents.
            value_states: `[batch, 1, seqlen_q, qk_rope_head_dim]`, the rotated keys.
        Returns: under "flash_mla" the same `Latents` twice, nothing written yet; otherwise the whole context in padded
            order, `[batch, 1, positions, kv_lora_rank]` and `[batch, 1, positions, qk_rope_head_dim]`.
        Raises: ValueError: not latents, other dims, dtype, device or batch than before, or no room (nothing written).
        """
        self._check(key_states, value_states)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        new = Latents(self, key_states, value_states)
        assert self.state is not None
        if self.is_leader and not torch.compiler.is_compiling():
            if not self.state.has_context and key_states.shape[0] != self.state.batch:
                self.state.start(key_states.shape[0])
            self.state.check_room(key_states.shape[2])
        if self.group.attention == "flash_mla":
            return new, new
        if self.is_leader:
            self.state.padding_unknown = True
        self.write(new, None)
        return self.gather()

    def _check(self, latent: torch.Tensor, k_rope: torch.Tensor) -> None:
        if latent.ndim != 4 or latent.shape[1] != 1 or k_rope.shape[:3] != latent.shape[:3]:
            raise ValueError(
                f"{self._where()}: latents must be [batch, 1, seqlen_q, kv_lora_rank] and [batch, 1, seqlen_q, "
                f"qk_rope_head_dim], got {tuple(latent.shape)} and {tuple(k_rope.shape)}"
            )
        rank = self.group.kv_lora_ranks[self.index]
        if rank is not None and latent.shape[-1] != rank:
            raise ValueError(f"{self._where()}: latents must have kv_lora_rank={rank} columns, got {latent.shape[-1]}")
        if self.kv_cache is None or self.state is None:
            return
        dtype = latent.dtype
        if k_rope.dtype != dtype:
            dtype = torch.promote_types(dtype, k_rope.dtype)
        if (self.kv_lora_rank, self.qk_rope_head_dim) != (latent.shape[-1], k_rope.shape[-1]):
            raise ValueError(
                f"{self._where()}: holds rows of {self.kv_lora_rank} + {self.qk_rope_head_dim} columns, "
                f"got {latent.shape[-1]} + {k_rope.shape[-1]}: a cache of another model?"
            )
        if dtype != self.dtype or latent.device != self.kv_cache.device:
            raise ValueError(
                f"{self._where()}: holds {self.dtype} on {self.kv_cache.device}, got {dtype} on {latent.device}"
            )
        if latent.shape[0] != self.state.batch and (self.state.has_context or self.group.max_cache_len is not None):
            raise ValueError(f"{self._where()}: holds a batch of {self.state.batch}, got {latent.shape[0]}")

    def _where(self) -> str:
        return f"flash_mla.PagedLatentCache: layer {self.index}"

    def write(self, new: Latents, valid: torch.Tensor | None) -> None:
        """Store new tokens; the leader first moves the shared state on.

        Args:
            new: from `update`.
            valid: bool `[batch, seqlen_q]`, False where a position is padding and not to be stored; None: all real.
        """
        self.begin(new, valid)
        self.store(new)

    def begin(self, new: Latents, valid: torch.Tensor | None) -> None:
        """Make room for new tokens; the leader moves the shared state on. Arguments as of `write`; `store` follows."""
        assert self.state is not None
        if self.is_leader and self.state.prompt_repeats > 1 and not self._same_prompts(new, valid):
            self.state.part_prompts()
        self._make_room(new.latent.shape[2], valid)

    def _make_room(self, seqlen_q: int, valid: torch.Tensor | None) -> None:
        assert self.state is not None and self.kv_cache is not None
        if self.is_leader:
            state = self.state
            if isinstance(state, GrowingState) and state.pages.round_up is None and not torch.compiler.is_compiling():
                state.pages.round_up = self.pool.round_up(self.kv_cache)  # reset() makes a new page table
            self.state.advance(seqlen_q, valid)
        self._follow()

    def store(self, new: Latents, q: torch.Tensor | None = None, q_rope: torch.Tensor | None = None) -> None:
        """Write new tokens where `begin` made room, and in the same launch `q_rope` into the last columns of `q`.

        Args:
            new: as given to `begin`.
            q: `[batch, seqlen_q, num_heads, d_qk]`, dtype of the latents, or None.
            q_rope: `[batch, seqlen_q, num_heads, qk_rope_head_dim]`, given with `q`.
        """
        assert self.state is not None and self.kv_cache is not None
        ops.append(
            self.kv_cache,
            new.latent.detach().transpose(1, 2).to(self.dtype),
            new.k_rope.detach().transpose(1, 2).to(self.dtype),
            self.state.slots,
            q=q,
            q_rope=q_rope,
            backend=self.group.backend,
        )
        new.stored = True
        self.stored()

    def stored(self) -> None:
        """Note that this layer has the new tokens: a forward that stops before the last layer is found out by that."""
        assert self.state is not None
        if not torch.compiler.is_compiling():
            self.state.num_written += 1

    def rows_of(self, row: int, num_tokens: int) -> torch.Tensor:
        """The first `num_tokens` real tokens of one row of the batch, as the pool has them, `[num_tokens, width]`."""
        assert self.state is not None and self.kv_cache is not None
        rank = torch.arange(num_tokens, device=self.state.device)
        slots = self.state.slots_of(rank.expand(self.state.batch, -1))[row]
        return self.kv_cache[slots // self.state.block_size, slots % self.state.block_size, 0]

    def lay_down(self, rows: torch.Tensor, latents: torch.Tensor, k_rope: torch.Tensor) -> None:
        """Take stored tokens as the first ones of every row of the batch; nothing may be held yet.

        Args:
            rows: `[num_tokens, width]`, from `rows_of`, on this layer's device.
            latents: `[batch, 1, 0, kv_lora_rank]`, in the dtype of the latents, on that device: shapes only.
            k_rope: `[batch, 1, 0, qk_rope_head_dim]`, likewise.
        Raises: ValueError: a fixed capacity that is too small, or of another batch.
        """
        if not self.is_initialized:
            self.lazy_initialization(latents, k_rope)
        state = self.state
        assert state is not None and self.kv_cache is not None
        if self.is_leader:
            if state.batch != latents.shape[0]:
                state.start(latents.shape[0])
            state.check_room(len(rows))
        self._make_room(len(rows), None)
        # Bytes as they are: FP8 rows would not survive being rounded again.
        self.kv_cache[state.slots // state.block_size, state.slots % state.block_size, 0] = rows
        self.stored()

    def _same_prompts(self, new: Latents, valid: torch.Tensor | None) -> bool:
        """Whether the rows of each group were given the same tokens; waits for the device.

        Asked of the first layer only: on the same context, the same latents there mean the same tokens.
        """
        assert self.state is not None
        for tensor in (new.latent, new.k_rope, valid):
            if tensor is not None:
                groups = tensor.unflatten(0, (-1, self.state.prompt_repeats))
                if not torch.equal(groups, groups[:, :1].expand_as(groups)):
                    return False
        return True

    def _follow(self) -> None:
        """Let the pool follow what the state decided: grow it, and copy shared pages before one row writes to them."""
        assert self.state is not None and self.kv_cache is not None
        if self.kv_cache.shape[0] < self.state.num_blocks:
            self.step = None  # it holds the pool, which would live on through a long prompt
            self.kv_cache = self.pool.grow(self.kv_cache, self.state.num_blocks)
        if self.state.copies is not None:
            source, destination = self.state.copies
            self.kv_cache[destination] = self.kv_cache[source]

    def gather(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The whole context in padded order, zeros where nothing is stored.

        Returns: latent `[batch, 1, positions, kv_lora_rank]` and k_rope `[batch, 1, positions, qk_rope_head_dim]`.
        """
        assert self.state is not None and self.kv_cache is not None
        slots, stored = self.state.positions()
        rows = self.kv_cache[slots // self.state.block_size, slots % self.state.block_size, 0]
        if stored is not None:
            rows = rows.masked_fill(~stored.unsqueeze(-1), 0)  # page 0 may hold anything, NaN included
        return self.latents_of(rows.unsqueeze(1))

    def latents_of(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Latents `[..., kv_lora_rank]` and rotated keys `[..., qk_rope_head_dim]` of rows of the pool."""
        if self.group.is_fp8:
            return decode_rows(rows, self.kv_lora_rank, self.qk_rope_head_dim, self.dtype)
        latent, k_rope = rows.split((self.kv_lora_rank, self.qk_rope_head_dim), dim=-1)
        return latent, k_rope

    def get_mask_sizes(self, query_length: int) -> tuple[int, int | torch.Tensor]:
        """(length, offset) of the keys that a mask must cover.

        Under "flash_mla" the new tokens only: everything stored is visible. Otherwise the whole context.
        """
        seen = self.get_seq_length()
        if self.group.attention == "flash_mla" and not (self.state is not None and self.state.padding_unknown):
            return query_length, seen
        if self.group.max_cache_len is not None:
            return self.group.max_cache_len, 0
        assert isinstance(seen, int)
        return seen + query_length, 0

    def get_seq_length(self) -> int | torch.Tensor:
        """Padded length, as `generate` counts it; with fixed capacity a tensor without dimensions."""
        return self.state.seen if self.state is not None else 0

    def get_max_length(self) -> int:
        """Positions that fit, -1 if the cache grows."""
        return self.group.max_cache_len if self.group.max_cache_len is not None else -1

    get_max_cache_shape = get_max_length

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` positions of every row (padded count); zero or negative."""
        if self.is_leader and self.state is not None:
            self.state.check_crop(tokens_to_remove)
            self.state.crop(-tokens_to_remove)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Row i becomes what row `beam_idx[i]` was."""
        self.select_rows(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows `indices` (numbers, or a bool mask over the batch), in that order."""
        self.select_rows(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row `repeats` times; the pages are shared until one of the copies is written to."""
        if self.state is not None:
            self.select_rows(torch.arange(self.state.batch).repeat_interleave(repeats))

    def select_rows(self, indices: torch.Tensor) -> None:
        """Row i becomes what row `indices[i]` was. Growing: by table; fixed: every layer moves its rows."""
        if self.state is None or self.kv_cache is None:
            return
        if indices.dtype == torch.bool:
            indices = indices.nonzero().flatten()
        if self.is_leader:
            self.state.select(indices)
        if self.state.layers_move_rows:
            rows = self.kv_cache[1:].unflatten(0, (self.state.batch, -1))
            rows.copy_(rows[indices.to(rows.device)])

    def reset(self) -> None:
        """Forget every token; the pool is kept."""
        if self.is_leader and self.state is not None:
            self.state.reset()
        self.absorbed.clear()

    def offload(self) -> None:
        """Refused: pages are shared between layers' tables and read by kernels in place."""
        raise ValueError(
            "flash_mla.PagedLatentCache: offloading is Transformers' own: use cache_implementation='offloaded'"
        )

    prefetch = offload
