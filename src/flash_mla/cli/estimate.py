"""What `flash-mla estimate` knows: bytes of a model's weights and of its cache by format, from the config alone.

The model is built on the meta device, which holds shapes and no numbers; a `PagedLatentCache` of its config says which
layers are paged. So nothing is counted from a formula of a family's own.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from transformers import DynamicCache
from transformers.cache_utils import DynamicIndexedLayer, DynamicLayer

from ..bench.shapes import NAMED, named_config
from ..cache import SPARSE_IS_LATENT, PagedIndexedLayer, PagedLatentCache, PagedLatentLayer
from ..codec import COLUMNS_PER_SCALE, row_layout
from ..hf.models import require_mla
from .tables import new_table

__all__ = ["BLOCK_SIZE", "CacheFormat", "Estimate", "cache_formats", "estimate", "meta_model", "read_config", "show"]

BLOCK_SIZE = 64  # tokens per page, the cache's default
RESERVE = 0.1  # of the GPU's memory, unless told: activations, logits, workspaces, the CUDA context


def read_config(model: str) -> Any:
    """Config of a named shape, or of a hub id or a path (remote code is not run).

    Raises: OSError, ValueError: of `AutoConfig`. ImportError: the installed Transformers does not have the shape.
    """
    if model in NAMED:
        return named_config(model)
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(model)


def meta_model(config: Any, dtype: torch.dtype) -> Any:
    """The model of a config on the meta device: modules and shapes, no numbers.

    Raises: ValueError: Transformers has no causal or image-text model for this config.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    for auto in (AutoModelForCausalLM, AutoModelForImageTextToText):
        if type(config) in auto._model_mapping:
            with torch.device("meta"):
                return auto.from_config(copy.deepcopy(config), dtype=dtype, attn_implementation="eager")
    raise ValueError(f"flash-mla estimate: Transformers has no language model for the model type {config.model_type!r}")


