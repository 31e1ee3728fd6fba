"""PrefixStore: which stored prefix serves a prompt, and how it gets into the pages of a cache.

A file is `<root>/<model>/<first>/<num_tokens>-<key>.safetensors`: `model` 16 hex digits of a hash of format version and
model, `first` 16 of the hash of the first 64 tokens ("short" where there are fewer), `key` the hash of model and all
tokens. So a prompt's candidates are those of two folders, and a whole stored prefix is recognised by its name alone.
"""

from __future__ import annotations

import contextlib
import logging
import os
import posixpath
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import safetensors
import torch
import transformers

from ..contract import UnsupportedError
from . import prefix_file
from .cache import PagedLatentCache
from .identity import check_text_only, differences, identity_of, longest_stable
from .layer import PagedLatentLayer
from .prefix_folder import PrefixFolder
from .prefix_rows import fill, taken

__all__ = ["PrefixEntry", "PrefixStore"]

logger = logging.getLogger(__name__)

NAME = re.compile(r"(\d+)-([0-9a-f]{64})\.safetensors")
WHERE = "flash_mla.PrefixStore"


@dataclass(frozen=True)
class PrefixEntry:
    """A stored prefix.

    Attributes:
        key: SHA-256 over format version, model and tokens, 64 hex digits.
        num_tokens: tokens of the prefix.
        num_bytes: size of its file.
        uri: of its file.
        is_own: stored by the model of this store as it is now, in FP8 rows or not; else `load` will not find it.
    """

    key: str
    num_tokens: int
    num_bytes: int
    uri: str
    is_own: bool


