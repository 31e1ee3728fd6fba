"""The cache that `generate` works on under "flash_mla": paged where that is right, else Transformers' own, and said so;
and whether a cache that the user brought fits the model and the call.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from transformers.generation.configuration_utils import GenerationMode

from ..cache import SPARSE_IS_LATENT, PagedLatentCache, PagedLatentLayer
from ..contract import UnsupportedError
from .prefill import expect_repeats

__all__ = ["check_capacity", "check_layers", "check_options", "forget_warnings", "new_cache", "refuse_options"]

logger = logging.getLogger(__name__)

_told: set[str] = set()
# What `generate(cache_config=...)` may say about a paged cache: arguments of PagedLatentCache.
OPTIONS = ("backend", "block_size", "dtype")


def forget_warnings() -> None:
    """Say again what is said once per process."""
    _told.clear()


def _warn_once(text: str) -> None:
    if text not in _told:
        _told.add(text)
        logger.warning(text)


def _options(generation_config: Any) -> dict[str, Any]:
    """`cache_config` as arguments of PagedLatentCache.

    Raises: ValueError: no mapping, or a key that it does not have.
    """
    given = generation_config.cache_config
    if given is None or generation_config.is_assistant:  # an assistant is handed the options of its main model
        return {}
    if not isinstance(given, dict):
        raise ValueError(f"flash_mla: cache_config must be a dict of {', '.join(OPTIONS)}, got {type(given).__name__}")
    unknown = sorted(str(key) for key in given if key not in OPTIONS)
    if unknown:
        raise ValueError(
            f"flash_mla: cache_config of a paged cache takes {', '.join(OPTIONS)}, got {', '.join(unknown)}"
            " (Transformers' quantized cache has other keys: cache_implementation='quantized')"
        )
    return {**given}


def refuse_options(generation_config: Any, why: str) -> None:
    """Raise ValueError if `cache_config` is given where no paged cache is made, so that nothing takes its place unsaid.

    Transformers' own caches read it, or do not, as they like. An assistant is handed the options of its main model.
    """
    if generation_config.is_assistant:
        return
    if generation_config.cache_config and generation_config.cache_implementation in (None, "dynamic", "static"):
        raise ValueError(
            f"flash_mla: cache_config={generation_config.cache_config} is for the paged cache that generate() makes, "
            f"and it makes none here: {why}"
        )


def check_options(generation_config: Any, cache: PagedLatentCache) -> None:
    """Raise ValueError if `cache_config` asks for another cache than the paged one that was given (a second turn's)."""
    has = {"backend": cache.group.backend, "block_size": cache.block_size, "dtype": cache.dtype}
    for name, value in _options(generation_config).items():
        if value != has[name]:
            raise ValueError(
                f"flash_mla: cache_config asks for {name}={value!r}, the cache that was given has {has[name]!r}"
            )


def new_cache(
    model: Any,
    kind: str,
    modules: list[Any],
    text_config: Any,
    generation_config: Any,
    generation_mode: Any,
    batch_size: int,
    max_cache_length: int,
) -> PagedLatentCache | None:
    """The paged cache that `generate` is to use, or None where Transformers' own is the right one.

    Args:
        model: the model.
        kind: of its family: "paged", "sparse" or "own".
        modules: its attention modules that have `expand_kv` and `kv_b_proj`.
        text_config: its text config.
        generation_config, generation_mode, batch_size, max_cache_length: as `generate` has them.
    Raises: ValueError: a bad `cache_config`, or one where no paged cache is made. UnsupportedError: assisted decoding
        with a fixed capacity.
    """
    implementation = generation_config.cache_implementation
    if kind == "own" or (kind == "sparse" and not SPARSE_IS_LATENT):
        refuse_options(generation_config, f"{text_config.model_type} keeps Transformers' own cache")
        _warn_once(
            f"flash_mla: {text_config.model_type} keeps Transformers' own cache and the dense attention path"
            + ("" if kind == "own" else "; sparse attention on pages needs Transformers 5.18")
        )
        return None
    if implementation not in (None, "dynamic", "static"):
        logger.info("flash_mla: cache_implementation=%r is Transformers' own, dense path", implementation)
        return None
    if not modules:
        refuse_options(generation_config, f"{type(model).__name__} has no attention module that flash_mla knows")
        _warn_once(
            f"flash_mla: {type(model).__name__} has no attention module with expand_kv and kv_b_proj; "
            "Transformers' own cache and the dense path are used"
        )
        return None
    options = _options(generation_config)
    repeats = max(generation_config.num_beams or 1, generation_config.num_return_sequences or 1)
    if implementation != "static":
        growing = PagedLatentCache(text_config, prompt_repeats=repeats, **options)
        expect_repeats(growing, repeats)
        return _told_of_assistant(growing, generation_config)
    if generation_mode == GenerationMode.ASSISTED_GENERATION:
        raise UnsupportedError("flash_mla: assisted decoding needs a growing cache, got cache_implementation='static'")
    # Transformers' rule for its StaticCache: never smaller than in an earlier call, so that nothing is recompiled.
    capacity = max(
        max_cache_length, generation_config.max_cache_len or -1, getattr(model, "_previous_max_cache_length", -1)
    )
    model._previous_max_cache_length = capacity
    cache = PagedLatentCache(text_config, max_cache_len=capacity, **options)
    cache = _told_of_assistant(cache, generation_config)
    if generation_config.prefill_chunk_size is not None:
        # A chunked prefill may be compiled: the pools must be there before its graph is traced.
        _reserve(cache, modules, model.dtype, batch_size * repeats)
    return cache


def _reserve(cache: PagedLatentCache, modules: list[Any], dtype: torch.dtype, batch: int) -> None:
    """Make the pools of the paged layers of these attention modules."""
    for module in modules:
        if getattr(module, "is_kv_shared_layer", False):  # its tokens are in the pages of the layer that it reads
            continue
        layer = cache.layers[module.layer_idx]
        parameter = next(module.kv_b_proj.parameters(), None)
        if isinstance(layer, PagedLatentLayer) and parameter is not None and parameter.device.type != "meta":
            latent = torch.empty((batch, 1, 0, module.kv_lora_rank), dtype=dtype, device=parameter.device)
            layer.lazy_initialization(latent, latent.new_empty((batch, 1, 0, module.qk_rope_head_dim)))


def _told_of_assistant(cache: PagedLatentCache, generation_config: Any) -> PagedLatentCache:
    if generation_config.is_assistant:  # its linear layers must be able to roll back
        cache.activate_past_recording()
    return cache


def check_layers(cache: PagedLatentCache, modules: list[Any], text_config: Any) -> None:
    """Raise ValueError if a cache has fewer layers than the model, or dims of another one; let it follow its config."""
    needed = 1 + max((module.layer_idx for module in modules), default=-1)
    if needed > len(cache.layers):
        raise ValueError(
            f"flash_mla: the cache has {len(cache.layers)} layers, the model {needed}: a cache of another model?"
        )
    for module in modules:
        rank = cache.group.kv_lora_ranks[module.layer_idx]
        if rank is not None and rank != module.kv_lora_rank:
            raise ValueError(
                f"flash_mla: layer {module.layer_idx} of the cache is for kv_lora_rank={rank}, the model's has "
                f"{module.kv_lora_rank}: a cache of another model?"
            )
    # A cache made from an equal config follows the model that it is used with, e.g. through set_attn_implementation.
    cache.group.config = text_config


def check_capacity(
    cache: PagedLatentCache, generation_config: Any, model_kwargs: dict[str, Any], max_cache_length: int
) -> None:
    """Raise ValueError before prefill if a fixed cache cannot take what `generate` may store."""
    if cache.max_cache_len is None:
        return
    past = int(cache.get_seq_length())
    needed = max_cache_length
    mask = model_kwargs.get("attention_mask")
    mask_length = mask.shape[1] if mask is not None else getattr(generation_config, "_mask_length", 0)
    if past and generation_config.max_new_tokens is not None:
        # `max_length` counts the ids given to this call; where only the new ones were, the mask is longer than they.
        given = generation_config.max_length - generation_config.max_new_tokens
        needed += max(0, mask_length - given)
    if needed > cache.max_cache_len:
        raise ValueError(
            f"flash_mla: generate() may store {needed} positions ({past} are in the cache), "
            f"but the cache was made with max_cache_len={cache.max_cache_len}"
        )
