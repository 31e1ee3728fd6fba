"""Tiny random models of every MLA family, and what the parity tests share.

Weights are drawn per parameter name, so one family has the same weights under every Transformers version. They are
large enough (std 0.35) that tokens vary and a wrong key changes them; the prompts cross the default page of 64 tokens.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers

import flash_mla
from flash_mla.cache import SPARSE_IS_LATENT

# Matrices this small only lose time on several threads, and test workers share the cores already.
torch.set_num_threads(1)

VOCAB = 99
PAD = 0
NEW_TOKENS = 14
# One row ends a page (61 + 3 = 64) during decode, one stays within it, one nearly fills it with the prompt.
PROMPT_LENGTHS = (61, 40, 57)
IMAGE_TOKEN = 98


@dataclass(frozen=True)
class Family:
    """One row of the table: how to build a tiny model and what each of its forwards should do.

    `paged`, `dense` and `sparse` count the text attention modules that take such a path in one forward; sparse ones are
    dense before Transformers 5.18, which cached expanded keys and values for them. `text_type` is the `model_type` that
    `path_counts()` names them by.
    """

    module: str
    config: Callable[..., Any]
    model_class: str
    text_type: str
    paged: int
    dense: int = 0
    sparse: int = 0

    def paths(self, new_tokens: int) -> dict[str, int]:
        """What `generate` of so many tokens counts where even the prompt is attended to sparsely."""
        if SPARSE_IS_LATENT:
            return {"sparse": self.sparse * new_tokens, "dense": self.dense * new_tokens}
        return {"dense": (self.sparse + self.dense) * new_tokens}

    @property
    def missing(self) -> str | None:
        name = f"transformers.models.{self.module}"
        if importlib.util.find_spec(name) is None:
            return f"Transformers {transformers.__version__} has no module {self.module}"
        return None

    def load(self) -> Any:
        return importlib.import_module(f"transformers.models.{self.module}")


TEXT = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "pad_token_id": PAD,
    "bos_token_id": None,
    "eos_token_id": None,
}
MOE = {
    "moe_intermediate_size": 48,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
}
# Every head dimension differs from every other, so that a transposed or swapped one cannot pass.
MLA = {"q_lora_rank": 24, "kv_lora_rank": 32, "qk_nope_head_dim": 20, "qk_rope_head_dim": 8, "v_head_dim": 12}
DSA = {"index_topk": 8, "index_head_dim": 16, "index_n_heads": 8}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}


def _deepseek_v2(m: Any) -> Any:
    return m.DeepseekV2Config(**TEXT, **MOE, **MLA, num_hidden_layers=3, first_k_dense_replace=1)


def _deepseek_v3(m: Any, **more: Any) -> Any:
    return m.DeepseekV3Config(**TEXT, **MOE, **MLA, num_hidden_layers=3, first_k_dense_replace=2, **more)


def _youtu(m: Any) -> Any:
    return m.YoutuConfig(**TEXT, **MLA, num_hidden_layers=3)


def _axk1(m: Any) -> Any:
    return m.AXK1Config(**TEXT, **MOE, **MLA, num_hidden_layers=3)


def _glm4_moe_lite(m: Any) -> Any:
    # 5 heads: not a power of two, as the 20 of the released model.
    return m.Glm4MoeLiteConfig(
        **{**TEXT, "num_attention_heads": 5, "num_key_value_heads": 5}, **MOE, **MLA, num_hidden_layers=3
    )


def mistral4_config(m: Any, **mla: Any) -> Any:
    # The query scale of Llama 4 grows at multiples of the original length, here inside the prompt.
    rope = {**YARN, "original_max_position_embeddings": 16, "llama_4_scaling_beta": 0.1, "max_position_embeddings": 512}
    return m.Mistral4Config(**TEXT, **MOE, **{**MLA, **mla}, num_hidden_layers=3, rope_parameters=rope)


def _minicpm3(m: Any) -> Any:
    return m.MiniCPM3Config(**TEXT, **MLA, num_hidden_layers=3, scale_emb=1, scale_depth=None, dim_model_base=None)


def _longcat_flash(m: Any) -> Any:
    text = {key: value for key, value in TEXT.items() if key != "intermediate_size"}
    return m.LongcatFlashConfig(
        **text,
        **MLA,
        num_layers=2,
        ffn_hidden_size=96,
        expert_ffn_hidden_size=48,
        n_routed_experts=4,
        zero_expert_num=2,
        moe_topk=2,
        head_dim=8,
    )


def _kimi_linear(m: Any) -> Any:
    text = {key: value for key, value in TEXT.items() if key != "max_position_embeddings"}
    moe = {key: value for key, value in MOE.items() if key != "n_routed_experts"}
    return m.KimiLinearConfig(
        **text,
        **moe,
        **{**MLA, "q_lora_rank": None},
        num_local_experts=4,
        num_hidden_layers=4,
        layer_types=["linear_attention", "full_attention"] * 2,
        linear_head_dim=16,
        linear_num_heads=4,
    )


def _bailing_hybrid(m: Any) -> Any:
    text = {key: value for key, value in TEXT.items() if key != "max_position_embeddings"}
    moe = {key: value for key, value in MOE.items() if key != "n_routed_experts"}
    mla = {key: value for key, value in MLA.items() if key != "q_lora_rank"}
    return m.BailingHybridConfig(
        **text, **moe, **mla, num_local_experts=4, num_hidden_layers=4, layer_group_size=2, head_dim=16
    )


def _kimi_k25(m: Any) -> Any:
    text = importlib.import_module("transformers.models.deepseek_v3")
    return m.Kimi_K25Config(
        text_config=_deepseek_v3(text),
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "patch_size": 2,
            "pos_emb_height": 4,
            "pos_emb_width": 4,
        },
        projection_hidden_size=32,
        image_token_id=IMAGE_TOKEN,
        video_token_id=VOCAB,
        tie_word_embeddings=False,
    )


def _dots3_note(m: Any, use_dsa: bool) -> Any:
    sliding = {"num_attention_heads": 4, "num_key_value_heads": 4, "q_lora_rank": 24, "kv_lora_rank": 40}
    sliding |= {"head_dim": 28, "qk_nope_head_dim": 16, "qk_rope_head_dim": 12, "v_head_dim": 12}
    return m.Dots3NoteTextConfig(
        **TEXT,
        **MOE,
        **MLA,
        **DSA,
        **{f"swa_{name}": value for name, value in sliding.items()},
        num_hidden_layers=4,
        layer_types=["full_attention", "sliding_attention"] * 2,
        use_dsa=use_dsa,
        sliding_window_size=16,
        head_dim=28,
        shared_experts_intermediate_size=48,
    )


def _deepseek_v32(m: Any, **more: Any) -> Any:
    options = {**TEXT, **MOE, **MLA, **DSA, "num_hidden_layers": 3, "first_k_dense_replace": 2, **more}
    return m.DeepseekV32Config(**options)


def _glm_moe_dsa(m: Any) -> Any:
    # The second layer reuses the top-k of the first.
    return m.GlmMoeDsaConfig(
        **TEXT,
        **MOE,
        **MLA,
        **DSA,
        num_hidden_layers=3,
        first_k_dense_replace=2,
        indexer_types=["full", "shared", "full"],
    )


def _axk2(m: Any) -> Any:
    return m.AXK2Config(**TEXT, **MOE, **MLA, **DSA, num_hidden_layers=3, gated_norm_rank=8)


def _hy_v4(m: Any, **more: Any) -> Any:
    options = {**TEXT, **MOE, **MLA, **DSA, "num_hidden_layers": 3, "indexer_types": ["full", "shared", "full"], **more}
    return m.HYV4Config(**options)


def _mistral_large4(m: Any) -> Any:
    vision = {"model_type": "pixtral", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    mla = {key: value for key, value in MLA.items() if key != "q_lora_rank"}
    text = m.MistralLarge4TextConfig(
        **TEXT,
        **MOE,
        **mla,
        **DSA,
        num_hidden_layers=4,
        no_rope_layer_interval=2,
        kv_source_layers=[0, 1, 0, 3],  # the third layer reads the first one's latents
        final_logit_softcapping=30.0,
    )
    return m.MistralLarge4Config(
        text_config=text,
        vision_config={**vision, "num_attention_heads": 2, "patch_size": 2, "image_size": 8},
        image_token_index=IMAGE_TOKEN,
    )


def _glm5_next(m: Any) -> Any:
    mla = {**MLA, "qk_rope_head_dim": 0}
    text = m.Glm5NextTextConfig(
        **TEXT,
        **MOE,
        **mla,
        **DSA,
        index_kpool=2,
        num_hidden_layers=4,
        layer_types=["linear_attention", "full_attention"] * 2,  # renamed by the config to what its version calls DSA
        indexer_types=["full"] * 4,
        mlp_layer_types=["dense", "sparse", "dense", "sparse"],
        linear_head_dim=16,
        linear_num_heads=4,
    )
    vision = {"depth": 1, "hidden_size": 32, "num_heads": 2, "intermediate_size": 48, "patch_size": 2, "image_size": 8}
    return m.Glm5NextConfig(
        text_config=text,
        vision_config={**vision, "out_hidden_size": 64, "projection_intermediate_size": 48},
        image_token_id=IMAGE_TOKEN,
    )


PAGED_FAMILIES = {
    "deepseek_v2": Family("deepseek_v2", _deepseek_v2, "DeepseekV2ForCausalLM", "deepseek_v2", 3),
    "deepseek_v3": Family("deepseek_v3", _deepseek_v3, "DeepseekV3ForCausalLM", "deepseek_v3", 3),
    "deepseek_v3_yarn": Family(
        "deepseek_v3", functools.partial(_deepseek_v3, rope_parameters=YARN), "DeepseekV3ForCausalLM", "deepseek_v3", 3
    ),
    "youtu": Family("youtu", _youtu, "YoutuForCausalLM", "youtu", 3),
    "axk1": Family("axk1", _axk1, "AXK1ForCausalLM", "axk1", 3),
    "glm4_moe_lite": Family("glm4_moe_lite", _glm4_moe_lite, "Glm4MoeLiteForCausalLM", "glm4_moe_lite", 3),
    "mistral4": Family("mistral4", mistral4_config, "Mistral4ForCausalLM", "mistral4", 3),
    "minicpm3": Family("minicpm3", _minicpm3, "MiniCPM3ForCausalLM", "minicpm3", 3),
    "longcat_flash": Family("longcat_flash", _longcat_flash, "LongcatFlashForCausalLM", "longcat_flash", 4),
    "kimi_linear": Family("kimi_linear", _kimi_linear, "KimiLinearForCausalLM", "kimi_linear", 2),
    "bailing_hybrid": Family("bailing_hybrid", _bailing_hybrid, "BailingHybridForCausalLM", "bailing_hybrid", 2),
    "kimi_k25": Family("kimi_k25", _kimi_k25, "Kimi_K25ForConditionalGeneration", "deepseek_v3", 3),
    "dots3_note": Family(
        "dots3_note",
        functools.partial(_dots3_note, use_dsa=False),
        "Dots3NoteForCausalLM",
        "dots3_note_text",
        paged=2,
        dense=2,
    ),
}
# Families whose attention picks its keys by an indexer.
SPARSE_FAMILIES = {
    "deepseek_v32": Family("deepseek_v32", _deepseek_v32, "DeepseekV32ForCausalLM", "deepseek_v32", 0, sparse=3),
    "glm_moe_dsa": Family("glm_moe_dsa", _glm_moe_dsa, "GlmMoeDsaForCausalLM", "glm_moe_dsa", 0, sparse=3),
    "axk2": Family("axk2", _axk2, "AXK2ForCausalLM", "axk2", 0, sparse=3),
    "hy_v4": Family("hy_v4", _hy_v4, "HYV4ForCausalLM", "hy_v4", 0, sparse=3),
    "mistral_large4": Family(
        "mistral_large4", _mistral_large4, "MistralLarge4ForConditionalGeneration", "mistral_large4_text", 0, sparse=4
    ),
    "glm5_next": Family("glm5_next", _glm5_next, "Glm5NextForConditionalGeneration", "glm5_next_text", 0, 2),
    "dots3_note_sparse": Family(
        "dots3_note",
        functools.partial(_dots3_note, use_dsa=True),
        "Dots3NoteForCausalLM",
        "dots3_note_text",
        paged=0,
        dense=2,
        sparse=2,
    ),
}
FAMILIES = PAGED_FAMILIES | SPARSE_FAMILIES


def need(name: str) -> Family:
    """The family, or a skip that names the module which this Transformers lacks."""
    family = FAMILIES[name]
    if family.missing:
        pytest.skip(family.missing)
    return family


def draw_weights(model: torch.nn.Module, seed: int) -> None:
    """Overwrite every parameter with values that depend on its name, its shape and `seed` alone."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()) + seed)
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim < 2:
                parameter.add_(0.1 * noise)  # norms stay near 1, biases, gates and sinks near their own start
            else:
                parameter.copy_(0.35 * noise)