class PrefixStore:
    """Prefixes of prompts as safetensors files: latents, rotated keys and an indexer's keys of every layer.

    Args:
        uri: a local folder, or a URI of any filesystem of fsspec that is installed ("s3://bucket/folder"). Many
            processes may use one folder at the same time.
        model: the loaded model. Its name, revision, architecture, dtype, rope parameters and 64 elements of each weight
            are part of each key, and active adapters: a fine-tuned model of the same name finds nothing of its base.
        model_id: in place of the name or path that the model was loaded from, where that differs between machines.
        storage_options: for the filesystem of fsspec.
    Raises: UnsupportedError: layers that are not paged, or offloaded weights. ValueError: a model without latents, an
        unknown kind of URI. ImportError: the filesystem's package is missing.

    The caller is trusted that a cache was filled from the tokens that `save` is told, position 0 at the first real one
    (as `generate` counts); only their number is checked. Whoever may write to the folder is trusted too: the digest in
    a file finds accidents, it is no signature.
    """

    def __init__(
        self,
        uri: str | os.PathLike[str],
        model: Any,
        *,
        model_id: str | None = None,
        storage_options: dict[str, Any] | None = None,
    ) -> None:
        self.model = model
        self.model_id = model_id
        self.config = model.config.get_text_config(decoder=True)
        _check_layers(PagedLatentCache(self.config))
        identity_of(model, model_id, is_fp8=False)
        self.folder = PrefixFolder(os.fspath(uri), storage_options or {})
        self._headers: dict[str, dict[str, Any]] = {}  # of files seen: a name stands for one content

    def save(self, cache: PagedLatentCache, input_ids: torch.Tensor, row: int = 0) -> str:
        """Store the first tokens of one row of a cache; nothing is written if they are stored already.

        Args:
            cache: filled by this model. Padding on the left is left out: only real tokens are stored.
            input_ids: int64 `[num_tokens]` or `[1, num_tokens]`: the row's first real tokens, position 0 first.
            row: of the batch.
        Returns: the key, 64 hex digits.
        Raises: ValueError: a cache of another model, a row that holds fewer tokens, padding that the cache was not
            told of. UnsupportedError: tokens that stand for images; a prompt longer than the length up to which the
            model's rotated keys do not depend on it. OSError: it could not be written; then nothing is.
        """
        where = f"{WHERE}.save"
        tokens = _one_row(input_ids, where)
        self._check_cache(cache, where)
        check_text_only(self.model.config, tokens)
        check_text_only(self.config, tokens)
        state = next(iter(cache.group.states.values()), None)
        if state is None or not 0 <= row < state.batch:
            batch = 0 if state is None else state.batch
            raise ValueError(f"{where}: row must be one of the {batch} that the cache holds, got {row}")
        state.check_complete()
        if state.padding_unknown:
            raise ValueError(
                f"{where}: the cache must have been filled under attn_implementation='flash_mla': under another one it "
                "is not told which positions are padding"
            )
        held, limit = int(state.cache_seqlens[row]), longest_stable(self.config)
        if held < len(tokens):
            raise ValueError(f"{where}: row {row} must hold the {len(tokens)} tokens of input_ids, it holds {held}")
        if limit is not None and held > limit:
            raise UnsupportedError(
                f"{where}: rotated keys of {self.config.model_type} depend on the prompt's length past {limit} tokens, "
                f"row {row} holds {held}"
            )
        _, stored = state.positions()
        columns = torch.arange(len(tokens)) if stored is None else stored[row].nonzero().flatten()[: len(tokens)]
        tensors, layers = taken(cache, row, columns)
        identity = identity_of(self.model, self.model_id, cache.dtype == "fp8")
        chain = prefix_file.TokenChain(identity, tokens)
        header = {
            "key": chain.key(len(tokens)),
            "num_tokens": len(tokens),
            "chain": chain.links,
            "identity": identity,
            "layers": layers,
            "written_by": {
                "transformers": transformers.__version__,
                "torch": torch.__version__,
                "safetensors": safetensors.__version__,
            },
        }
        path = posixpath.join(self._folder(chain, len(tokens)), f"{len(tokens)}-{header['key']}.safetensors")
        if not self.folder.is_whole(path, sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())):
            self.folder.write(path, header, tensors)
        return str(header["key"])

    def load(
        self,
        input_ids: torch.Tensor,
        *,
        batch: int | None = None,
        key: str | None = None,
        into: PagedLatentCache | None = None,
        **options: Any,
    ) -> PagedLatentCache | None:
        """A cache that holds the longest stored beginning of a prompt, for `generate(input_ids, past_key_values=...)`.

        A whole stored prefix is used to the token, one that goes on differently to a multiple of 64 tokens. At least
        the last token of the prompt is left for the model to compute. The whole file is read and its digest compared.

        In fp32 the tokens that follow are those of a cold run, in bf16 up to the rounding of another batch of tokens.
        FP8 rows are rounded: what follows is what follows on the cache that was saved, while a cold prompt sees itself
        unrounded.

        Args:
            input_ids: int64 `[num_tokens]`, or `[rows, num_tokens]`: what all rows begin with is looked up, so padding
                belongs between prefix and question (0 in the attention mask).
            batch: rows of the cache; None: as many as `input_ids` has. Give rows x num_beams or x
                num_return_sequences for those. Rows share the pages of the prefix (each has its own in a cache of
                fixed capacity).
            key: use this entry and no other.
            into: an empty cache to fill (after `reset()`: its pools are kept); None makes one.
            options: of the `PagedLatentCache` that is made: block_size, max_cache_len, backend, dtype.
        Returns: the cache; None if nothing is stored that the prompt begins with.
        Raises: ValueError: a file that was cut off or changed, or the one of `key` is of another model, dtype, format
            version or other tokens; a capacity that is too small; `into` is not empty or another model's. Nothing is
            changed then.
        """
        where = f"{WHERE}.load"
        rows = input_ids[None] if input_ids.ndim == 1 else input_ids
        if rows.ndim != 2 or rows.is_floating_point() or rows.numel() == 0:
            raise ValueError(
                f"{where}: input_ids must be integers [num_tokens] or [rows, num_tokens], "
                f"got {input_ids.dtype} {tuple(input_ids.shape)}"
            )
        batch = rows.shape[0] if batch is None else batch
        if batch < 1:
            raise ValueError(f"{where}: batch must be at least 1, got {batch}")
        if into is not None and options:
            raise ValueError(f"{where}: options are for a cache that is made, got into and {', '.join(options)}")
        cache = PagedLatentCache(self.config, **options) if into is None else into
        self._check_cache(cache, where)
        _check_empty(cache)
        shared = (rows == rows[:1]).all(0).long().cumprod(0).sum()
        tokens = rows[0, : int(shared)].long().cpu()
        # The last token of the prompt gives the first new one.
        usable = min(len(tokens), rows.shape[1] - 1)
        limit = longest_stable(self.config)
        if limit is not None and rows.shape[1] > limit:
            logger.info("flash_mla: prompt of %d tokens, stored keys are for at most %d", rows.shape[1], limit)
            return None
        identity = identity_of(self.model, self.model_id, cache.dtype == "fp8")
        chain = prefix_file.TokenChain(identity, tokens)
        paths = self._candidates(chain, len(tokens), usable) if key is None else iter([self._path_of(key)])
        for path in paths:
            try:
                header, tensors = self.folder.read(path)
            except FileNotFoundError:  # deleted since it was listed
                continue
            num_tokens = min(self._check(path, header, identity, chain), usable)
            if num_tokens:
                name = f"{WHERE}: {self.folder.uri(path)}"
                fill(cache, self.model, name, header["layers"], tensors, num_tokens, batch)
                return cache
        return None

    def key_of(self, input_ids: torch.Tensor, dtype: str | None = None) -> str:
        """The key under which these tokens are stored, whether they are or not.

        Args:
            input_ids: int64 `[num_tokens]` or `[1, num_tokens]`.
            dtype: of the cache: "fp8", or None for that of the model.
        """
        tokens = _one_row(input_ids, f"{WHERE}.key_of")
        return prefix_file.TokenChain(identity_of(self.model, self.model_id, dtype == "fp8"), tokens).key(len(tokens))

    def entries(self) -> list[PrefixEntry]:
        """All stored prefixes, those of other models too; longest first."""
        own = [identity_of(self.model, self.model_id, is_fp8) for is_fp8 in (False, True)]
        folders = [prefix_file.TokenChain(one, torch.zeros(0, dtype=torch.int64)).folder[:16] for one in own]
        found = []
        for path, num_bytes in self.folder.files():
            match = NAME.fullmatch(posixpath.basename(path))
            if match is not None:
                is_own = path.split("/")[-3] in folders
                found.append(PrefixEntry(match[2], int(match[1]), num_bytes, self.folder.uri(path), is_own))
        return sorted(found, key=lambda entry: (-entry.num_tokens, entry.key))

    def delete(self, key: str) -> None:
        """Remove a stored prefix.

        Raises: ValueError: no entry has this key.
        """
        self.folder.remove(self._path_of(key))

    # --- lookup -------------------------------------------------------------------------------------------------------

    def _folder(self, chain: prefix_file.TokenChain, num_tokens: int) -> str:
        first = chain.links[0][:16] if num_tokens >= prefix_file.LINK_TOKENS else "short"
        return posixpath.join(self.folder.root, chain.folder[:16], first)

    def _candidates(self, chain: prefix_file.TokenChain, num_tokens: int, usable: int) -> Iterator[str]:
        """Files that hold a beginning of these tokens, the longest beginning first."""
        found: list[tuple[int, str]] = []
        longer: list[tuple[int, str]] = []
        for folder in {self._folder(chain, num_tokens), self._folder(chain, 0)}:
            for path in self.folder.paths(folder):
                match = NAME.fullmatch(posixpath.basename(path))
                if match is None:
                    continue
                length = int(match[1])
                if 0 < length <= num_tokens and chain.key(length) == match[2]:
                    found.append((min(length, usable), path))
                elif length > prefix_file.LINK_TOKENS:
                    longer.append((min(length, usable), path))
        best = max((length for length, _ in found), default=0)
        for length, path in sorted(longer, reverse=True):
            if length <= best:
                break
            with contextlib.suppress(FileNotFoundError):
                common = min(chain.common(self._header(path)), usable)
                best = max(best, common)
                found.append((common, path))
        for length, path in sorted(found, reverse=True):
            if length:
                yield path

    def _header(self, path: str) -> dict[str, Any]:
        if path not in self._headers:
            header = self.folder.read_header(path)
            self._headers[path] = {name: header[name] for name in ("key", "num_tokens", "chain")}
        return self._headers[path]

    def _path_of(self, key: str) -> str:
        for path, _ in self.folder.files():
            match = NAME.fullmatch(posixpath.basename(path))
            if match is not None and match[2] == key:
                return path
        raise ValueError(f"{WHERE}: no entry of {self.folder.uri(self.folder.root)} has the key {key!r}")

    # --- checks -------------------------------------------------------------------------------------------------------

    def _check_cache(self, cache: PagedLatentCache, where: str) -> None:
        if not isinstance(cache, PagedLatentCache):
            raise ValueError(f"{where}: needs a PagedLatentCache, got {type(cache).__name__}")
        config = cache.group.config
        if config is not self.config and config.to_dict() != self.config.to_dict():
            raise ValueError(
                f"{where}: the cache must be made from the config of the store's model ({self.config.model_type}), "
                f"got one of another config ({config.model_type})"
            )

    def _check(self, path: str, header: dict[str, Any], identity: dict[str, Any], chain: prefix_file.TokenChain) -> int:
        """Tokens of a file that a prompt begins with; raises ValueError if it is not what its name says."""
        name = f"{WHERE}: {self.folder.uri(path)}"
        wrong = differences(header["identity"], identity)
        if wrong:
            raise ValueError(f"{name}: is of another model: {wrong}")
        common = chain.common(header)
        if not common:
            raise ValueError(f"{name}: input_ids must begin with its {header['num_tokens']} tokens, they are others")
        if not path.endswith(f"/{header['num_tokens']}-{header['key']}.safetensors"):
            raise ValueError(
                f"{name}: must have the name {header['num_tokens']}-{header['key']}.safetensors: renamed since it was "
                "written"
            )
        return common


