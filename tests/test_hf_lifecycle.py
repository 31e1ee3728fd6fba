"""What people do to a model and a cache besides generating: save, copy, train, adapt, quantise, offload, switch.

Faults it must catch: state on a model that does not survive pickling or copying, W_UK and W_UV read from a weight that
is not what the module applies (adapters, quantised, offloaded or hooked layers), stale after the weights changed, a
name that works in one way of making a model and not in another, an `unregister` that leaves something behind.
"""

from __future__ import annotations

import copy
import json
import pickle

import pytest
import torch
from tiny_models import (
    NEW_TOKENS,
    TEXT,
    assert_paths,
    assert_varied,
    build,
    counted,
    draw_weights,
    greedy,
    mistral4_config,
    need,
    pair,
    prompt,
)
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    ContinuousBatchingConfig,
    DynamicCache,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import flash_mla
from flash_mla import PagedLatentCache, UnsupportedError

LAYERS = 3
PAGED = {"prefill": LAYERS, "absorbed": LAYERS * (NEW_TOKENS - 1)}


@pytest.fixture(autouse=True)
def _fresh_counters():
    flash_mla.reset_path_counts()


def assert_ours(model, expected, **paths):
    """`model` gives the tokens `expected` by these paths (the paged ones unless told)."""
    flash_mla.reset_path_counts()
    assert greedy(model, prompt()).tolist() == expected.tolist()
    assert_paths("deepseek_v3", **(paths or PAGED))


# --- copies and files -------------------------------------------------------------------------------------------------


def _torch_saved(model, folder):
    torch.save(model, folder / "model.pt")
    return torch.load(folder / "model.pt", weights_only=False)


def _saved_and_loaded(model, folder):
    model.save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="flash_mla")


@pytest.mark.parametrize(
    "again",
    [
        lambda model, _: copy.deepcopy(model),
        lambda model, _: pickle.loads(pickle.dumps(model)),
        _torch_saved,
        _saved_and_loaded,
    ],
    ids=["deepcopy", "pickle", "torch.save", "save_pretrained"],
)
def test_a_model_that_has_generated_can_be_copied(again, tmp_path):
    eager, ours = pair("deepseek_v3")
    expected = greedy(eager, prompt())
    assert_ours(ours, expected)
    assert_ours(again(ours, tmp_path), expected)
    assert_ours(ours, expected)


def test_the_name_is_not_saved_with_the_model(tmp_path):
    """A file that named our attention could not be opened without this package."""
    build("deepseek_v3", "flash_mla").save_pretrained(tmp_path)
    assert "flash_mla" not in json.dumps(json.loads((tmp_path / "config.json").read_text()))
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config._attn_implementation == "sdpa"


def logits_of(model, cache, ids, mask=None, positions=None):
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache).logits[:, -1]


