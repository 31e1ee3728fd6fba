"""Named model shapes with random weights: which dimensions they have, and how a model is made of them quickly."""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["NAMED", "build_model", "build_named", "layer_config", "named_config"]

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

# The published dimensions of zai-org/GLM-4.7-Flash: 29.9 B parameters, 60 GB in bf16.
GLM_4_7_FLASH: dict[str, Any] = {
    "vocab_size": 154880,
    "hidden_size": 2048,
    "intermediate_size": 10240,
    "moe_intermediate_size": 1536,
    "num_hidden_layers": 47,
    "num_attention_heads": 20,
    "num_key_value_heads": 20,
    "q_lora_rank": 768,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 192,
    "v_head_dim": 256,
    "n_routed_experts": 64,
    "n_shared_experts": 1,
    "num_experts_per_tok": 4,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.8,
    "max_position_embeddings": 202752,
}

# The published dimensions of openbmb/MiniCPM3-4B: 4.1 B parameters, 8 GB in bf16, no experts.
MINICPM3: dict[str, Any] = {
    "vocab_size": 73448,
    "hidden_size": 2560,
    "intermediate_size": 6400,
    "num_hidden_layers": 62,
    "num_attention_heads": 40,
    "num_key_value_heads": 40,
    "q_lora_rank": 768,
    "kv_lora_rank": 256,
    "qk_rope_head_dim": 32,
    "qk_nope_head_dim": 64,
    "v_head_dim": 64,
    "max_position_embeddings": 32768,
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

# Name -> (model type in Transformers, dimensions).
NAMED: dict[str, tuple[str, dict[str, Any]]] = {
    "v2-lite": ("deepseek_v2", V2_LITE),
    "glm-4.7-flash": ("glm4_moe_lite", GLM_4_7_FLASH),
    "minicpm3": ("minicpm3", MINICPM3),
    "tiny": ("deepseek_v2", TINY),
}


def named_config(name: str) -> Any:
    """Config of a named shape.

    Raises: ImportError: the installed Transformers does not have its family.
    """
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    model_type, dims = NAMED[name]
    if model_type not in CONFIG_MAPPING:
        raise ImportError(
            f"flash-mla bench: the shape {name!r} needs a Transformers with the model type {model_type!r}, "
            f"{transformers.__version__} does not have it: pip install -U transformers"
        )
    return CONFIG_MAPPING[model_type](**dims)


def build_named(name: str, *, dtype: torch.dtype, device: torch.device, attn_implementation: str) -> Any:
    """A model of a named shape with random weights, made directly on `device` in `dtype`.

    Raises: ImportError: the installed Transformers does not have its family.
    """
    from transformers import AutoModelForCausalLM

    config = named_config(name)
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
