"""Models with an indexer on a GPU: the tokens of eager in fp32, and logits over the rows that its kernels read.

Faults it must catch: another path or another backend than the one meant for these rows, positions taken for rows of the
pool on the device, sinks or the indexer's choice forgotten, FP8 rows written or read with wrong scales, slots that a
replayed graph keeps from its capture.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
import transformers
from cases import ON_HOPPER
from tiny_models import (
    NEW_TOKENS,
    SPARSE_FAMILIES,
    assert_paths,
    assert_varied,
    build,
    counted,
    greedy,
    need,
    pair,
    prompt,
)
from transformers import DynamicCache

import flash_mla
from flash_mla import PagedLatentCache
from flash_mla.cache import SPARSE_IS_LATENT
from flash_mla.codec import decode_rows, encode_rows
from flash_mla.hf import sparse

if not ON_HOPPER:
    pytest.skip("needs Hopper: the compiled kernels are for nothing else", allow_module_level=True)
if not SPARSE_IS_LATENT:
    pytest.skip(
        f"Transformers {transformers.__version__} has no latents in the cache of a model with an indexer",
        allow_module_level=True,
    )
from transformers.cache_utils import DynamicIndexedLayer

DEVICE = "cuda"
FAMILIES = ["deepseek_v32", "glm_moe_dsa", "axk2", "hy_v4", "mistral_large4"]
RANK, ROPE = 512, 64  # what the compiled kernel over FP8 rows takes
LAYERS, PROMPT, STEPS = 3, 70, 12
FP8 = {"dtype": "fp8", "block_size": 64}
# Its ten bits would let no two ways to the same logits agree.
torch.backends.cuda.matmul.allow_tf32 = False


def on_device(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.to(DEVICE) for name, tensor in inputs.items()}


class Launches:
    """Calls of an op since this was made, by backend; counters of launches are the process's and never reset."""

    def __init__(self) -> None:
        self.before = Counter(flash_mla.backend_counts())

    def of(self, op: str) -> dict[str, int]:
        since = Counter(flash_mla.backend_counts()) - self.before
        return {backend: count for (name, backend), count in since.items() if name == op}


# --- fp32: eager's tokens ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("more", [{}, {"cache_implementation": "static"}], ids=["growing", "static"])
@pytest.mark.parametrize("name", FAMILIES)
def test_tokens_are_those_of_eager(name: str, more: dict[str, Any]) -> None:
    """The whole way through `generate` on left-padded rows, prompts sparse too, by the definition in torch: Triton has
    no fp32 on a GPU. A slot, a mask or a position that differs from what the CPU makes of it changes tokens. Static
    caches uncompiled: a graph has a test of its own below."""
    family = need(name)
    eager, ours = (model.to(DEVICE) for model in pair(name))
    inputs = on_device(prompt())
    wanted = greedy(eager, inputs, **more, disable_compile=True)
    assert_varied(wanted)
    flash_mla.reset_path_counts()
    launches = Launches()
    assert greedy(ours, inputs, **more, disable_compile=True).tolist() == wanted.tolist()
    assert_paths(family.text_type, sparse=family.sparse * NEW_TOKENS)
    assert launches.of("sparse_decode") == {"torch": family.sparse * NEW_TOKENS}
    assert launches.of("decode") == {}


def test_compiled_tokens_are_those_of_eager() -> None:
    """Inductor and CUDA graphs, twice: replays that read the slots or lengths of another step say other tokens, and so
    does a second cache that is not the one the graph was recorded over."""
    eager, ours = (model.to(DEVICE) for model in pair("deepseek_v32"))
    inputs, static = on_device(prompt()), {"cache_implementation": "static"}
    wanted = greedy(eager, inputs, **static, disable_compile=True)
    torch._dynamo.reset()
    launches = Launches()
    for _ in range(2):
        flash_mla.reset_path_counts()
        assert greedy(ours, inputs, **static).tolist() == wanted.tolist()
        assert set(counted("deepseek_v32")) == {"sparse"}
        assert set(launches.of("sparse_decode")) == {"torch"}


