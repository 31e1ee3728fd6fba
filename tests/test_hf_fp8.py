"""A cache of FP8 rows through `generate`: the tokens of a model whose latents went through the codec, and nothing else.

Faults it must catch: rows read with the wrong scales or shifted columns, a prompt that reads its own rounded latents, a
step that does not, bf16 pages under the name of FP8, options that nobody obeys.
"""

from __future__ import annotations

import copy
import importlib

import pytest
import torch
from tiny_models import MLA, MOE, NEW_TOKENS, TEXT, assert_paths, assert_varied, build, greedy, need, prompt
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

import flash_mla
from flash_mla import PagedLatentCache
from flash_mla.codec import decode_rows, encode_rows

FP8 = {"cache_config": {"dtype": "fp8"}}
RANK = 128  # what an FP8 row takes


def config_of(rank: int = RANK):
    module = importlib.import_module("transformers.models.deepseek_v3")
    mla = {**MLA, "kv_lora_rank": rank}
    return module.DeepseekV3Config(**TEXT, **MOE, **mla, num_hidden_layers=3, first_k_dense_replace=2)


def model_of(attn: str, rank: int = RANK):
    return build("deepseek_v3", attn, config=config_of(rank))


class ThroughTheCodec(DynamicLayer):
    """Latents rounded as FP8 rows when they are stored; more than `as_stored` new ones are seen as they came."""

    def __init__(self, as_stored: int) -> None:
        super().__init__()
        self.as_stored = as_stored

    def update(self, key_states, value_states, *args, **kwargs):
        rows = encode_rows(key_states, value_states)
        rounded = decode_rows(rows, key_states.shape[-1], value_states.shape[-1], key_states.dtype)
        new, is_prompt = key_states.shape[2], not self.get_seq_length()
        keys, values = super().update(*rounded, *args, **kwargs)
        if new == 1 or (new <= self.as_stored and not is_prompt):
            return keys, values
        return torch.cat((keys[:, :, :-new], key_states), 2), torch.cat((values[:, :, :-new], value_states), 2)


def rounding_cache(config, as_stored: int = 1) -> DynamicCache:
    cache = DynamicCache(config=config)
    cache.layers = [ThroughTheCodec(as_stored) for _ in cache.layers]
    return cache


def expected(inputs, as_stored: int = 1, **more):
    eager = model_of("eager")
    return greedy(eager, inputs, past_key_values=rounding_cache(eager.config, as_stored), **more)


BATCHES = {"unpadded": (61, 61, 61), "left-padded": (61, 40, 57)}


@pytest.mark.parametrize("more", [{}, {"cache_implementation": "static"}], ids=["growing", "static"])
@pytest.mark.parametrize("lengths", BATCHES.values(), ids=BATCHES)
def test_tokens_are_those_of_rounded_latents(lengths, more):
    inputs = prompt(lengths)
    wanted = expected(inputs)
    assert_varied(wanted)
    ours = model_of("flash_mla")
    flash_mla.reset_path_counts()
    assert greedy(ours, inputs, **FP8, **more).tolist() == wanted.tolist()
    assert_paths("deepseek_v3", prefill=3, absorbed=3 * (NEW_TOKENS - 1))


def test_rounding_matters_here():
    """Else bf16 or fp32 pages would pass the test above."""
    inputs = prompt()
    assert greedy(model_of("flash_mla"), inputs).tolist() != expected(inputs).tolist()


