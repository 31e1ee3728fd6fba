"""A paged layer of a model with sparse attention: latents in pages, the indexer's keys as Transformers keeps them.

The indexer scores all positions in padded order, so its keys stay a tensor with a row per position, in the layer of
Transformers that this one stands for.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import CacheLayerMixin

from ..contract import UnsupportedError
from .group import PagedGroup
from .layer import Latents, PagedLatentLayer

__all__ = ["PagedIndexedLayer"]


class PagedIndexedLayer(PagedLatentLayer):
    """Pages of latents, and the keys of the layer's indexer.

    Args:
        group, index: as in `PagedLatentLayer`.
        indexer: Transformers' own layer, of which only the indexer's half is used.
    """

    def __init__(self, group: PagedGroup, index: int, indexer: CacheLayerMixin) -> None:
        super().__init__(group, index)
        self.indexer = indexer
        # Whether its keys have tokens of a forward that has not come to this layer's attention yet.
        self.indexer_is_ahead = False

    @property
    def indexer_keys(self) -> torch.Tensor | None:
        """Keys of the indexer `[batch, positions, index_head_dim]`, all of the capacity if that is fixed; or None."""
        keys: torch.Tensor | None = self.indexer.indexer_keys
        return keys

    def update_indexer(self, indexer_key_states: torch.Tensor) -> torch.Tensor:
        """Take the indexer's new keys `[batch, seqlen_q, index_head_dim]`; returns all of them."""
        if not torch.compiler.is_compiling() and self.group.attention == "flash_mla":
            self.indexer_is_ahead = True
        if self.group.max_cache_len is None:
            keys: torch.Tensor = self.indexer.update_indexer(indexer_key_states)
            return keys
        if not self.indexer.is_indexer_initialized:
            if torch.compiler.is_compiling():
                self.indexer.lazy_initialization_indexer(indexer_key_states)
            else:
                with torch.inference_mode(False):  # changed in place later, in whatever mode
                    self.indexer.lazy_initialization_indexer(indexer_key_states)
        # Past the capacity the last place is written again, as latents go to page 0: `validate` tells.
        length = self.indexer.indexer_cumulative_length
        places = torch.arange(indexer_key_states.shape[1], device=length.device) + length
        length.add_(indexer_key_states.shape[1])
        keys = self.indexer.indexer_keys
        keys.index_copy_(1, places.clamp(max=self.group.max_cache_len - 1), indexer_key_states)
        return keys

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Any, Any]:
        """Take new latents; as in `PagedLatentLayer`.

        Raises: ValueError: also if the forward before stopped between this layer's indexer and its attention.
        """
        if self.indexer_is_ahead and not torch.compiler.is_compiling():
            raise ValueError(
                f"flash_mla.PagedLatentCache: the last forward stopped in layer {self.index} between its indexer and "
                "its attention, so that the indexer has tokens which are not stored: reset() the cache or use a new one"
            )
        return super().update(key_states, value_states, *args, **kwargs)

    def begin(self, new: Latents, valid: torch.Tensor | None) -> None:
        """As in `PagedLatentLayer`."""
        super().begin(new, valid)
        if not torch.compiler.is_compiling():
            self.indexer_is_ahead = False

    def lay_down_indexer(self, keys: torch.Tensor) -> None:
        """Take stored keys `[batch, num_tokens, index_head_dim]` as the first ones; `lay_down` takes the latents."""
        self.update_indexer(keys)
        self.indexer_is_ahead = False

    def indexer_keys_of(self, row: int, columns: torch.Tensor) -> torch.Tensor | None:
        """The indexer's keys of one row of the batch at the positions `columns`, `[len(columns), index_head_dim]`.

        None where the layer has none of its own (it uses another one's choice).
        Raises: UnsupportedError: keys that come with positions in several dimensions.
        """
        if self.indexer_keys is None:
            return None
        if getattr(self.indexer, "indexer_position_ids", None) is not None:
            raise UnsupportedError(
                f"flash_mla.PrefixStore.save: layer {self.index} keeps positions beside its indexer's keys: not stored"
            )
        return self.indexer_keys[row, columns.to(self.indexer_keys.device)]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int | torch.Tensor]:
        """(length, offset) of the keys that a mask must cover: the whole context, which the indexer scores."""
        if self.group.max_cache_len is not None:
            return self.group.max_cache_len, 0
        seen = self.get_seq_length()
        assert isinstance(seen, int)
        return seen + query_length, 0

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` positions of every row; zero or negative."""
        super().crop(tokens_to_remove)
        keys = self.indexer_keys
        if keys is None or tokens_to_remove == 0:
            return
        if self.group.max_cache_len is None:
            self.indexer.indexer_keys = keys[:, :tokens_to_remove]
        else:  # what lies past the length is masked, and written over
            self.indexer.indexer_cumulative_length.add_(tokens_to_remove)

    def select_rows(self, indices: torch.Tensor) -> None:
        """Row i becomes what row `indices[i]` was."""
        super().select_rows(indices)
        keys = self.indexer_keys
        if keys is None:
            return
        if indices.dtype == torch.bool:
            indices = indices.nonzero().flatten()
        chosen = keys[indices.to(keys.device)]
        if self.group.max_cache_len is None:
            self.indexer.indexer_keys = chosen
        else:  # at an address that compiled steps know
            keys.copy_(chosen)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row `repeats` times; pages are shared until one of the copies is written to."""
        # By its own keys: the state of the first layer's has the new batch already.
        keys = self.indexer_keys
        rows = keys.shape[0] if keys is not None else 0 if self.state is None else self.state.batch
        if rows:
            self.select_rows(torch.arange(rows).repeat_interleave(repeats))

    def reset(self) -> None:
        """Forget every token; the pool is kept."""
        super().reset()
        self.indexer.reset()
        self.indexer_is_ahead = False
