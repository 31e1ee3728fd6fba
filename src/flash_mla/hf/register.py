"""The only file that touches Transformers' globals: the name, the mask, `expand_kv`, the cache and the prefill
of `generate`.

Registered on `import flash_mla`; `unregister()` puts everything back. What is wrapped falls through to the original
for every model whose text config does not say "flash_mla".
"""

from __future__ import annotations

import functools
import logging
import re
import sys
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import nn
from transformers import modeling_utils
from transformers.generation.configuration_utils import GenerationMode
from transformers.generation.utils import GenerationMixin
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from ..cache import Latents, PagedLatentCache, PagedLatentLayer
from ..contract import UnsupportedError
from .attention import flash_mla_attention
from .mask import flash_mla_mask
from .models import require_mla
from .prefill import expect_repeats, wrap_prefill

__all__ = ["NAME", "is_registered", "register", "unregister"]

NAME = "flash_mla"
OLDEST = (5, 17)  # latents are cached since 5.15; older versions than this one are not tested

logger = logging.getLogger(__name__)

# What was there before, by (owner, attribute): how `unregister` restores it, newest first.
_originals: list[tuple[Any, str, Any]] = []
_told: set[str] = set()


def _version_gate() -> None:
    found = tuple(int(part) for part in re.findall(r"\d+", transformers.__version__)[:2])
    if found < OLDEST:
        needed = ".".join(map(str, OLDEST))
        raise ImportError(f"flash_mla needs transformers >= {needed}, found {transformers.__version__}")


def is_registered() -> bool:
    """Whether "flash_mla" is a name that Transformers knows."""
    return bool(_originals)


def register() -> None:
    """Make `attn_implementation="flash_mla"` known to Transformers. Does nothing if it is.

    Raises: ImportError: Transformers is older than 5.17.
    """
    if is_registered():
        return
    _version_gate()
    AttentionInterface.register(NAME, flash_mla_attention)
    AttentionMaskInterface.register(NAME, flash_mla_mask_hooked)
    _replace(modeling_utils, "lazy_import_flash_attention", _wrap_flash_import)
    _replace(GenerationMixin, "_prepare_cache_for_generation", _wrap_prepare_cache)
    _replace(GenerationMixin, "_prefill", wrap_prefill)


def unregister() -> None:
    """Put Transformers back as it was. Models that still run "flash_mla" fail in their next forward."""
    while _originals:
        owner, attribute, original = _originals.pop()
        setattr(owner, attribute, original)
    AttentionInterface._global_mapping.pop(NAME, None)
    AttentionMaskInterface._global_mapping.pop(NAME, None)
    _told.clear()
    _seen_types.clear()


def _replace(owner: Any, attribute: str, wrap: Callable[[Any], Any]) -> None:
    original = getattr(owner, attribute)
    _originals.append((owner, attribute, original))
    setattr(owner, attribute, wrap(original))


def _warn_once(text: str) -> None:
    if text not in _told:
        _told.add(text)
        logger.warning(text)


# --- the name ---------------------------------------------------------------------------------------------------------


def _wrap_flash_import(original: Callable[..., Any]) -> Callable[..., Any]:
    """A name containing "flash" makes Transformers look for a flash-attention package of that name: not for ours."""

    @functools.wraps(original)
    def lazy_import_flash_attention(implementation: str | None, *args: Any, **kwargs: Any) -> Any:
        if implementation != NAME:
            return original(implementation, *args, **kwargs)
        # A model is being built with, or switched to, our name, so its modeling file is loaded.
        _hook_loaded_modules()
        return None

    return lazy_import_flash_attention


# --- expand_kv --------------------------------------------------------------------------------------------------------


def _hook_class(owner: type) -> None:
    """Let `expand_kv` of an attention class pass the paged cache's handle through."""
    if not isinstance(owner.__dict__.get("expand_kv"), type(_hook_class)):
        return
    if any(entry[0] is owner and entry[1] == "expand_kv" for entry in _originals):
        return

    def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def expand_kv(self: nn.Module, kv_nope: Any, k_rot: Any, *args: Any, **kwargs: Any) -> Any:
            if type(kv_nope) is Latents:
                _check_attention(self)
                return kv_nope, kv_nope
            return original(self, kv_nope, k_rot, *args, **kwargs)

        return expand_kv

    _replace(owner, "expand_kv", wrap)
    derived: type
    for derived in owner.__subclasses__():
        _hook_class(derived)


def _check_attention(module: Any) -> None:
    attention = module.config._attn_implementation
    if attention != NAME:
        raise ValueError(
            f"flash_mla: a PagedLatentCache whose config says attn_implementation={NAME!r} was given to a model that "
            f"runs {attention!r}; make the cache with that model's own config"
        )


def _hook_loaded_modules() -> None:
    """Hook every MLA class of the modeling files loaded so far, Transformers' own and remote code alike."""
    for name, loaded in list(sys.modules.items()):
        if name.startswith(("transformers.models.", "transformers_modules.")) and ".modeling_" in name:
            for value in list(vars(loaded).values()):
                if isinstance(value, type) and value.__module__ == name:
                    _hook_class(value)


