"""Turns, masks, adapters and failures at the edges: the right tokens, or refused with nothing changed."""

from __future__ import annotations

import copy

import accelerate
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import assert_paths, build, greedy, need, pair, prompt
from transformers import DynamicCache

import flash_mla
from flash_mla import PagedLatentCache

CAPACITIES = pytest.mark.parametrize("capacity", [None, 96], ids=["growing", "fixed"])


@pytest.fixture(scope="module")
def models():
    return pair("deepseek_v3")


@torch.no_grad()
def forward(model, cache, ids, mask=None):
    return model(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True).logits


def random_ids(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 90, shape, generator=torch.Generator().manual_seed(seed))


# --- rows that share a prompt -----------------------------------------------------------------------------------------


def test_a_second_turn_right_after_the_prompt(models):
    """One new token: the rows were never decoded apart, and their second turns differ."""
    results = []
    for model in models:
        inputs = prompt((20, 20))
        options = {"do_sample": True, "num_return_sequences": 2, "return_dict_in_generate": True}
        torch.manual_seed(3)
        first = model.generate(**inputs, max_new_tokens=1, **options)
        ids = torch.cat((first.sequences, random_ids(4, 6, seed=4)), dim=1)
        cache = first.past_key_values
        results.append(greedy(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, past_key_values=cache))
        assert not torch.equal(results[-1][0], results[-1][1])
    assert torch.equal(*results)


def test_rows_called_equal_that_are_not(models):
    eager, ours = models
    cache = PagedLatentCache(ours.config, 16, prompt_repeats=2)
    native = DynamicCache(config=eager.config)
    for seed in (1, 2):  # the first chunk differs already; so does the second
        ids = random_ids(4, 10, seed=seed)
        torch.testing.assert_close(forward(ours, cache, ids), forward(eager, native, ids), rtol=1e-3, atol=1e-3)
    cache.validate()


# --- masks ------------------------------------------------------------------------------------------------------------


def bad_masks(seen: int, q: int):
    return {
        "too short": torch.ones(2, 1, q, seen + q - 2, dtype=torch.bool),
        "too long": torch.ones(2, 1, q, seen + q + 200, dtype=torch.bool),
        "integers": torch.ones(2, 1, q, seen + q, dtype=torch.int64),
        "other batch": torch.ones(3, 1, q, seen + q, dtype=torch.bool),
        "other heads": torch.ones(2, 3, q, seen + q, dtype=torch.bool),
    }


@CAPACITIES
@pytest.mark.parametrize("kind", bad_masks(8, 4))
def test_a_wrong_4d_mask_is_refused_before_anything_is_stored(models, capacity, kind):
    _, ours = models
    cache = PagedLatentCache(ours.config, 16, capacity)
    forward(ours, cache, random_ids(2, 12))
    with pytest.raises(ValueError, match="attention_mask must be"):
        forward(ours, cache, random_ids(2, 4), bad_masks(12, 4)[kind])
    assert int(cache.get_seq_length()) == 12
    assert cache.memory_report().tokens_used == 24


@CAPACITIES
def test_a_2d_mask_that_leaves_out_the_context_is_refused(models, capacity):
    _, ours = models
    cache = PagedLatentCache(ours.config, 16, capacity)
    forward(ours, cache, random_ids(1, 12))
    with pytest.raises(ValueError, match=r"12 cached and 4 new positions"):
        forward(ours, cache, random_ids(1, 4), torch.tensor([[1, 1, 1, 0]]))
    assert int(cache.get_seq_length()) == 12


@pytest.mark.parametrize("additive", [False, True], ids=["bool", "additive"])
def test_a_token_that_does_not_see_itself_is_stored(models, additive):
    """A mask of one's own in which a query sees what came before it, and the first one itself."""
    eager, ours = models
    ids, more = random_ids(2, 12), random_ids(2, 1, seed=1)
    mask = torch.ones(12, 12, dtype=torch.bool).tril(-1)
    mask[0, 0] = mask[11, 11] = True
    mask = mask.expand(2, 1, 12, 12)
    if additive:
        mask = torch.zeros(mask.shape).masked_fill(~mask, -1e4)
    sdpa = copy.deepcopy(eager)
    sdpa.set_attn_implementation("sdpa")
    native, cache = DynamicCache(config=eager.config), PagedLatentCache(ours.config, 16)
    for step in ((ids, mask), (more, None)):
        torch.testing.assert_close(forward(ours, cache, *step), forward(sdpa, native, *step), rtol=1e-3, atol=1e-3)
    assert cache.memory_report().tokens_used == 26