@pytest.mark.parametrize("capacity", [None, 96], ids=["growing", "fixed"])
def test_a_cache_in_use_can_be_copied_and_both_go_on(capacity):
    eager, ours = pair("deepseek_v3")
    inputs = prompt()
    caches = [DynamicCache(config=eager.config), PagedLatentCache(ours.config, 16, capacity)]
    for model, cache in zip((eager, ours), caches, strict=True):
        logits_of(model, cache, **{"ids": inputs["input_ids"], "mask": inputs["attention_mask"]})
    caches += copy.deepcopy(caches)
    lengths = inputs["attention_mask"].sum(1, keepdim=True)
    for step in range(8):  # alternately, so that a shared page or length would be overwritten by the other
        for number, (model, cache) in enumerate(zip((eager, ours) * 2, caches, strict=True)):
            ids = torch.full((3, 1), 10 + step + 40 * (number // 2))
            mask = torch.cat((inputs["attention_mask"], torch.ones(3, step + 1, dtype=torch.long)), 1)
            found = logits_of(model, cache, ids, mask, lengths + step)
            if model is eager:
                expected = found
            else:
                torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)
    for cache in caches[1::2]:
        cache.validate()
        assert cache.memory_report().tokens_used == 61 + 40 + 57 + 3 * 8


def test_a_copied_cache_follows_the_same_model():
    """Which attention runs is the model's to say, also for a copy that was made before it was switched."""
    eager, model = pair("deepseek_v3")
    ids, step = prompt((30, 30))["input_ids"], torch.full((2, 1), 5)
    reference, cache = DynamicCache(config=eager.config), PagedLatentCache(model.config, 16)
    logits_of(eager, reference, ids)
    logits_of(model, cache, ids)
    clone = copy.deepcopy(cache)
    model.set_attn_implementation("sdpa")
    expected = logits_of(eager, reference, step)
    torch.testing.assert_close(logits_of(model, clone, step), expected, rtol=0, atol=1e-3)


# --- ways to say the name ---------------------------------------------------------------------------------------------


def _family_config(name="deepseek_v3"):
    family = need(name)
    return family.config(family.load())


def _constructed():
    config = _family_config()
    config._attn_implementation = "flash_mla"
    return need("deepseek_v3").load().DeepseekV3ForCausalLM(config)


@pytest.mark.parametrize(
    "make",
    [
        lambda: AutoModelForCausalLM.from_config(_family_config(), attn_implementation="flash_mla"),
        lambda: AutoModelForCausalLM.from_config(_family_config(), attn_implementation={"": "flash_mla"}),
        _constructed,
    ],
    ids=["from_config", "dict", "constructor"],
)
def test_ways_to_make_a_model(make):
    expected = greedy(build("deepseek_v3"), prompt())
    ours = make().eval()
    draw_weights(ours, 0)
    assert_ours(ours, expected)


def test_one_sub_config_only():
    expected = greedy(build("kimi_k25"), prompt())
    ours = build("kimi_k25", {"text_config": "flash_mla"})
    assert ours.config.vision_config._attn_implementation != "flash_mla"
    assert_ours(ours, expected)


def test_switched_on_a_live_model():
    model = build("deepseek_v3")
    expected = greedy(model, prompt())
    for _ in range(2):
        model.set_attn_implementation("flash_mla")
        assert_ours(model, expected)
        model.set_attn_implementation("sdpa")
        flash_mla.reset_path_counts()
        assert greedy(model, prompt()).tolist() == expected.tolist()
        assert_paths("deepseek_v3")


@pytest.mark.parametrize("capacity", [None, 96], ids=["growing", "fixed"])
@pytest.mark.parametrize("order", [("flash_mla", "eager"), ("eager", "flash_mla")], ids=["ours first", "eager first"])
def test_a_cache_outlives_the_switch(order, capacity):
    """Under eager the cache never hears which positions are padding; under flash_mla it must not attend to them."""
    eager, model = pair("deepseek_v3")
    inputs = prompt((21, 9, 17))
    reference, cache = DynamicCache(config=eager.config), PagedLatentCache(model.config, 16, capacity)
    mask = inputs["attention_mask"]
    ids, positions = inputs["input_ids"], (mask.cumsum(1) - 1).clamp(min=0)
    for attn in (*order, *order):
        model.set_attn_implementation(attn)
        for _ in range(2):
            expected = logits_of(eager, reference, ids, mask, positions)
            torch.testing.assert_close(logits_of(model, cache, ids, mask, positions), expected, rtol=0, atol=1e-3)
            ids = expected.argmax(-1, keepdim=True)
            mask = torch.cat((mask, torch.ones(3, 1, dtype=torch.long)), 1)
            positions = mask.sum(1, keepdim=True) - 1
    cache.validate()


# --- training ---------------------------------------------------------------------------------------------------------


def test_one_training_step_with_gradient_checkpointing():
    """The dense path is SDPA: its loss and gradients, up to fp32 rounding; then the model generates as trained."""
    inputs = prompt()
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    models, losses = {}, {}
    for attn in ("sdpa", "flash_mla"):
        model = models[attn] = build("deepseek_v3", attn).train()
        model.gradient_checkpointing_enable()
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
        loss = model(**inputs, labels=labels, use_cache=False).loss
        loss.backward()
        losses[attn] = loss.detach()
        optimizer.step()
    assert_paths("deepseek_v3", dense=2 * LAYERS)  # once forward, once again in the checkpointed backward
    torch.testing.assert_close(losses["flash_mla"], losses["sdpa"])
    for (name, ours), (_, theirs) in zip(
        models["flash_mla"].named_parameters(), models["sdpa"].named_parameters(), strict=True
    ):
        if theirs.grad is None:
            assert ours.grad is None, name
        else:
            torch.testing.assert_close(ours.grad, theirs.grad, msg=lambda text, name=name: f"{name}: {text}")
    grad = models["flash_mla"].model.layers[0].self_attn.kv_b_proj.weight.grad
    assert grad.abs().max() > 0
    trained = models["sdpa"].eval()
    assert greedy(trained, prompt()).tolist() != greedy(build("deepseek_v3"), prompt()).tolist()
    assert_ours(models["flash_mla"].eval(), greedy(trained, prompt()))


def test_weights_that_change_between_two_calls():
    """W_UK and W_UV are views of the weight or are made anew: nothing of the first call's may be left."""
    eager, ours = pair("deepseek_v3")
    assert_ours(ours, greedy(eager, prompt()))
    other = build("deepseek_v3", seed=9).state_dict()
    for model in (eager, ours):
        model.load_state_dict(other)
    assert_ours(ours, greedy(eager, prompt()))


# --- other things than a plain linear layer in the place of kv_b_proj -------------------------------------------------


def replace_kv_b_proj(model, make):
    for layer in model.model.layers:
        layer.self_attn.kv_b_proj = make(layer.self_attn.kv_b_proj)
    return model


class Int8Linear(nn.Module):
    """Weight-only int8 with a scale per output row, as quantised layers are: `weight` alone says nothing."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("weight", (linear.weight.detach() / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)

    def forward(self, x):
        return x @ (self.weight.to(x.dtype) * self.scale.to(x.dtype)).T


class ScaledLinear(nn.Linear):
    """A subclass whose forward does more than apply `weight`."""

    def __init__(self, linear):
        super().__init__(linear.in_features, linear.out_features, bias=False)
        self.weight = linear.weight

    def forward(self, x):
        return super().forward(x) * 0.7


def _hooked(linear):
    linear.register_forward_hook(lambda module, args, output: output * 0.7)
    return linear


def _pre_hooked(linear):
    linear.register_forward_pre_hook(lambda module, args: (args[0] * 0.7,))
    return linear


def _parametrized(linear):
    class Halved(nn.Module):
        def forward(self, weight):
            return weight * 0.7

    nn.utils.parametrize.register_parametrization(linear, "weight", Halved())
    return linear


def _forward_replaced(linear):
    original = linear.forward
    linear.forward = lambda x: original(x) * 0.7
    return linear


@pytest.mark.parametrize(
    "make",
    [Int8Linear, ScaledLinear, _hooked, _pre_hooked, _parametrized, _forward_replaced],
    ids=["int8", "subclass", "forward hook", "forward pre-hook", "parametrization", "replaced forward"],
)
def test_what_the_module_applies_counts(make):
    plain = greedy(build("deepseek_v3"), prompt())
    eager, ours = (replace_kv_b_proj(model, make) for model in pair("deepseek_v3"))
    expected = greedy(eager, prompt())
    assert expected.tolist() != plain.tolist()
    assert_ours(ours, expected)


def test_int8_weights_that_change_between_two_turns():
    """The matrix that stands for such a layer is kept with the cache: a new turn on the same cache makes it anew."""
    eager, ours = (replace_kv_b_proj(model, Int8Linear) for model in pair("deepseek_v3"))
    caches = DynamicCache(config=eager.config), PagedLatentCache(ours.config)
    for scale in (1.0, 1.3):
        turns = []
        for model, cache in zip((eager, ours), caches, strict=True):
            for layer in model.model.layers:
                layer.self_attn.kv_b_proj.scale.mul_(scale)
            ids = prompt((30, 30) if scale == 1.0 else (60, 60))["input_ids"]
            turns.append(greedy(model, {"input_ids": ids}, past_key_values=cache).tolist())
        assert turns[1] == turns[0]


def test_a_bias_on_the_up_projection():
    """Keys are then no linear function of the latent: absorbing would drop the bias, so the path is another."""

    def biased(linear):
        new = nn.Linear(linear.in_features, linear.out_features)
        new.weight = linear.weight
        nn.init.normal_(new.bias, std=1.0, generator=torch.Generator().manual_seed(0))
        return new

    plain = greedy(build("deepseek_v3"), prompt())
    eager, ours = (replace_kv_b_proj(model, biased) for model in pair("deepseek_v3"))
    expected = greedy(eager, prompt())
    assert expected.tolist() != plain.tolist()
    assert_ours(ours, expected, prefill=LAYERS, gathered=LAYERS * (NEW_TOKENS - 1))


class BlockFP8Linear(nn.Module):
    """As in DeepSeek-V3's files; its forward needs a kernel that is not there."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight = linear.weight.detach()
        rows, columns = (-(-n // 128) for n in weight.shape)
        padded = nn.functional.pad(weight, (0, columns * 128 - weight.shape[1], 0, rows * 128 - weight.shape[0]))
        # One block is a hundred times larger, so that a scale in the wrong place cannot go unnoticed.
        scale = padded.view(rows, 128, columns, 128).abs().amax((1, 3)) / 448
        spread = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)[: weight.shape[0], : weight.shape[1]]
        self.weight = nn.Parameter((weight / spread).to(torch.float8_e4m3fn), requires_grad=False)
        self.weight_scale_inv = nn.Parameter(scale, requires_grad=False)
        self.bias = None

    def forward(self, x):
        raise RuntimeError("no FP8 kernel here")

    def plain(self):
        spread = self.weight_scale_inv.repeat_interleave(128, 0).repeat_interleave(128, 1)
        linear = nn.Linear(self.in_features, self.out_features, bias=False)
        linear.weight.data = self.weight.float() * spread[: self.out_features, : self.in_features]
        return linear


def _uneven(linear):
    """Blocks of very different size, as in trained weights."""
    with torch.no_grad():
        linear.weight[128:] *= 3
        linear.weight[:, 128:] *= 0.5
    return linear


@pytest.mark.parametrize("options", [{}, {"prefill_chunk_size": 16}], ids=["at once", "in chunks"])
def test_block_fp8_is_dequantised_by_us(options):
    """4 * (40 + 28) = 272 rows and 160 columns: 3 x 2 blocks of 128 x 128, the last ones not full."""
    module = need("deepseek_v3").load()
    dims = {"kv_lora_rank": 160, "qk_nope_head_dim": 40, "qk_rope_head_dim": 8, "v_head_dim": 28, "q_lora_rank": 24}
    small = {"num_hidden_layers": 2, "first_k_dense_replace": 2}

    def model(attn):
        config = module.DeepseekV3Config(**TEXT, **dims, **small)
        return replace_kv_b_proj(build("deepseek_v3", attn, config=config), _uneven)

    original, ours = model("eager"), replace_kv_b_proj(model("flash_mla"), BlockFP8Linear)
    dequantised = replace_kv_b_proj(model("eager"), lambda linear: BlockFP8Linear(linear).plain())
    expected = greedy(dequantised, prompt())
    assert_varied(expected)
    assert expected.tolist() != greedy(original, prompt()).tolist()
    flash_mla.reset_path_counts()
    assert greedy(ours, prompt(), **options).tolist() == expected.tolist()
    assert counted("deepseek_v3")["absorbed"] >= 2 * (NEW_TOKENS - 1)


# --- adapters ---------------------------------------------------------------------------------------------------------


def test_lora_on_the_up_projection():
    """PEFT's layer is also named Linear and its `.weight` is the base weight: reading it would ignore the adapter."""
    peft = pytest.importorskip("peft")
    models = []
    for model in pair("deepseek_v3"):
        torch.manual_seed(0)
        config = peft.LoraConfig(target_modules=["kv_b_proj"], r=4, lora_alpha=16, init_lora_weights=False)
        adapted = peft.get_peft_model(model, config)
        adapted.add_adapter("other", config)
        models.append(adapted.eval())
    eager, ours = models
    ours.load_state_dict(eager.state_dict())

    def tokens(state):
        expected = greedy(eager, prompt())
        assert_ours(ours, expected)
        return state, expected.tolist()

    seen = dict([tokens("unmerged")])
    for model in models:
        model.set_adapter("other")
    seen |= [tokens("other adapter")]
    with eager.disable_adapter(), ours.disable_adapter():
        seen |= [tokens("disabled")]
    for model in models:
        model.set_adapter("default")
        model.merge_adapter()
    seen |= [tokens("merged")]
    for model in models:
        model.unmerge_adapter()
    assert tokens("unmerged again")[1] == seen["unmerged"]
    models[:] = eager, ours = [model.merge_and_unload() for model in models]
    assert tokens("unloaded")[1] == seen["merged"]
    assert seen["disabled"] == greedy(build("deepseek_v3"), prompt()).tolist()
    assert len({str(tokens) for tokens in (seen["unmerged"], seen["other adapter"], seen["disabled"])}) == 3


def test_an_adapter_switched_while_decoding():
    """The latents know no adapter, so the next step reads the whole context through the other matrix."""
    peft = pytest.importorskip("peft")
    models, caches = [], []
    for model in pair("deepseek_v3"):
        torch.manual_seed(0)
        config = peft.LoraConfig(target_modules=["kv_b_proj"], r=4, lora_alpha=16, init_lora_weights=False)
        models.append(peft.get_peft_model(model, config).eval())
        kind = PagedLatentCache if model.config._attn_implementation == "flash_mla" else DynamicCache
        caches.append(kind(config=model.config))
    models[1].load_state_dict(models[0].state_dict())

    def compare(ids):
        expected, found = (logits_of(model, cache, ids) for model, cache in zip(models, caches, strict=True))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)
        return expected

    compare(prompt((30, 30))["input_ids"])
    step = torch.full((2, 1), 5)
    adapted = compare(step)
    with models[0].disable_adapter(), models[1].disable_adapter():
        assert (compare(step) - adapted).abs().max() > 0.1
    compare(step)
    for model in models:
        model.merge_adapter()
    compare(step)


# --- offloaded weights ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_accelerate_offload(where, tmp_path):
    """The weights are on the meta device between two calls of their module."""
    accelerate = pytest.importorskip("accelerate")
    eager, ours = pair("deepseek_v3")
    expected = greedy(eager, prompt())
    if where == "cpu":
        accelerate.cpu_offload(ours, execution_device=torch.device("cpu"))
    else:
        accelerate.disk_offload(ours, str(tmp_path), execution_device=torch.device("cpu"))
    assert ours.model.layers[0].self_attn.kv_b_proj.weight.is_meta
    assert_ours(ours, expected)


# --- the name itself --------------------------------------------------------------------------------------------------


def test_unregister_puts_transformers_back():
    eager, ours = pair("deepseek_v3")
    expected = greedy(eager, prompt())
    assert_ours(ours, expected)
    flash_mla.register()  # a second time: must not need a second undo
    flash_mla.unregister()
    try:
        flash_mla.unregister()
        with pytest.raises(ValueError, match="flash_mla"):
            AutoModelForCausalLM.from_config(_family_config(), attn_implementation="flash_mla")
        output = eager.generate(**prompt(), max_new_tokens=3, return_dict_in_generate=True)
        assert type(output.past_key_values) is DynamicCache
        with pytest.raises(KeyError, match="flash_mla"):
            greedy(ours, prompt())
    finally:
        flash_mla.register()
    assert_ours(ours, expected)


def tiny_llama():
    config = LlamaConfig(**TEXT, num_hidden_layers=2)
    model = LlamaForCausalLM._from_config(config, attn_implementation="flash_mla")
    draw_weights(model, 0)
    return model.eval()


@pytest.mark.parametrize(
    "call",
    [lambda model: model.generate(**prompt(), max_new_tokens=2), lambda model: model(**prompt())],
    ids=["generate", "forward"],
)
def test_a_model_without_latents_is_refused(call):
    with pytest.raises(ValueError, match=r"llama.*kv_lora_rank"):
        call(tiny_llama())


def batching_model():
    """mistral4 with equal head dims is where Transformers' continuous batching runs at all."""
    return build("mistral4", "flash_mla", config=mistral4_config(need("mistral4").load(), v_head_dim=28))


def test_generate_batch_is_refused():
    """It would pack the sequences without a mask: plausible tokens, all wrong."""
    options = GenerationConfig(max_new_tokens=3, do_sample=False, eos_token_id=-1, pad_token_id=0)
    # Small on purpose: by default it fills most of the memory with pages.
    small = ContinuousBatchingConfig(num_blocks=4, max_batch_tokens=64, max_requests_per_batch=2)
    model, requests = batching_model(), [[5, 6, 7], [8, 9]]

    def answers():
        return model.generate_batch(
            inputs=requests, generation_config=options, continuous_batching_config=small, progress_bar=False
        )

    if "paged|sdpa" in ALL_ATTENTION_FUNCTIONS.valid_keys():
        # Transformers 5.17 has a second name for each attention that can do it, and stops where it finds none.
        with pytest.raises(ValueError, match=r"paged\|flash_mla"):
            answers()
        return
    results = answers().values()
    assert len(results) == 2
    assert all(not result.generated_tokens and "continuous batching" in result.error for result in results)


def test_a_cache_of_continuous_batching_is_refused():
    attention = batching_model().model.layers[0].self_attn
    query, key, value = (torch.zeros(1, 4, 5, 28) for _ in range(3))
    with pytest.raises(UnsupportedError, match="continuous batching"):
        ALL_ATTENTION_FUNCTIONS["flash_mla"](attention, query, key, value, None, scaling=1.0, cache=object())