# --- 512 + 64 columns in bf16: logits ---------------------------------------------------------------------------------


def model_of(name: str, dtype: torch.dtype, attn: str, index_topk: int) -> Any:
    """A tiny model with the published latents, in weights that every dtype can hold.

    Its layers are dense: which expert is chosen is a step function, and a rounding error would decide. Sinks are large
    enough to take a good part of each softmax.
    """
    family = SPARSE_FAMILIES[name]
    changes: dict[str, Any] = {"kv_lora_rank": RANK, "qk_rope_head_dim": ROPE, "index_head_dim": 96}
    if name == "hy_v4":
        changes |= {"mlp_layer_types": ["dense"] * LAYERS, "learnable_sink_init": 6.0}
    else:
        changes |= {"first_k_dense_replace": LAYERS}
    model = build(name, attn, config=family.config(family.load(), **changes, index_topk=index_topk))
    with torch.no_grad():
        for layer in model.model.layers:  # keys and values as large as those of the 32 columns that `build` has in mind
            layer.self_attn.kv_b_proj.weight.mul_((32 / RANK) ** 0.5)
    return model.to(torch.bfloat16).to(dtype).to(DEVICE)


def plain_attention(name: str) -> str:
    # Not eager: its softmax is in fp32, where a mask's fp64 minimum is -inf, so padded rows become NaN. SDPA has no
    # sinks, and the eager attention that has them computes its softmax in the dtype of the model.
    return "eager" if name == "hy_v4" else "sdpa"


class ThroughTheCodec(DynamicIndexedLayer):
    """Latents rounded as FP8 rows when they are stored."""

    prompt_sees_itself_unrounded = True

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        is_prompt = not self.get_seq_length()
        rows = encode_rows(key_states, value_states)
        stored = super().update(*decode_rows(rows, RANK, ROPE, key_states.dtype), *args, **kwargs)
        return (key_states, value_states) if is_prompt and self.prompt_sees_itself_unrounded else stored


def rounding_cache(config: Any, prompt_sees_itself_unrounded: bool = True) -> DynamicCache:
    cache = DynamicCache(config=config)
    cache.layers = [ThroughTheCodec() for _ in cache.layers]
    for layer in cache.layers:
        layer.prompt_sees_itself_unrounded = prompt_sees_itself_unrounded
    return cache


@torch.no_grad()
def forced_logits(
    model: Any, tokens: dict[str, torch.Tensor], cache: Any, choices: list[torch.Tensor] | None = None
) -> torch.Tensor:
    """Logits of the last prompt position and of every following token, given one by one.

    Args:
        choices: what the indexers chose, in the order of their calls: noted if empty, else what this model's attend to
            as well, since top-k of rounded scores is a step function. None: each model by its own.
    """
    notes = choices is not None and not choices
    left = list(choices or ())

    def hook(module: Any, arguments: Any, chosen: torch.Tensor) -> torch.Tensor:
        if choices is None:
            return chosen
        if notes:
            choices.append(chosen)
            return chosen
        assert left[0].shape == chosen.shape
        return left.pop(0)

    indexers = [module for module in model.modules() if type(module).__name__.endswith("Indexer")]
    hooks = [indexer.register_forward_hook(hook) for indexer in indexers]
    assert hooks
    ids, mask = tokens["input_ids"], tokens["attention_mask"]
    logits = []
    for begin, end in [(0, PROMPT), *((end - 1, end) for end in range(PROMPT + 1, ids.shape[1] + 1))]:
        out = model(ids[:, begin:end], attention_mask=mask[:, :end], past_key_values=cache, use_cache=True)
        logits.append(out.logits[:, -1])
    for handle in hooks:
        handle.remove()
    assert not left
    return torch.stack(logits, 1).double()


def assert_close_to(ours: torch.Tensor, plain: torch.Tensor, exact: torch.Tensor) -> None:
    assert bool(ours.isfinite().all())
    error, yardstick = (ours - exact).norm().item(), (plain - exact).norm().item()
    # Else what is allowed would be no smaller than half of the logits, and much of them could be wrong.
    assert 4 * yardstick <= exact.norm().item()
    assert error <= 2 * yardstick, f"error {error:.3e}, plain attention in bf16 has {yardstick:.3e}"