def _one_row(input_ids: torch.Tensor, where: str) -> torch.Tensor:
    tokens = input_ids[0] if input_ids.ndim == 2 and input_ids.shape[0] == 1 else input_ids
    if tokens.ndim != 1 or tokens.is_floating_point() or not len(tokens):
        raise ValueError(
            f"{where}: input_ids must be integers [num_tokens] or [1, num_tokens], at least one, "
            f"got {input_ids.dtype} {tuple(input_ids.shape)}"
        )
    return tokens.long().cpu()


def _check_layers(cache: PagedLatentCache) -> None:
    """Raise UnsupportedError if some layer keeps what cannot be cut to a prefix (linear, sliding) or is not paged."""
    others = {index: layer for index, layer in enumerate(cache.layers) if not isinstance(layer, PagedLatentLayer)}
    if others:
        kinds = ", ".join(sorted({type(layer).__name__ for layer in others.values()}))
        raise UnsupportedError(
            f"{WHERE}: every layer must keep its tokens in pages, {len(others)} of {len(cache.layers)} of "
            f"{cache.group.config.model_type} keep Transformers' own cache ({kinds}: layers {[*others]}), "
            "which holds a state or a window and not each token"
        )


def _check_empty(cache: PagedLatentCache) -> None:
    """Raise ValueError unless a cache holds nothing."""
    held = int(cache.get_seq_length())
    if held:
        raise ValueError(f"{WHERE}.load: into must be an empty cache (reset() it), it holds {held} positions")