def build(name: str, attn: Any = "eager", seed: int = 0, config: Any = None) -> Any:
    """A tiny model of the family, in eval mode, fp32, with the weights of `seed`."""
    family = need(name)
    module = family.load()
    model_class = getattr(module, family.model_class)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # for the decay rates of linear attention, which keep their own start
        model = model_class._from_config(
            family.config(module) if config is None else config, attn_implementation=attn, dtype=torch.float32
        )
    draw_weights(model, seed)
    return model.eval()


def pair(name: str, seed: int = 0) -> tuple[Any, Any]:
    """The same weights twice: (eager, flash_mla)."""
    eager, ours = build(name, "eager", seed), build(name, "flash_mla", seed)
    ours.load_state_dict(eager.state_dict())
    return eager, ours


def prompt(lengths: tuple[int, ...] = PROMPT_LENGTHS, seed: int = 0) -> dict[str, torch.Tensor]:
    """A left-padded batch of random tokens, one row per length; no padding where the lengths are equal."""
    generator = torch.Generator().manual_seed(seed)
    width = max(lengths)
    input_ids = torch.full((len(lengths), width), PAD)
    mask = torch.zeros_like(input_ids)
    for row, length in enumerate(lengths):
        # PAD and IMAGE_TOKEN never occur inside a prompt.
        input_ids[row, width - length :] = torch.randint(PAD + 1, IMAGE_TOKEN, (length,), generator=generator)
        mask[row, width - length :] = 1
    return {"input_ids": input_ids, "attention_mask": mask}


def greedy(model: Any, inputs: dict[str, Any], new_tokens: int = NEW_TOKENS, **more: Any) -> torch.Tensor:
    """Exactly `new_tokens` greedy tokens per row, prompt cut off."""
    options = {"do_sample": False, "max_new_tokens": new_tokens, "min_new_tokens": new_tokens, **more}
    tokens = model.generate(**inputs, **options)
    return tokens[:, -new_tokens:]


def text_type(model: Any) -> str:
    return str(model.config.get_text_config(decoder=True).model_type)


def counted(model_type: str) -> dict[str, int]:
    """Paths counted so far for this model type, zeros left out."""
    return {path: n for (kind, path), n in flash_mla.path_counts().items() if kind == model_type and n}


def assert_paths(model_type: str, **expected: int) -> None:
    """The attention modules of `model_type` took exactly these paths since the counters were reset."""
    assert counted(model_type) == {path: n for path, n in expected.items() if n}


def assert_varied(tokens: torch.Tensor) -> None:
    """The comparison means something: rows differ from each other and no row repeats one token."""
    assert len({tuple(row.tolist()) for row in tokens}) == len(tokens)
    assert all(len(set(row.tolist())) > tokens.shape[1] // 3 for row in tokens), tokens