@CAPACITIES
def test_biases_by_head_on_top_of_a_context(models, capacity):
    """A floating mask over the new tokens only is a bias and not just visible or not."""
    eager, ours = models
    sdpa = copy.deepcopy(eager)
    sdpa.set_attn_implementation("sdpa")
    native, cache = DynamicCache(config=eager.config), PagedLatentCache(ours.config, 16, capacity)
    first, second = random_ids(2, 12), random_ids(2, 5, seed=1)
    heads = ours.config.num_attention_heads
    bias = torch.randn(1, heads, 5, 5, generator=torch.Generator().manual_seed(2)).expand(2, -1, -1, -1)
    bias = bias.masked_fill(~torch.ones(5, 5, dtype=torch.bool).tril(), torch.finfo(torch.float32).min)
    forward(ours, cache, first)
    forward(sdpa, native, first)
    wide = torch.nn.functional.pad(bias, (12, 0))
    wanted = forward(sdpa, native, second, wide)
    torch.testing.assert_close(forward(ours, cache, second, bias), wanted, rtol=1e-3, atol=1e-3)


# --- up-projections ---------------------------------------------------------------------------------------------------


def with_adapters(model, **options):
    made = get_peft_model(model, LoraConfig(r=4, target_modules=["kv_b_proj"], init_lora_weights=False, **options))
    return made.eval()


def test_a_lora_with_a_bias_is_not_absorbed(models):
    results = []
    for model in models:
        torch.manual_seed(5)
        adapted = with_adapters(copy.deepcopy(model), lora_bias=True)
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if "lora_B" in name and name.endswith("bias"):
                    parameter.normal_(generator=torch.Generator().manual_seed(6))
        flash_mla.reset_path_counts()
        results.append(greedy(adapted, prompt((20, 13)), new_tokens=8))
    assert torch.equal(*results)
    assert_paths("deepseek_v3", prefill=3, gathered=3 * 7)


def test_an_adapter_for_each_row(models):
    """PEFT's adapter_names: the rows have different up-projections, so no one matrix is absorbed."""
    results = []
    for model in models:
        torch.manual_seed(5)
        adapted = with_adapters(copy.deepcopy(model))
        flash_mla.reset_path_counts()
        inputs = prompt((20, 20))
        results.append(greedy(adapted, inputs, new_tokens=8, adapter_names=["default", "__base__"]))
    assert torch.equal(*results)
    assert_paths("deepseek_v3", prefill=3, gathered=3 * 7)


class Counted(torch.nn.Linear):
    """A linear that is not `nn.Linear` itself, so that it is applied to the identity, and says how often."""

    applied = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        Counted.applied += 1
        return super().forward(x)


def test_a_matrix_is_made_once_and_again_when_the_weights_change(models):
    eager, ours = copy.deepcopy(models[0]), copy.deepcopy(models[1])
    for layer in ours.model.layers:
        layer.self_attn.kv_b_proj.__class__ = Counted
    cache, native = PagedLatentCache(ours.config, 16), DynamicCache(config=eager.config)
    Counted.applied = 0
    for seed, q in enumerate((12, 1, 3, 3, 1)):  # a prompt, then steps as assisted decoding makes them
        ids = random_ids(1, q, seed=seed)
        torch.testing.assert_close(forward(ours, cache, ids), forward(eager, native, ids), rtol=1e-3, atol=1e-3)
    assert Counted.applied == 3 + 3, "once per layer to expand the prompt, once to make the matrix"
    with torch.no_grad():
        for model in (eager, ours):
            for layer in model.model.layers:
                layer.self_attn.kv_b_proj.weight.mul_(1.5)
    ids = random_ids(1, 1, seed=9)
    torch.testing.assert_close(forward(ours, cache, ids), forward(eager, native, ids), rtol=1e-3, atol=1e-3)


class BlockFP8(torch.nn.Module):
    """As DeepSeek-V3's files hold it; its own forward needs a kernel that is not here."""

    def __init__(self, weight: torch.Tensor, scale: torch.Tensor) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter((weight / 0.02).to(torch.float8_e4m3fn), requires_grad=False)
        self.weight_scale_inv = torch.nn.Parameter(scale, requires_grad=False)
        self.block_size = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError


@pytest.mark.parametrize("offloaded", [False, True], ids=["resident", "offloaded"])
@pytest.mark.parametrize("shape", [(), (1, 1)], ids=["number", "one block"])
def test_fp8_with_one_scale_for_all(models, shape, offloaded):
    eager, ours = copy.deepcopy(models[0]), copy.deepcopy(models[1])
    for plain, fp8 in zip(eager.model.layers, ours.model.layers, strict=True):
        made = BlockFP8(fp8.self_attn.kv_b_proj.weight.data, torch.full(shape, 0.02))
        plain.self_attn.kv_b_proj.weight.data = made.weight.float() * 0.02
        fp8.self_attn.kv_b_proj = made
    if offloaded:
        accelerate.cpu_offload(ours, execution_device=torch.device("cpu"))
        assert made.weight.device.type == "meta"
    assert torch.equal(greedy(eager, prompt((20, 13))), greedy(ours, prompt((20, 13))))


# --- failures ---------------------------------------------------------------------------------------------------------


def test_a_forward_that_stopped_half_way_is_noticed(models, monkeypatch):
    _, ours = models
    cache = PagedLatentCache(ours.config, 16)
    forward(ours, cache, random_ids(2, 12))

    def out_of_memory(*args, **kwargs):
        raise torch.OutOfMemoryError("planted")

    with monkeypatch.context() as patch:
        patch.setattr(ours.model.layers[1].mlp, "forward", out_of_memory)
        with pytest.raises(torch.OutOfMemoryError):
            forward(ours, cache, random_ids(2, 1))
    for use in (cache.validate, lambda: forward(ours, cache, random_ids(2, 1))):
        with pytest.raises(ValueError, match="stopped after 2 of 3 layers"):
            use()
    cache.reset()
    forward(ours, cache, random_ids(2, 12))
    cache.validate()


@CAPACITIES
def test_a_cache_begun_in_inference_mode_goes_on_outside(models, capacity):
    eager, ours = models
    cache, native = PagedLatentCache(ours.config, 16, capacity), DynamicCache(config=eager.config)
    ids, more = random_ids(2, 12), random_ids(2, 8, seed=1)
    with torch.inference_mode():
        ours(input_ids=ids, past_key_values=cache)
    forward(eager, native, ids)
    torch.testing.assert_close(forward(ours, cache, more), forward(eager, native, more), rtol=1e-3, atol=1e-3)


def test_gradients_do_not_pile_up_in_the_pool(models):
    _, ours = models
    cache = PagedLatentCache(ours.config, 16)
    for q in (12, 1, 1):
        ours(input_ids=random_ids(2, q), past_key_values=cache)
    assert not cache.layers[0].kv_cache.requires_grad
    copy.deepcopy(cache)


def test_crop_of_a_hybrid_that_cannot_leaves_the_pages():
    need("dots3_note")
    ours = build("dots3_note", "flash_mla")
    cache = PagedLatentCache(ours.config, 16)
    forward(ours, cache, random_ids(2, 30))
    lengths = [layer.get_seq_length() for layer in cache.layers]
    with pytest.raises(RuntimeError):  # Transformers' sliding layers have forgotten what lies before their window
        cache.crop(-2)
    assert [layer.get_seq_length() for layer in cache.layers] == lengths


@pytest.mark.parametrize("rows", [[], [0, 5], [-1]], ids=["none", "beyond", "negative"])
def test_rows_that_are_not_there(models, rows):
    _, ours = models
    cache = PagedLatentCache(ours.config, 16)
    forward(ours, cache, random_ids(2, 12))
    with pytest.raises(ValueError, match=r"numbers in 0\.\.1"):
        cache.batch_select_indices(torch.tensor(rows, dtype=torch.long))
    assert cache.batch_size == 2
    cache.validate()


def test_crop_of_an_empty_cache(models):
    with pytest.raises(ValueError, match="empty, got -5"):
        PagedLatentCache(models[1].config).crop(-5)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_fixed_cache_too_small_for_generate_under_another_attention(attention):
    model = build("deepseek_v3", attention)
    cache = PagedLatentCache(model.config, max_cache_len=24)
    with pytest.raises(ValueError, match="max_cache_len=24"):
        model.generate(**prompt((20, 20)), max_new_tokens=10, past_key_values=cache)
    assert cache.get_seq_length() == 0