@dataclass(frozen=True)
class CacheFormat:
    """One way to cache a token.

    Attributes:
        name: what it is called in the table.
        rows: bytes of a token in each layer that stores keys or latents.
        indexer: bytes of a position in each layer with an indexer of its own. Kept by padded position in every format.
        block_size: tokens per page; 1: no pages, one row per padded position.
    """

    name: str
    rows: list[int]
    indexer: list[int]
    block_size: int = 1

    @property
    def bytes_per_token(self) -> int:
        """Of one token over all counted layers."""
        return sum(self.rows) + sum(self.indexer)

    def bytes_at(self, ctx: int, batch: int) -> int:
        """Bytes of `batch` rows of `ctx` tokens each; of pages, whole ones and the one that each pool keeps spare."""
        slots = batch * ctx
        if self.block_size > 1:
            slots = (batch * -(-ctx // self.block_size) + 1) * self.block_size
        return slots * sum(self.rows) + batch * ctx * sum(self.indexer)


def cache_formats(model: Any, dtype: torch.dtype) -> tuple[list[CacheFormat], dict[str, list[int]], list[str]]:
    """The formats of a model's cache.

    Args:
        model: on any device; `meta_model` will do.
        dtype: of latents, keys and values.
    Returns: the formats; which layers are in none of them, by the class of Transformers' cache layer that they keep;
        and notes.
    Raises: ValueError: no Multi-head Latent Attention.
    """
    text_config = model.config.get_text_config(decoder=True)
    family = require_mla(text_config)
    cache = PagedLatentCache(text_config)
    size, notes = dtype.itemsize, []
    latents, fp8, expanded, indexer = list[int](), list[int | None](), list[int](), list[int]()
    own: dict[str, list[int]] = {}
    is_paged = family.cache == "paged" or (family.cache == "sparse" and SPARSE_IS_LATENT)
    for index, (ours, native) in enumerate(zip(cache.layers, DynamicCache(config=text_config).layers, strict=True)):
        # Before 5.18 the layers of a model with an indexer hold expanded keys and values.
        is_known = (
            isinstance(ours, PagedLatentLayer) if is_paged else type(native) in (DynamicLayer, DynamicIndexedLayer)
        )
        if family.cache == "own" or not is_known:
            own.setdefault(type(native).__name__, []).append(index)
    left_out = {index for indices in own.values() for index in indices}
    for module in model.modules():
        if not hasattr(module, "kv_b_proj") or module.layer_idx in left_out:
            continue
        index_module = getattr(module, "indexer", None)
        if index_module is not None and (not is_paged or isinstance(cache.layers[module.layer_idx], PagedIndexedLayer)):
            indexer.append(index_module.head_dim * size)
        if getattr(module, "is_kv_shared_layer", False):
            continue  # reads another layer's
        rank, rope = module.kv_lora_rank, module.qk_rope_head_dim
        latents.append((rank + rope) * size)
        fp8.append(row_layout(rank, rope).row_bytes if rank % COLUMNS_PER_SCALE == 0 else None)
        expanded.append(module.num_heads * (module.qk_nope_head_dim + rope + module.v_head_dim) * size)
    kind = str(dtype).removeprefix("torch.")
    formats = []
    if is_paged and latents:
        formats.append(CacheFormat(f"paged, {kind}", latents, indexer, BLOCK_SIZE))
        rows = [row for row in fp8 if row is not None]
        if len(rows) == len(fp8):
            formats.append(CacheFormat("paged, fp8", rows, indexer, BLOCK_SIZE))
        else:
            notes.append(f"no FP8 rows: they need a kv_lora_rank that {COLUMNS_PER_SCALE} divides")
        formats.append(CacheFormat(f"Transformers, latents {kind}", latents, indexer))
    elif latents:
        notes.append("latents are cached, and paged, from Transformers 5.18 on")
    if latents:
        formats.append(CacheFormat(f"expanded keys and values, {kind}", expanded, indexer))
    if family.cache == "own":
        notes.append(f"{text_config.model_type} keeps Transformers' own cache: what it takes is not estimated")
    elif own:
        notes.append("layers that keep Transformers' own cache are not counted: batch and context are upper bounds")
    return formats, own, notes


@dataclass(frozen=True)
class Estimate:
    """What `flash-mla estimate` prints.

    Attributes:
        parameters: of the model, tied ones once.
        weights_bytes: parameters and buffers in their dtypes, or what was given instead.
        ctx, batch: tokens per row, rows.
        max_position_embeddings: what the config allows, or None.
        gpu_bytes, reserve_bytes: the GPU's memory and what of it is kept free; None: not asked.
        formats: by format: `name`, `bytes_per_token_and_layer` (each different one), `layers`, `indexer_layers`,
            `bytes_per_token`, `cache_bytes` at `ctx` x `batch`, and of a GPU `largest_batch` at `ctx` and `largest_ctx`
            at `batch` (0: not one fits beside the weights).
        own_layers: layers that are not counted, by the class of Transformers' cache layer.
        notes: what else is to be known.
    """

    model: str
    model_type: str
    dtype: str
    parameters: int
    weights_bytes: int
    ctx: int
    batch: int
    max_position_embeddings: int | None
    gpu_bytes: int | None
    reserve_bytes: int | None
    formats: list[dict[str, Any]]
    own_layers: dict[str, list[int]]
    notes: list[str]


def _largest(free: int, bytes_of: Callable[[int], int]) -> int:
    """The largest number that takes at most `free` bytes, which may be negative; 0 if not even 1 does."""
    if bytes_of(1) > free:
        return 0
    low = 1
    while bytes_of(2 * low) <= free:
        low *= 2
    high = 2 * low
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if bytes_of(middle) <= free else (low, middle)
    return low


def estimate(
    name: str,
    config: Any,
    *,
    ctx: int,
    batch: int,
    dtype: torch.dtype | None = None,
    gpu_mem: float | None = None,
    reserve: float | None = None,
    weights: float | None = None,
) -> Estimate:
    """Bytes of weights and cache, and what fits a GPU.

    Args:
        name: of the model, for the report.
        config: of the model.
        ctx, batch: tokens per row, new ones included, and rows.
        dtype: of weights and cache; default: the config's, else bf16.
        gpu_mem: of one GPU, in GiB.
        reserve: of it kept free for everything else, in GiB; default: a tenth.
        weights: what the weights take, in GiB, where it is known better: quantised, or spread over several GPUs.
    Raises: ValueError: no Multi-head Latent Attention, or numbers below what they can be.
    """
    for what, value, least in (("ctx", ctx, 1), ("batch", batch, 1)):
        if value < least:
            raise ValueError(f"flash-mla estimate: {what} must be at least {least}, got {value}")
    text_config = config.get_text_config(decoder=True)
    require_mla(text_config)
    kind = dtype or getattr(config, "dtype", None) or getattr(text_config, "dtype", None) or torch.bfloat16
    model = meta_model(config, kind)
    formats, own, notes = cache_formats(model, kind)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    tensors = [*model.parameters(), *model.buffers()]
    weights_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    if weights is not None:
        weights_bytes = round(weights * 2**30)
    elif getattr(config, "quantization_config", None) or getattr(text_config, "quantization_config", None):
        notes.append(f"the config says quantised weights; counted as {kind}: give their size with --weights")
    gpu_bytes = reserve_bytes = None
    if gpu_mem is not None:
        gpu_bytes = round(gpu_mem * 2**30)
        reserve_bytes = round((gpu_mem * RESERVE if reserve is None else reserve) * 2**30)
    rows = []
    for one in formats:
        row: dict[str, Any] = {
            "name": one.name,
            "bytes_per_token_and_layer": sorted(set(one.rows)),
            "layers": len(one.rows),
            "indexer_bytes_per_token_and_layer": sorted(set(one.indexer)),
            "indexer_layers": len(one.indexer),
            "bytes_per_token": one.bytes_per_token,
            "cache_bytes": one.bytes_at(ctx, batch),
        }
        if gpu_bytes is not None and reserve_bytes is not None:
            free = gpu_bytes - reserve_bytes - weights_bytes
            row["largest_batch"] = _largest(free, functools.partial(one.bytes_at, ctx))
            row["largest_ctx"] = _largest(free, functools.partial(one.bytes_at, batch=batch))
        rows.append(row)
    return Estimate(
        model=name,
        model_type=text_config.model_type,
        dtype=str(kind).removeprefix("torch."),
        parameters=parameters,
        weights_bytes=weights_bytes,
        ctx=ctx,
        batch=batch,
        max_position_embeddings=getattr(text_config, "max_position_embeddings", None),
        gpu_bytes=gpu_bytes,
        reserve_bytes=reserve_bytes,
        formats=rows,
        own_layers=own,
        notes=notes,
    )


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:,.3g} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:,.3g} MiB"


