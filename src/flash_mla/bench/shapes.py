"""Named model shapes with random weights: which dimensions they have, and how a model is made of them quickly."""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["NAMED", "build_model", "build_named", "layer_config"]

# The published dimensions of deepseek-ai/DeepSeek-V2-Lite: 15.7 B parameters, 31 GB in bf16.
V2_LITE: dict[str, Any] = {
    "vocab_size": 102400,
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "moe_intermediate_size": 1408,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "q_lora_rank": None,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "num_experts_per_tok": 6,
    "first_k_dense_replace": 1,
    "topk_method": "greedy",
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 1.0,
    "max_position_embeddings": 163840,
}

# Small enough for a CPU; latents as in the tiny checkpoint, so that every backend takes them.
TINY: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 256,
    "moe_intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": None,
    "kv_lora_rank": 128,
    "qk_rope_head_dim": 32,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "topk_method": "greedy",
    "n_group": 1,
    "topk_group": 1,
    "max_position_embeddings": 65536,
}

NAMED = {"v2-lite": V2_LITE, "tiny": TINY}


def build_named(name: str, *, dtype: torch.dtype, device: torch.device, attn_implementation: str) -> Any:
    """A DeepSeek-V2 model of a named shape with random weights, made directly on `device` in `dtype`."""
    from transformers import AutoModelForCausalLM
    from transformers.models.deepseek_v2 import DeepseekV2Config

    config = DeepseekV2Config(**NAMED[name])
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attn_implementation)
    return model.eval()


def build_model(model: str, *, dtype: torch.dtype, device: torch.device, attn_implementation: str) -> Any:
    """A named random shape, or what `from_pretrained` finds under an id or a path, on one device."""
    if model in NAMED:
        return build_named(model, dtype=dtype, device=device, attn_implementation=attn_implementation)
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=dtype, attn_implementation=attn_implementation)
    return loaded.to(device).eval()


def layer_config(num_heads: int, *, hidden_size: int = 7168, max_position_embeddings: int = 163840) -> Any:
    """Config of one DeepSeek-V3 attention layer with its published dimensions and `num_heads` heads."""
    from transformers.models.deepseek_v3 import DeepseekV3Config

    return DeepseekV3Config(
        vocab_size=128,
        hidden_size=hidden_size,
        intermediate_size=64,
        num_hidden_layers=1,
        first_k_dense_replace=1,
        num_attention_heads=num_heads,
        num_key_value_heads=num_heads,
        q_lora_rank=1536,
        kv_lora_rank=512,
        qk_rope_head_dim=64,
        qk_nope_head_dim=128,
        v_head_dim=128,
        max_position_embeddings=max_position_embeddings,
    )
