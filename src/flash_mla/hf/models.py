"""Which model families run on the paged cache, which keep Transformers' own, and how to tell from a config."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

__all__ = ["FAMILIES", "Family", "family_of", "models_page", "require_mla"]


@dataclass(frozen=True)
class Family:
    """One family of MLA models in Transformers, keyed by the model type of its text config.

    Attributes:
        cache: "paged": absorbed decode on pages; "sparse": the same over the tokens that an indexer chose, from
            Transformers 5.18 on, "own" before; "own": Transformers' own cache and the dense path.
        latent: (kv_lora_rank, qk_rope_head_dim) of the published configs.
        note: what is particular about it, for `docs/models.md`.
    """

    cache: str
    latent: tuple[int, int]
    note: str = ""


_SPARSE = "sparse attention (indexer)"

FAMILIES = {
    "deepseek_v2": Family("paged", (512, 64)),
    "deepseek_v3": Family("paged", (512, 64), "also the text model of kimi_k25"),
    "youtu": Family("paged", (512, 64)),
    "axk1": Family("paged", (512, 64)),
    "glm4_moe_lite": Family("paged", (512, 64), "20 heads, v_head_dim 256"),
    "mistral4": Family("paged", (256, 64), "query scale by position"),
    "minicpm3": Family("paged", (256, 32)),
    "longcat_flash": Family("paged", (512, 64), "two attentions per layer; its experts do not compile into one graph"),
    "kimi_linear": Family("paged", (512, 64), "linear-attention layers keep Transformers' own cache; no rotation"),
    "bailing_hybrid": Family("paged", (512, 64), "linear-attention layers keep Transformers' own cache"),
    "dots3_note_text": Family("paged", (512, 64), "sliding layers keep Transformers' own cache"),
    "deepseek_v32": Family("sparse", (512, 64), _SPARSE),
    "glm_moe_dsa": Family("sparse", (512, 64), _SPARSE),
    "axk2": Family("sparse", (128, 32), _SPARSE),
    "hy_v4": Family("sparse", (512, 64), _SPARSE + "; attention sinks"),
    "mistral_large4_text": Family("sparse", (512, 64), _SPARSE + "; layers share keys and values"),
    "glm5_next_text": Family("own", (512, 0), "reads Transformers' cache layers directly; dense path"),
}


def has_latents(config: Any) -> bool:
    """Whether a text config describes Multi-head Latent Attention in at least one layer."""
    if getattr(config, "model_type", None) in FAMILIES:
        return True
    try:
        return getattr(config, "kv_lora_rank", None) is not None
    except AttributeError:
        return False
    except ValueError:
        # Configs that differ by layer raise on the plain attribute: it exists, only not once for all layers.
        return True


def family_of(config: Any) -> Family | None:
    """The family of a text config; an unlisted one with `kv_lora_rank` is tried on the paged cache, None has no MLA."""
    if not has_latents(config):
        return None
    return FAMILIES.get(config.model_type, Family("paged", (0, 0), "not listed"))


def require_mla(config: Any) -> Family:
    """The family of a text config.

    Raises: ValueError: the config has no `kv_lora_rank`.
    """
    family = family_of(config)
    if family is None:
        raise ValueError(
            'flash_mla: attn_implementation="flash_mla" needs a model with Multi-head Latent Attention, but the '
            f"config of model type {getattr(config, 'model_type', None)!r} has no kv_lora_rank"
        )
    return family


PAGE = """\
# Models

Families by the `model_type` of their text config, as far as the installed Transformers has them. Written by
`python -m flash_mla.hf.models` from the table that the code uses. A model that is not listed but has `kv_lora_rank` in
its text config, `expand_kv` and `kv_b_proj` in its attention modules runs on pages too.

| model type | kv_lora_rank / qk_rope_head_dim | with `attn_implementation="flash_mla"` | note |
|---|---|---|---|
{rows}

Sparse models on Transformers 5.17 cache expanded keys and values: there they keep Transformers' own cache and the dense
path, with the indexer's choice as a mask.

A composite model (kimi_k25, for one) counts by its text model. Its vision tower takes the dense path, packed images one
by one; `attn_implementation={{"text_config": "flash_mla", "vision_config": "sdpa"}}` keeps the tower out of it
altogether. A text config without `kv_lora_rank` is refused with a ValueError that names the field.
"""


def models_page() -> str:
    """The text of `docs/models.md`; `python -m flash_mla.hf.models` prints it."""
    ways = {
        "paged": "paged latents, absorbed decode",
        "sparse": "paged latents, absorbed decode over what the indexer chose (Transformers >= 5.18)",
        "own": "Transformers' own cache, dense path",
    }
    rows = [
        f"| `{name}` | {family.latent[0]} / {family.latent[1]} | {ways[family.cache]} | {family.note} |"
        for name, family in FAMILIES.items()
    ]
    return PAGE.format(rows="\n".join(rows))


if __name__ == "__main__":
    print(models_page(), end="")