def show(found: Estimate, console: Console) -> None:
    """Print what `estimate` returned."""
    on_gpu = found.gpu_bytes is not None and found.reserve_bytes is not None
    columns: tuple[str, ...] = (
        "cache",
        "B/token/layer",
        "layers",
        "B/token",
        f"{found.batch:,} x {found.ctx:,} tokens",
    )
    columns += (f"largest batch at {found.ctx:,}", f"largest context at {found.batch:,}") * on_gpu
    rows = new_table(
        f"{found.model} ({found.model_type}): {found.parameters:,} parameters, weights {_gib(found.weights_bytes)}",
        columns,
        1,
    )
    for row in found.formats:
        per_layer = ", ".join(f"{size:,}" for size in row["bytes_per_token_and_layer"])
        if row["indexer_layers"]:
            per_layer += " + " + ", ".join(f"{size:,}" for size in row["indexer_bytes_per_token_and_layer"])
        cells = [row["name"], per_layer, str(row["layers"]), f"{row['bytes_per_token']:,}", _gib(row["cache_bytes"])]
        if on_gpu:
            cells += [f"{row['largest_batch']:,}", f"{row['largest_ctx']:,}"]
        rows.add_row(*cells)
    console.print(rows)

    def line(text: str) -> None:
        console.print(text, highlight=False, soft_wrap=True, markup=False)

    line(f"paged: pages of {BLOCK_SIZE} tokens, real tokens alone; the others: every row as long as the longest")
    for row in found.formats[:1]:
        if row["indexer_layers"]:
            line(f"+: keys of the indexer, in {row['indexer_layers']} layers, by padded position in every format")
    if found.gpu_bytes is not None and found.reserve_bytes is not None:
        line(
            f"largest: beside the weights in {_gib(found.gpu_bytes)}, {_gib(found.reserve_bytes)} of it kept free; "
            f"the config allows {found.max_position_embeddings or 'any number of'} positions"
        )
    for layer, indices in found.own_layers.items():
        line(f"{layer}, not counted: layers {', '.join(map(str, indices))}")
    for note in found.notes:
        line(f"note: {note}")