@pytest.mark.parametrize("longest", [3, 100], ids=["sliced", "absorbed"])
@pytest.mark.parametrize("chunk", [16, 25])
def test_prompt_in_chunks(chunk, longest, monkeypatch):
    """The context is what was stored. A long chunk sees its own tokens as they came, an absorbed one as stored."""
    monkeypatch.setattr("flash_mla.hf.attention._longest_absorbed", lambda module: longest)
    inputs = prompt((61, 61, 61))
    ours = model_of("flash_mla")
    flash_mla.reset_path_counts()
    found = greedy(ours, inputs, prefill_chunk_size=chunk, **FP8)
    chunks = 3 * (-(-61 // chunk) - 1)  # on a context, over all layers
    on_context = {"sliced": chunks} if longest == 3 else {"absorbed": chunks}
    steps = {"absorbed": on_context.get("absorbed", 0) + 3 * (NEW_TOKENS - 1)}
    assert_paths("deepseek_v3", prefill=3, **{**on_context, **steps})
    assert found.tolist() == expected(inputs, as_stored=longest, prefill_chunk_size=chunk).tolist()


@pytest.mark.parametrize("more", [{"num_beams": 3}, {"num_beams": 3, "cache_implementation": "static"}], ids=str)
def test_beams(more):
    inputs = prompt((61, 40))
    eager, ours = model_of("eager"), model_of("flash_mla")
    cache = rounding_cache(eager.config)
    wanted = greedy(eager, inputs, past_key_values=cache, num_beams=3)
    assert greedy(ours, inputs, **FP8, **more).tolist() == wanted.tolist()


def test_a_cache_of_ones_own_over_two_turns():
    eager, ours = model_of("eager"), model_of("flash_mla")
    first, second = prompt((61, 61)), prompt((9, 9), seed=1)
    both = rounding_cache(eager.config, as_stored=100), PagedLatentCache(ours.config, dtype="fp8")
    answers = []
    for model, cache in zip((eager, ours), both, strict=True):
        start = model.generate(**first, max_new_tokens=5, do_sample=False, past_key_values=cache)
        ids = torch.cat((start, second["input_ids"]), 1)
        answers.append(greedy(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, past_key_values=cache))
    assert answers[1].tolist() == answers[0].tolist()
    assert both[1].dtype == "fp8"


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_under_another_attention(attention):
    """Stored and read back as FP8 too: every attention sees rounded latents, a prompt's own among them."""
    model = model_of(attention)
    inputs = prompt((61, 61))
    cache = PagedLatentCache(model.config, dtype="fp8")
    found = greedy(model, inputs, past_key_values=cache)
    plain = DynamicCache(config=model.config)

    class Rounded(DynamicLayer):
        def update(self, key_states, value_states, *args, **kwargs):
            rows = encode_rows(key_states, value_states)
            rounded = decode_rows(rows, key_states.shape[-1], value_states.shape[-1], key_states.dtype)
            return super().update(*rounded, *args, **kwargs)

    plain.layers = [Rounded() for _ in plain.layers]
    assert found.tolist() == greedy(model, inputs, past_key_values=plain).tolist()


def test_pages_are_bytes():
    ours = model_of("flash_mla")
    output = ours.generate(**prompt(), max_new_tokens=3, return_dict_in_generate=True, **FP8)
    cache = output.past_key_values
    row_bytes = 160  # 128 + 4 + 2 x 8 = 148, padded
    for layer in cache.paged_layers:
        assert layer.kv_cache.dtype == torch.uint8
        assert layer.kv_cache.shape[1:] == (64, 1, row_bytes)
    report = cache.memory_report()
    assert report.bytes_allocated == 3 * (report.pages_total + 1) * 64 * row_bytes
    assert report.bytes_padded == 3 * 3 * 63 * (128 + 8) * 4


def test_cropped_copied_and_reset():
    ours = model_of("flash_mla")
    inputs = prompt((30, 30))
    ids = inputs["input_ids"]
    cache = PagedLatentCache(ours.config, dtype="fp8", block_size=16)
    with torch.no_grad():
        ours(input_ids=ids, past_key_values=cache)
        kept = copy.deepcopy(cache)
        wanted = ours(input_ids=ids[:, :1], past_key_values=cache).logits
        cache.crop(-1)
        assert torch.equal(ours(input_ids=ids[:, :1], past_key_values=cache).logits, wanted)
        assert torch.equal(ours(input_ids=ids[:, :1], past_key_values=kept).logits, wanted)
        cache.reset()
        ours(input_ids=ids, past_key_values=cache)
        assert torch.equal(ours(input_ids=ids[:, :1], past_key_values=cache).logits, wanted)


def test_page_size_is_obeyed():
    ours = model_of("flash_mla")
    options = {"cache_config": {"dtype": "fp8", "block_size": 16, "backend": "torch"}}
    output = ours.generate(**prompt(), max_new_tokens=3, return_dict_in_generate=True, **options)
    assert output.past_key_values.block_size == 16
    assert output.past_key_values.group.backend == "torch"
    # The user's dict is not used up: the next call says the same.
    assert options == {"cache_config": {"dtype": "fp8", "block_size": 16, "backend": "torch"}}


WRONG = {
    "an unknown key": ({"nbits": 4}, r"cache_config of a paged cache takes backend, block_size, dtype, got nbits"),
    "an unknown dtype": ({"dtype": "int4"}, r"dtype must be 'fp8', or None for that of the model, got 'int4'"),
    "a page of 24": ({"block_size": 24}, r"block_size must be a multiple of 16, got 24"),
    "no dict": (["fp8"], r"cache_config must be a dict of backend, block_size, dtype, got list"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_options(name):
    options, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        model_of("flash_mla").generate(**prompt((9, 5)), max_new_tokens=3, cache_config=options)


NOWHERE = {
    "no cache": ({"use_cache": False}, "use_cache=False"),
    "Transformers' cache": ({"past_key_values": "dynamic"}, "a cache was given"),
}


@pytest.mark.parametrize("name", NOWHERE)
def test_options_that_nobody_would_obey(name):
    more, message = NOWHERE[name]
    model = model_of("flash_mla")
    caches = {"dynamic": DynamicCache(config=model.config)}
    more = {key: caches.get(value, value) for key, value in more.items()}
    with pytest.raises(ValueError, match=f"makes none here: {message}"):
        model.generate(**prompt((9, 5)), max_new_tokens=3, **FP8, **more)


def test_options_of_a_second_turn():
    """They describe the cache that is given, as a generation config of every turn does; or are refused."""
    model = model_of("flash_mla")
    model.generation_config.cache_config = {"dtype": "fp8", "block_size": 16}
    first = model.generate(**prompt((9, 9)), max_new_tokens=3, return_dict_in_generate=True)
    ids, cache = first.sequences, first.past_key_values
    again = model.generate(input_ids=ids, max_new_tokens=3, past_key_values=cache)
    assert again.shape[1] == ids.shape[1] + 3
    with pytest.raises(ValueError, match="asks for block_size=64, the cache that was given has 16"):
        model.generate(input_ids=again, max_new_tokens=3, past_key_values=cache, cache_config={"block_size": 64})
    with pytest.raises(ValueError, match="asks for dtype='fp8', the cache that was given has None"):
        model.generate(**prompt((9, 5)), max_new_tokens=3, past_key_values=PagedLatentCache(model.config), **FP8)


@pytest.mark.parametrize("assistant_rank", [RANK, 32])
def test_assisted_decoding(assistant_rank):
    """The assistant is handed the main model's options and does not take them: what it drafts is only a draft."""
    ours, inputs = model_of("flash_mla"), prompt((61,))
    module = importlib.import_module("transformers.models.deepseek_v3")
    config = module.DeepseekV3Config(
        **TEXT, **MOE, **{**MLA, "kv_lora_rank": assistant_rank}, num_hidden_layers=3, first_k_dense_replace=2
    )
    assistant = build("deepseek_v3", "flash_mla", seed=5, config=config)
    wanted = expected(inputs, as_stored=100, assistant_model=assistant)
    assert greedy(ours, inputs, assistant_model=assistant, **FP8).tolist() == wanted.tolist()


def test_a_family_with_its_own_cache_says_so():
    need("glm5_next")
    model = build("glm5_next", "flash_mla")
    with pytest.raises(ValueError, match="glm5_next_text keeps Transformers' own cache"):
        model.generate(**prompt((9, 5)), max_new_tokens=3, **FP8)


def test_latents_that_fp8_rows_do_not_hold():
    model = model_of("flash_mla", rank=32)
    with pytest.raises(ValueError, match=r"dtype='fp8' needs a kv_lora_rank that 128 divides, got 32 in .*deepseek_v3"):
        model.generate(**prompt((9, 5)), max_new_tokens=3, **FP8)
    with pytest.raises(ValueError, match="needs a kv_lora_rank that 128 divides, got 32"):
        PagedLatentCache(model.config, dtype="fp8")