def _hook_model(model: nn.Module) -> list[Any]:
    """Hook the MLA classes of one model; returns its attention modules that have one."""
    found = [
        module for module in model.modules() if hasattr(type(module), "expand_kv") and hasattr(module, "kv_b_proj")
    ]
    for module in found:
        for owner in type(module).__mro__:
            _hook_class(owner)
    return found


_seen_types: set[str] = set()


@functools.wraps(flash_mla_mask)
def flash_mla_mask_hooked(*args: Any, **kwargs: Any) -> Any:
    """`flash_mla_mask`. It comes before attention in every forward, so a config that was set by hand is noticed too."""
    model_type = getattr(kwargs.get("config"), "model_type", "")
    if not torch.compiler.is_compiling() and model_type not in _seen_types:
        _seen_types.add(model_type)
        _hook_loaded_modules()
    return flash_mla_mask(*args, **kwargs)


# --- generate ---------------------------------------------------------------------------------------------------------


def _wrap_prepare_cache(original: Callable[..., Any]) -> Callable[..., Any]:
    """Where `generate` would make a DynamicCache or StaticCache for a "flash_mla" model, make a paged one."""

    @functools.wraps(original)
    def _prepare_cache_for_generation(
        self: Any,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> Any:
        text_config = self.config.get_text_config(decoder=True)
        user_cache = model_kwargs.get("past_key_values")
        if isinstance(user_cache, PagedLatentCache):
            _check_capacity(user_cache, generation_config, model_kwargs, max_cache_length)
        if text_config._attn_implementation == NAME:
            family = require_mla(text_config)
            if isinstance(user_cache, PagedLatentCache):
                _check_layers(user_cache, _hook_model(self), text_config)
            elif user_cache is None and generation_config.use_cache is not False:
                cache = _make_cache(
                    self,
                    family.cache,
                    text_config,
                    generation_config,
                    generation_mode,
                    batch_size,
                    max_cache_length,
                )
                if cache is not None:
                    model_kwargs["past_key_values"] = cache
                    return None
        return original(self, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length)

    return _prepare_cache_for_generation


def _make_cache(
    model: Any,
    kind: str,
    text_config: Any,
    generation_config: Any,
    generation_mode: Any,
    batch_size: int,
    max_cache_length: int,
) -> PagedLatentCache | None:
    """The paged cache that `generate` is to use, or None where Transformers' own is the right one (said out loud)."""
    implementation = generation_config.cache_implementation
    if kind == "own":
        _warn_once(
            f"flash_mla: {text_config.model_type} keeps Transformers' own cache and the dense attention path; "
            "sparse attention on pages is not there yet"
        )
        return None
    if implementation not in (None, "dynamic", "static"):
        logger.info("flash_mla: cache_implementation=%r is Transformers' own, dense path", implementation)
        return None
    modules = _hook_model(model)
    if not modules:
        _warn_once(
            f"flash_mla: {type(model).__name__} has no attention module with expand_kv and kv_b_proj; "
            "Transformers' own cache and the dense path are used"
        )
        return None
    repeats = max(generation_config.num_beams or 1, generation_config.num_return_sequences or 1)
    if implementation != "static":
        growing = PagedLatentCache(text_config, prompt_repeats=repeats)
        expect_repeats(growing, repeats)
        return _told_of_assistant(growing, generation_config)
    if generation_mode == GenerationMode.ASSISTED_GENERATION:
        raise UnsupportedError("flash_mla: assisted decoding needs a growing cache, got cache_implementation='static'")
    # Transformers' rule for its StaticCache: never smaller than in an earlier call, so that nothing is recompiled.
    capacity = max(
        max_cache_length, generation_config.max_cache_len or -1, getattr(model, "_previous_max_cache_length", -1)
    )
    model._previous_max_cache_length = capacity
    cache = _told_of_assistant(PagedLatentCache(text_config, max_cache_len=capacity), generation_config)
    if generation_config.prefill_chunk_size is not None:
        # A chunked prefill may be compiled: the pools must be there before its graph is traced.
        _reserve(cache, modules, model.dtype, batch_size * repeats)
    return cache


def _reserve(cache: PagedLatentCache, modules: list[Any], dtype: torch.dtype, batch: int) -> None:
    """Make the pools of the paged layers of these attention modules."""
    for module in modules:
        layer = cache.layers[module.layer_idx]
        parameter = next(module.kv_b_proj.parameters(), None)
        if isinstance(layer, PagedLatentLayer) and parameter is not None and parameter.device.type != "meta":
            latent = torch.empty((batch, 1, 0, module.kv_lora_rank), dtype=dtype, device=parameter.device)
            layer.lazy_initialization(latent, latent.new_empty((batch, 1, 0, module.qk_rope_head_dim)))


def _told_of_assistant(cache: PagedLatentCache, generation_config: Any) -> PagedLatentCache:
    if generation_config.is_assistant:  # its linear layers must be able to roll back
        cache.activate_past_recording()
    return cache


def _check_layers(cache: PagedLatentCache, modules: list[Any], text_config: Any) -> None:
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


def _check_capacity(
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
