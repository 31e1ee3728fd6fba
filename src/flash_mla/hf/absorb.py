"""W_UK and W_UV of an attention module: the two halves of `kv_b_proj`, as views where that is exact.

Where reading the weight would be wrong (LoRA, quantised, offloaded, hooked) the module is applied to the identity
instead, whatever it does; block-FP8 files of DeepSeek-V3 are dequantised here, since their own forward needs kernels
from the Hub.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from ..cache import PagedLatentLayer

__all__ = ["absorbable", "absorbed_weights", "expanded_by_us"]


def absorbable(module: nn.Module) -> bool:
    """Whether the up-projection is a pure matrix: with a bias, keys would need one more column than the latent has."""
    return getattr(module.kv_b_proj, "bias", None) is None


def _is_plain(linear: Any) -> bool:
    """Whether `linear.weight` is all that its forward applies."""
    return (
        type(linear) is nn.Linear
        and "forward" not in linear.__dict__  # accelerate and tensor parallelism replace it on the instance
        and not hasattr(linear, "_hf_hook")
        and not parametrize.is_parametrized(linear)
        and not linear._forward_hooks
        and not linear._forward_pre_hooks
        and linear.weight.is_floating_point()
        and linear.weight.element_size() > 1
        and linear.weight.device.type != "meta"
        and type(linear.weight) in (nn.Parameter, torch.Tensor)
    )


def _is_block_fp8(linear: Any) -> bool:
    weight = getattr(linear, "weight", None)
    return (
        isinstance(weight, torch.Tensor)
        and weight.dtype == torch.float8_e4m3fn
        and getattr(linear, "weight_scale_inv", None) is not None
    )


def _dequantised(linear: Any, dtype: torch.dtype) -> torch.Tensor:
    """`weight` e4m3 `[out, in]` times `weight_scale_inv` fp32 `[ceil(out / b0), ceil(in / b1)]`, one scale per block.

    Source: the files of DeepSeek-V3 (`quantization_config.weight_block_size`, 128 x 128).
    """
    weight, scale = linear.weight, linear.weight_scale_inv.float()
    rows, columns = getattr(linear, "block_size", None) or (128, 128)
    scale = scale.repeat_interleave(rows, 0)[: weight.shape[0]].repeat_interleave(columns, 1)[:, : weight.shape[1]]
    matrix: torch.Tensor = (weight.float() * scale).to(dtype)
    return matrix


def _applied(linear: nn.Module, kv_lora_rank: int, like: torch.Tensor) -> torch.Tensor:
    """The matrix `[out, kv_lora_rank]` that `linear` applies, found by applying it to the identity."""
    identity = torch.eye(kv_lora_rank, dtype=like.dtype, device=like.device)
    result: torch.Tensor = linear(identity)
    return result.mT


def _adapter_key(linear: Any) -> tuple[Any, ...]:
    """What a stored matrix depends on besides the module: which LoRA adapters act, and how strongly."""
    scaling = getattr(linear, "scaling", None)
    return (
        id(linear),
        tuple(getattr(linear, "active_adapters", ()) or ()),
        bool(getattr(linear, "merged", False)),
        bool(getattr(linear, "disable_adapters", False)),
        tuple(sorted(scaling.items())) if isinstance(scaling, dict) else None,
    )


def _matrix(module: Any, layer: PagedLatentLayer, like: torch.Tensor) -> torch.Tensor:
    linear = module.kv_b_proj
    if _is_plain(linear):
        return linear.weight  # type: ignore[no-any-return]
    key = _adapter_key(linear)
    if layer.absorbed is None or layer.absorbed_key != key:
        with torch.no_grad():
            if _is_block_fp8(linear):
                layer.absorbed = _dequantised(linear, like.dtype)
            else:
                layer.absorbed = _applied(linear, module.kv_lora_rank, like)
        layer.absorbed_key = key
    return layer.absorbed


def absorbed_weights(module: Any, layer: PagedLatentLayer, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """W_UK `[num_heads, qk_nope_head_dim, kv_lora_rank]` and W_UV `[num_heads, v_head_dim, kv_lora_rank]`.

    Args:
        module: an attention module with `kv_b_proj` and its dims.
        layer: keeps the matrix of a module that is not a plain linear layer until the next multi-token forward (the
            weights may have been trained since) or the end of the cache.
        like: gives dtype and device.
    """
    matrix = _matrix(module, layer, like)
    per_head = module.qk_nope_head_dim + module.v_head_dim
    heads = matrix.view(-1, per_head, matrix.shape[-1])
    return heads[:, : module.qk_nope_head_dim], heads[:, module.qk_nope_head_dim :]


def expanded_by_us(
    module: Any, layer: PagedLatentLayer, latent: torch.Tensor, k_rope: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Keys and values of a module whose own `expand_kv` cannot run here (block FP8); None where its own can.

    Args:
        latent: `[batch, 1, positions, kv_lora_rank]`.
        k_rope: `[batch, 1, positions, qk_rope_head_dim]`.
    Returns: key `[batch, num_heads, positions, qk_nope + qk_rope]`, value `[batch, num_heads, positions, v_head_dim]`.
    """
    if not _is_block_fp8(module.kv_b_proj):
        return None
    w_uk, w_uv = absorbed_weights(module, layer, latent)
    key_nope = torch.einsum("bokr,hdr->bhkd", latent, w_uk)
    value = torch.einsum("bokr,hvr->bhkv", latent, w_uv)
    return torch.cat((key_nope, k_rope.expand(-1, key_nope.shape[1], -1, -1)), dim=-1), value
