"""The only file that touches Transformers' globals: the name, the mask, `expand_kv`, the cache and the prefill
of `generate`.

Registered on `import flash_mla`; `unregister()` puts everything back. What is wrapped falls through to the original
for every model whose text config does not say "flash_mla".
"""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import nn
from transformers import modeling_utils
from transformers.generation.utils import GenerationMixin
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from ..cache import Latents, PagedLatentCache
from .attention import flash_mla_attention
from .mask import flash_mla_mask
from .models import require_mla
from .new_cache import check_capacity, check_layers, check_options, forget_warnings, new_cache, refuse_options
from .prefill import wrap_prefill

__all__ = ["NAME", "is_registered", "register", "unregister"]

NAME = "flash_mla"
OLDEST = (5, 17)  # latents are cached since 5.15; older versions than this one are not tested

# What was there before, by (owner, attribute): how `unregister` restores it, newest first.
_originals: list[tuple[Any, str, Any]] = []


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
    forget_warnings()
    _seen_types.clear()


def _replace(owner: Any, attribute: str, wrap: Callable[[Any], Any]) -> None:
    original = getattr(owner, attribute)
    _originals.append((owner, attribute, original))
    setattr(owner, attribute, wrap(original))


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
                if self.config is not kv_nope.layer.group.config:  # which made a handle because it says our name
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
            check_capacity(user_cache, generation_config, model_kwargs, max_cache_length)
        if text_config._attn_implementation == NAME:
            family = require_mla(text_config)
            modules = _hook_model(self)
            if isinstance(user_cache, PagedLatentCache):
                check_options(generation_config, user_cache)
                check_layers(user_cache, modules, text_config)
            elif user_cache is not None or generation_config.use_cache is False:
                refuse_options(generation_config, "a cache was given" if user_cache is not None else "use_cache=False")
            else:
                cache = new_cache(
                    self,
                    family.cache,
                    modules,
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
