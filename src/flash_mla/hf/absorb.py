"""W_UK and W_UV of an attention module: the two halves of `kv_b_proj`, as views where that is exact.

Where reading the weight would be wrong (LoRA, quantised, offloaded, hooked) the module is applied to the identity
instead, whatever it does; block-FP8 files of DeepSeek-V3 are dequantised here, since their own forward needs kernels
from the Hub.
"""

from __future__ import annotations

from typing import Any

import torch
from accelerate.utils import align_module_device
from torch import nn
from torch.nn.utils import parametrize

from ..cache import PagedLatentLayer

__all__ = ["absorbed_query", "absorbed_weights", "expand", "unabsorbed"]


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
    """`weight` e4m3 `[out, in]` times `weight_scale_inv`: one fp32 scale, or one per block `[out / b0, in / b1]`.

    Source: the files of DeepSeek-V3 (`quantization_config.weight_block_size`, 128 x 128).
    """
    with align_module_device(linear):  # an offloaded weight is on the meta device between calls
        weight, scale = linear.weight, linear.weight_scale_inv.float()
        if scale.numel() > 1:
            rows, columns = getattr(linear, "block_size", None) or (128, 128)
            scale = scale.repeat_interleave(rows, 0)[: weight.shape[0]]
            scale = scale.repeat_interleave(columns, 1)[:, : weight.shape[1]]
        matrix: torch.Tensor = (weight.float() * scale).to(dtype)
    return matrix


def _applied(linear: nn.Module, kv_lora_rank: int, like: torch.Tensor) -> torch.Tensor | None:
    """The matrix `[out, kv_lora_rank]` that `linear` applies, found by applying it to the identity.

    None if it adds something besides (a bias, an adapter's too): keys would need one more column than the latent has.
    """
    probe = torch.eye(kv_lora_rank + 1, kv_lora_rank, dtype=like.dtype, device=like.device)
    result: torch.Tensor = linear(probe)
    # The last row of the probe is zero. While compiling nothing can be asked: such a matrix was made before, eagerly.
    if not torch.compiler.is_compiling() and bool(result[-1].any()):
        return None
    return result[:-1].mT


def _key(linear: Any) -> tuple[Any, ...]:
    """What a stored matrix depends on: the module, its numbers, and which LoRA adapters act, how strongly."""
    scaling = getattr(linear, "scaling", None)
    tensors = (*linear.parameters(), *linear.buffers())
    return (
        id(linear),
        tuple((tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version) for tensor in tensors),
        tuple(getattr(linear, "active_adapters", ()) or ()),
        bool(getattr(linear, "merged", False)),
        bool(getattr(linear, "disable_adapters", False)),
        tuple(sorted(scaling.items())) if isinstance(scaling, dict) else None,
    )


def _matrix(module: Any, layer: PagedLatentLayer, like: torch.Tensor) -> torch.Tensor | None:
    linear = module.kv_b_proj
    if _is_plain(linear):
        return linear.weight if linear.bias is None else None
    if getattr(linear, "_forward_pre_hooks_with_kwargs", None):
        return None  # PEFT's adapter_names: another adapter for each row of the batch, so no one matrix
    kept_key, matrix = layer.absorbed.get(module.layer_idx, (None, None))
    if torch.compiler.is_compiling() and kept_key is not None:
        return matrix
    key = _key(linear)
    if kept_key != key:
        with torch.no_grad():
            if not _is_block_fp8(linear):
                matrix = _applied(linear, module.kv_lora_rank, like)
            else:
                matrix = _dequantised(linear, like.dtype) if getattr(linear, "bias", None) is None else None
        layer.absorbed[module.layer_idx] = (key, matrix)
    return matrix


def absorbed_weights(
    module: Any, layer: PagedLatentLayer, like: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """W_UK `[num_heads, qk_nope_head_dim, kv_lora_rank]` and W_UV `[num_heads, v_head_dim, kv_lora_rank]`.

    Args:
        module: an attention module with `kv_b_proj` and its dims.
        layer: keeps the matrix of a module that is not a plain linear layer, until its numbers or its adapters change,
            a new prompt comes, or the cache ends.
        like: gives dtype and device.
    Returns: None if the up-projection is not one matrix (a bias, or adapters that differ from row to row).
    """
    matrix = _matrix(module, layer, like)
    if matrix is None:
        return None
    per_head = module.qk_nope_head_dim + module.v_head_dim
    heads = matrix.view(-1, per_head, matrix.shape[-1])
    return heads[:, : module.qk_nope_head_dim], heads[:, module.qk_nope_head_dim :]


def _expanded_by_us(
    module: Any, layer: PagedLatentLayer, latent: torch.Tensor, k_rope: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Keys and values of a module whose own `expand_kv` cannot run here (block FP8); None where its own can.

    Args:
        latent: `[batch, 1, positions, kv_lora_rank]`.
        k_rope: `[batch, 1, positions, qk_rope_head_dim]`.
    Returns: key `[batch, num_heads, positions, qk_nope + qk_rope]`, value `[batch, num_heads, positions, v_head_dim]`.
    """
    weights = absorbed_weights(module, layer, latent) if _is_block_fp8(module.kv_b_proj) else None
    if weights is None:
        return None
    w_uk, w_uv = weights
    key_nope = torch.einsum("bokr,hdr->bhkd", latent, w_uk)
    value = torch.einsum("bokr,hvr->bhkv", latent, w_uv)
    return torch.cat((key_nope, k_rope.expand(-1, key_nope.shape[1], -1, -1)), dim=-1), value


def expand(
    module: Any, layer: PagedLatentLayer, latent: torch.Tensor, k_rope: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of some latents, by the module's own `expand_kv` where it can run."""
    ours = _expanded_by_us(module, layer, latent, k_rope)
    if ours is not None:
        return ours
    key, value = module.expand_kv(latent, k_rope)
    return key, value


def absorbed_query(query: torch.Tensor, w_uk: torch.Tensor, qk_nope_head_dim: int) -> torch.Tensor:
    """`[batch, seqlen_q, num_heads, kv_lora_rank + qk_rope_head_dim]`: the part without position times W_UK."""
    q_nope, q_rope = query.split((qk_nope_head_dim, query.shape[-1] - qk_nope_head_dim), dim=-1)
    q_latent = torch.einsum("bhsd,hdr->bshr", q_nope, w_uk.to(q_nope.dtype))
    return torch.cat((q_latent, q_rope.transpose(1, 2)), dim=-1)


def unabsorbed(out: torch.Tensor, w_uv: torch.Tensor) -> torch.Tensor:
    """`out` `[batch, seqlen_q, num_heads, kv_lora_rank]` times W_UV."""
    return torch.einsum("bshr,hvr->bshv", out, w_uv.to(out.dtype))