@pytest.mark.parametrize("max_cache_len", [None, 192], ids=["growing", "fixed"])
@pytest.mark.parametrize("prompt_is_expanded", [True, False], ids=["prompt expanded", "prompt sparse"])
@pytest.mark.parametrize(("rows", "backend"), [("fp8", "cuda"), (None, "triton")], ids=["fp8", "bf16"])
@pytest.mark.parametrize("name", ["deepseek_v32", "hy_v4"])
def test_logits_are_no_further_from_fp64_than_twice_plain_attention(
    name: str,
    rows: str | None,
    backend: str,
    prompt_is_expanded: bool,
    max_cache_len: int | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """FP8 rows through the compiled kernels, bf16 rows through Triton, 24 of 70 tokens and more: all three models
    attend to what the exact one chose, over FP8 rows to latents that went through the codec. Catches a wrong row, scale
    or sink, a choice that is not obeyed, and, by the counters, a call that another backend took over."""
    if not prompt_is_expanded:
        monkeypatch.setattr(sparse, "_longest_expanded", lambda module, topk: 0)
    tokens = on_device(prompt((PROMPT + STEPS - 1, 41, PROMPT + 8)))
    choices: list[torch.Tensor] = []

    def reference(dtype: torch.dtype) -> torch.Tensor:
        model = model_of(name, dtype, plain_attention(name), index_topk=24)
        cache = rounding_cache(model.config, prompt_is_expanded) if rows else DynamicCache(config=model.config)
        return forced_logits(model, tokens, cache, choices)

    exact = reference(torch.float64)
    plain = reference(torch.bfloat16)
    model = model_of(name, torch.bfloat16, "flash_mla", index_topk=24)
    flash_mla.reset_path_counts()
    launches = Launches()
    cache = PagedLatentCache(model.config, block_size=64, max_cache_len=max_cache_len, dtype=rows)
    ours = forced_logits(model, tokens, cache, choices)
    prompts, steps = LAYERS * int(prompt_is_expanded), LAYERS * (STEPS - int(prompt_is_expanded))
    assert_paths(name, prefill=prompts, sparse=steps)
    assert launches.of("sparse_decode") == {backend: steps}
    assert launches.of("decode") == {}
    assert launches.of("append") == {"cuda": LAYERS * STEPS}
    cache.validate()
    assert_close_to(ours, plain, exact)


def test_compiled_decode_over_fp8_rows() -> None:
    """`generate` in its graph: the compiled kernel, replayed with growing lengths. Every token is chosen, so that no
    rounding decides on a choice; a replay over the slots of an earlier step lacks tokens, and its logits say so."""
    name = "deepseek_v32"
    inputs, new_tokens = on_device(prompt((PROMPT, 41, PROMPT - 3))), 16
    model = model_of(name, torch.bfloat16, "flash_mla", index_topk=128)
    options = {"cache_implementation": "static", "cache_config": FP8, "do_sample": False, "max_new_tokens": new_tokens}
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    flash_mla.reset_path_counts()
    launches = Launches()
    for _ in range(2):
        found = model.generate(**inputs, **options, return_dict_in_generate=True, output_logits=True)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not torch._dynamo.utils.counters["graph_break"]
    assert set(counted(name)) == {"prefill", "sparse"}
    assert set(launches.of("sparse_decode")) == {"cuda"}
    assert found.past_key_values.dtype == "fp8"
    found.past_key_values.validate()
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, new_tokens - 1), value=1)
    tokens = {"input_ids": found.sequences[:, :-1], "attention_mask": mask}
    exact, plain = (
        forced_logits(again, tokens, rounding_cache(again.config))
        for again in (model_of(name, dtype, "sdpa", index_topk=128) for dtype in (torch.float64, torch.bfloat16))
    )
    assert_close_to(torch.stack(found.logits, dim=1).double(), plain, exact)
