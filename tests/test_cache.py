"""PagedLatentCache by itself: what is shared, what is reported, what is refused."""

import copy
import gc
import weakref

import pytest
import torch
from transformers import DeepseekV3Config, LlamaConfig

from flash_mla import PagedLatentCache
from flash_mla.cache import PagedLatentLayer

RANK, ROPE, BLOCK = 8, 4, 16


def config(attention: str = "flash_mla", layers: int = 2) -> DeepseekV3Config:
    made = DeepseekV3Config(
        num_hidden_layers=layers, kv_lora_rank=RANK, qk_rope_head_dim=ROPE, num_attention_heads=2, num_key_value_heads=2
    )
    made._attn_implementation = attention
    return made


def store(cache: PagedLatentCache, batch: int, seqlen_q: int, valid: torch.Tensor | None = None, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for index in range(len(cache.layers)):
        latent = torch.randn(batch, 1, seqlen_q, RANK, generator=generator)
        k_rope = torch.randn(batch, 1, seqlen_q, ROPE, generator=generator)
        handle, _ = cache.update(latent, k_rope, index)
        handle.layer.write(handle, valid)


def everything(cache: PagedLatentCache) -> list[torch.Tensor]:
    return [torch.cat(layer.gather(), dim=-1) for layer in cache.paged_layers]


def test_diverging_beams_share_every_full_page():
    cache = PagedLatentCache(config(), block_size=BLOCK)
    store(cache, 1, 5 * BLOCK + 3)
    assert cache.memory_report().pages_allocated == 6
    cache.batch_repeat_interleave(2)
    assert cache.memory_report().pages_allocated == 6, "a fork copies nothing"
    before = everything(cache)
    store(cache, 2, 1, seed=1)
    report = cache.memory_report()
    assert report.pages_allocated == 7, "one more page: the tail that the beams now fill differently"
    table = cache.layers[0].state.block_table
    assert torch.equal(table[0, :5], table[1, :5])
    assert table[0, 5] != table[1, 5]
    for old, new in zip(before, everything(cache), strict=True):
        assert torch.equal(old, new[:, :, :-1])
        assert not torch.equal(new[0, :, -1], new[1, :, -1])


def test_return_sequences_share_their_prompt():
    cache = PagedLatentCache(config(), block_size=BLOCK, prompt_repeats=4)
    prompt = torch.randn(1, 1, 40, RANK).expand(4, -1, -1, -1)
    for chunk in prompt.split(25, dim=2):  # a prompt in chunks is still one prompt
        for index in range(2):
            handle, _ = cache.update(chunk, chunk[..., :ROPE], index)
            handle.layer.write(handle, None)
    assert cache.memory_report().pages_allocated == 3
    store(cache, 4, 1)
    assert cache.memory_report().pages_allocated == 2 + 4
    latent, _ = cache.layers[1].gather()
    assert torch.equal(latent[:, :, :40], prompt)


def test_padding_takes_no_page():
    cache = PagedLatentCache(config(), block_size=BLOCK)
    valid = torch.ones(3, 64, dtype=torch.bool)
    valid[0, :60] = False
    valid[1, :30] = False
    store(cache, 3, 64, valid)
    report = cache.memory_report()
    assert (report.pages_allocated, report.tokens_used, report.tokens_padded) == (1 + 3 + 4, 4 + 34 + 64, 192)
    row = (RANK + ROPE) * 4
    assert report.bytes_padded == 2 * 192 * row
    assert report.bytes_allocated == 2 * (report.pages_total + 1) * BLOCK * row
    assert int(cache.get_seq_length()) == 64


def test_deepcopy_is_independent_and_follows_the_same_model():
    made = config()
    cache = PagedLatentCache(made, block_size=BLOCK)
    store(cache, 2, 20)
    clone = copy.deepcopy(cache)
    before = everything(cache)
    store(clone, 2, 1, seed=2)
    assert int(cache.get_seq_length()) == 20
    for old, new in zip(before, everything(cache), strict=True):
        assert torch.equal(old, new)
    assert clone.layers[0].state is clone.layers[1].state is not cache.layers[0].state
    made._attn_implementation = "sdpa"
    assert clone.group.attention == cache.group.attention == "sdpa"


def test_a_dropped_cache_frees_its_pools_without_the_collector():
    cache = PagedLatentCache(config(), block_size=BLOCK)
    store(cache, 1, 20)
    pool = weakref.ref(cache.layers[0].kv_cache)
    gc.disable()
    try:
        del cache
        assert pool() is None
    finally:
        gc.enable()


def test_validate_sees_a_wrong_page_and_a_wrong_length():
    cache = PagedLatentCache(config(), block_size=BLOCK)
    store(cache, 2, 20)
    state = cache.layers[0].state
    good = state.block_table.clone()
    state.block_table[1, 0] = 99
    with pytest.raises(ValueError, match=r"block_table\[1, 0\] = 99 is not a page"):
        cache.validate()
    state.block_table = good
    state.cache_seqlens[0] = 21
    with pytest.raises(ValueError, match="row 0 holds 21 tokens"):
        cache.memory_report()


def test_a_fixed_cache_holds_its_capacity_and_not_more():
    cache = PagedLatentCache(config(), block_size=BLOCK, max_cache_len=20)
    store(cache, 2, 20)
    before = everything(cache)
    with pytest.raises(ValueError, match="max_cache_len=20 positions are the capacity, 20 are filled and 1 more"):
        store(cache, 2, 1)
    assert int(cache.get_seq_length()) == 20
    for old, new in zip(before, everything(cache), strict=True):
        assert torch.equal(old, new)
    cache.crop(-1)
    store(cache, 2, 1)
    cache.validate()


def test_reset_lets_another_batch_in_only_where_the_cache_grows():
    cache = PagedLatentCache(config(), block_size=BLOCK)
    store(cache, 2, 20)
    cache.reset()
    assert cache.memory_report().pages_allocated == 0
    store(cache, 3, 5)
    assert cache.batch_size == 3
    fixed = PagedLatentCache(config(), block_size=BLOCK, max_cache_len=32)
    store(fixed, 2, 20)
    fixed.reset()
    with pytest.raises(ValueError, match="batch of 2, got 3"):
        store(fixed, 3, 5)


def test_a_fixed_cache_keeps_its_addresses():
    cache = PagedLatentCache(config(), block_size=BLOCK, max_cache_len=64)
    store(cache, 2, 20)
    state = cache.layers[0].state

    def tensors() -> list[torch.Tensor]:
        return [cache.layers[0].kv_cache, state.block_table, state.cache_seqlens, state.seen, state.history]

    addresses = [tensor.data_ptr() for tensor in tensors()]
    store(cache, 2, 1)
    cache.reorder_cache(torch.tensor([1, 1]))
    cache.crop(-3)
    cache.reset()
    store(cache, 2, 4)
    assert [tensor.data_ptr() for tensor in tensors()] == addresses


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"block_size": 24}, "block_size must be a multiple of 16, got 24"),
        ({"block_size": 0}, "block_size must be a multiple of 16, got 0"),
        ({"max_cache_len": 0}, "max_cache_len must be at least 1, got 0"),
        ({"prompt_repeats": 0}, "prompt_repeats must be at least 1, got 0"),
        ({"backend": "cutlass"}, "backend must be one of .* got 'cutlass'"),
    ],
)
def test_bad_options(arguments, message):
    with pytest.raises(ValueError, match=message):
        PagedLatentCache(config(), **arguments)


