"""A paged layer of a model with sparse attention: latents in pages, the indexer's keys as Transformers keeps them.

The indexer scores all positions in padded order, so its keys stay a tensor with a row per position, in the layer of
Transformers that this one stands for.
"""

from __future__ import annotations

import torch
from transformers.cache_utils import CacheLayerMixin

from .group import PagedGroup
from .layer import PagedLatentLayer

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

    @property
    def indexer_keys(self) -> torch.Tensor | None:
        """Keys of the indexer `[batch, positions, index_head_dim]`, all of the capacity if that is fixed; or None."""
        keys: torch.Tensor | None = self.indexer.indexer_keys
        return keys

    def update_indexer(self, indexer_key_states: torch.Tensor) -> torch.Tensor:
        """Take the indexer's new keys `[batch, seqlen_q, index_head_dim]`; returns all of them."""
        keys: torch.Tensor = self.indexer.update_indexer(indexer_key_states)
        return keys

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
        keys = self.indexer_keys
        rows = self.state.batch if self.state is not None else 0 if keys is None else keys.shape[0]
        if rows:
            self.select_rows(torch.arange(rows).repeat_interleave(repeats))

    def reset(self) -> None:
        """Forget every token; the pool is kept."""
        super().reset()
        self.indexer.reset()
