"""Wrong arguments: a ValueError that holds the numbers, and a cache that is as it was before."""

from __future__ import annotations

import pytest
import torch
from tiny_models import TEXT, build, need, pair, prompt
from transformers import LlamaConfig

from flash_mla import PagedLatentCache


@pytest.fixture(scope="module")
def ours():
    return build("deepseek_v3", "flash_mla")


CAPACITIES = pytest.mark.parametrize("capacity", [None, 64], ids=["growing", "fixed"])


def forward(model, cache, ids, mask=None):
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask, past_key_values=cache).logits


def in_use(model, capacity=None):
    """A cache of 3 rows with a left-padded prompt of 20 and two decoded tokens."""
    cache = PagedLatentCache(model.config, 16, capacity)
    inputs = prompt((20, 9, 14))
    forward(model, cache, inputs["input_ids"], inputs["attention_mask"])
    for token in (5, 6):
        forward(model, cache, torch.full((3, 1), token))
    return cache


class unchanged:
    """The cache holds the same before and after the block, to the bit, and still continues."""

    def __init__(self, model, cache):
        self.model, self.cache = model, cache

    def state(self):
        pages = [layer.kv_cache.clone() for layer in self.cache.paged_layers]
        return int(self.cache.get_seq_length()), self.cache.memory_report(), pages

    def __enter__(self):
        self.before = self.state()

    def __exit__(self, *error):
        if any(error):
            return
        length, report, pages = self.state()
        assert (length, report) == self.before[:2]
        assert all(torch.equal(a, b) for a, b in zip(pages, self.before[2], strict=True))
        assert torch.isfinite(forward(self.model, self.cache, torch.full((3, 1), 7))).all()


@CAPACITIES
def test_another_batch_size(ours, capacity):
    cache = in_use(ours, capacity)
    with unchanged(ours, cache), pytest.raises(ValueError, match=r"batch of 3, got 2"):
        forward(ours, cache, torch.full((2, 1), 7))


@CAPACITIES
def test_crop_beyond_the_length(ours, capacity):
    cache = in_use(ours, capacity)
    with unchanged(ours, cache), pytest.raises(ValueError, match=r"-?23.*22|22.*-?23"):
        cache.crop(-23)


@CAPACITIES
def test_positive_crop(ours, capacity):
    """In Transformers 5.17 it was the length to keep; 5.18 made it an error."""
    cache = in_use(ours, capacity)
    with unchanged(ours, cache), pytest.raises(ValueError, match="10"):
        cache.crop(10)


@CAPACITIES
def test_another_dtype(ours, capacity):
    cache = in_use(ours, capacity)
    half = build("deepseek_v3", "flash_mla").to(torch.bfloat16)
    with unchanged(ours, cache), pytest.raises(ValueError, match=r"torch\.float32.*torch\.bfloat16"):
        forward(half, cache, torch.full((3, 1), 7))


def test_a_mask_that_is_too_short(ours):
    """Of a growing cache; with fixed capacity the length lies on the device and is not read in every step."""
    cache = in_use(ours)
    with unchanged(ours, cache), pytest.raises(ValueError, match="attention_mask"):
        forward(ours, cache, torch.full((3, 2), 7), torch.ones(3, 20, dtype=torch.long))


def wide_config():
    module = need("deepseek_v3").load()
    dims = {"q_lora_rank": 24, "kv_lora_rank": 48, "qk_nope_head_dim": 20, "qk_rope_head_dim": 8, "v_head_dim": 12}
    return module.DeepseekV3Config(**TEXT, **dims, num_hidden_layers=3, first_k_dense_replace=3)


def test_a_cache_that_holds_another_models_tokens(ours):
    cache = in_use(ours)
    wide = build("deepseek_v3", "flash_mla", config=wide_config())
    with unchanged(ours, cache), pytest.raises(ValueError, match=r"32.*48"):
        forward(wide, cache, torch.full((3, 1), 7))


@pytest.mark.parametrize(
    "call",
    [
        lambda model, cache: forward(model, cache, prompt()["input_ids"]),
        lambda model, cache: model.generate(**prompt(), past_key_values=cache, max_new_tokens=3),
    ],
    ids=["forward", "generate"],
)
def test_a_new_cache_made_for_another_model(ours, call):
    wide = build("deepseek_v3", "flash_mla", config=wide_config())
    cache = PagedLatentCache(ours.config)
    with pytest.raises(ValueError, match=r"32.*48"):
        call(wide, cache)
    assert cache.get_seq_length() == 0
    assert cache.memory_report().pages_allocated == 0


def test_a_cache_with_fewer_layers_than_the_model(ours):
    """longcat_flash has 4 attentions with the same dims; the first three would fit."""
    cache = PagedLatentCache(ours.config)
    with pytest.raises(ValueError, match=r"3.*4|4.*3"):
        build("longcat_flash", "flash_mla").generate(**prompt(), past_key_values=cache, max_new_tokens=3)
    assert cache.get_seq_length() == 0


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
def test_a_cache_whose_config_says_another_attention(ours, attn):
    """Its layers hand out what only our attention function can read; the model that gets it runs another."""
    model = build("deepseek_v3", attn)
    with pytest.raises(ValueError, match="flash_mla"):
        forward(model, PagedLatentCache(ours.config), prompt()["input_ids"])


def test_a_cache_of_a_model_without_latents():
    with pytest.raises(ValueError, match=r"llama.*kv_lora_rank"):
        PagedLatentCache(LlamaConfig(**TEXT, num_hidden_layers=2))


@pytest.mark.parametrize("block_size", [0, -16, 8, 20, 16.0])
def test_block_size(ours, block_size):
    with pytest.raises(ValueError, match=rf"block_size.*{block_size}"):
        PagedLatentCache(ours.config, block_size)


@pytest.mark.parametrize("max_cache_len", [0, -1, 2.5])
def test_max_cache_len(ours, max_cache_len):
    with pytest.raises(ValueError, match=rf"max_cache_len.*{max_cache_len}"):
        PagedLatentCache(ours.config, max_cache_len=max_cache_len)


def test_fixed_capacity_keeps_its_batch(ours):
    cache = in_use(ours, 64)
    with unchanged(ours, cache), pytest.raises(ValueError, match=r"3.*6"):
        cache.batch_repeat_interleave(2)
    with unchanged(ours, cache), pytest.raises(ValueError, match=r"3.*2"):
        cache.batch_select_indices(torch.tensor([0, 2]))


def test_training_on_a_paged_cache():
    """The pages keep no gradients: silently training kv_a_proj on nothing would be worse than an error."""
    _, ours = pair("deepseek_v3")
    cache = PagedLatentCache(ours.config)
    with pytest.raises(ValueError, match="use_cache=False"):
        ours.train()(**prompt(), past_key_values=cache)
    assert cache.get_seq_length() == 0