def test_a_model_without_latents_is_refused():
    with pytest.raises(ValueError, match="'llama' has no kv_lora_rank"):
        PagedLatentCache(LlamaConfig(num_hidden_layers=1))


def test_bad_latents_change_nothing():
    cache = PagedLatentCache(config(), block_size=BLOCK)
    store(cache, 2, 20)
    good = torch.zeros(2, 1, 1, RANK), torch.zeros(2, 1, 1, ROPE)
    cases = [
        (good[0].expand(-1, 4, -1, -1), good[1].expand(-1, 4, -1, -1), r"got \(2, 4, 1, 8\)"),
        (torch.zeros(2, 1, 1, RANK + 1), good[1], "kv_lora_rank=8 columns, got 9"),
        (good[0], torch.zeros(2, 1, 1, ROPE + 2), r"got 8 \+ 6: a cache of another model"),
        (good[0].double(), good[1].double(), "holds torch.float32 on cpu, got torch.float64"),
        (torch.zeros(3, 1, 1, RANK), torch.zeros(3, 1, 1, ROPE), "holds a batch of 2, got 3"),
    ]
    for latent, k_rope, message in cases:
        with pytest.raises(ValueError, match=message):
            cache.update(latent, k_rope, 0)
    assert int(cache.get_seq_length()) == 20
    cache.validate()


def test_crop_wants_a_negative_count_that_is_there():
    cache = PagedLatentCache(config(), block_size=BLOCK)
    store(cache, 2, 20)
    for wrong in (3, -21):
        with pytest.raises(ValueError, match=f"at most the 20 that are there, got {wrong}"):
            cache.crop(wrong)
    assert int(cache.get_seq_length()) == 20


def test_only_plain_attention_layers_are_paged():
    kimi = pytest.importorskip("transformers.models.kimi_linear", reason="Transformers has no module kimi_linear")
    made = kimi.KimiLinearConfig()
    cache = PagedLatentCache(made)
    paged = [isinstance(layer, PagedLatentLayer) for layer in cache.layers]
    assert paged == [kind == "full_attention" for kind in made.layer_types]
    assert 0 < sum(paged) < len(paged)


def test_eager_and_sdpa_get_the_whole_context_in_padded_order():
    made = config("sdpa")
    cache = PagedLatentCache(made, block_size=BLOCK)
    first, second = torch.randn(2, 1, 20, RANK), torch.randn(2, 1, 3, RANK)
    for index in range(2):
        cache.update(first, first[..., :ROPE], index)
    for index in range(2):
        latent, k_rope = cache.update(second, second[..., :ROPE], index)
        assert torch.equal(latent, torch.cat((first, second), dim=2))
        assert torch.equal(k_rope, latent[..., :ROPE])
    assert cache.get_mask_sizes(1, 0) == (24, 0)
