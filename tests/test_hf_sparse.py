"""Models with an indexer on paged latents: the tokens of eager in every mode of `generate`, never densely.

Faults it must catch: positions taken for rows of the pool, masked or future positions attended to, padding counted,
indexer keys left behind by beams, crops or copies, sinks forgotten, tokens of a shared layer stored twice.
"""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
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
    text_type,
)
from transformers import CompileConfig, DynamicCache

import flash_mla
from flash_mla import PagedLatentCache
from flash_mla.cache import SPARSE_IS_LATENT, PagedIndexedLayer
from flash_mla.hf import sparse

pytestmark = pytest.mark.skipif(
    not SPARSE_IS_LATENT,
    reason=f"Transformers {transformers.__version__} has no latents in the cache of a model with an indexer",
)

PAGED = [name for name in SPARSE_FAMILIES if name != "glm5_next"]
MODES = {
    "static": {"cache_implementation": "static"},
    "beams": {"num_beams": 3},
    "static beams": {"num_beams": 3, "cache_implementation": "static"},
    "several answers of beams": {"num_beams": 3, "num_return_sequences": 2},
    "chunks": {"prefill_chunk_size": 16},
    "static chunks": {"prefill_chunk_size": 16, "cache_implementation": "static"},
}


# Transformers' own cache of sliding layers fails in static chunks: it reserves keys of another shape.
ALL_MODES = [(name, mode) for name in PAGED for mode in MODES if (name, mode) != ("dots3_note_sparse", "static chunks")]


@pytest.mark.parametrize(("name", "mode"), ALL_MODES)
def test_modes(name, mode):
    """Left-padded rows, each against eager in the same mode: ties at the top-k boundary differ between modes."""
    need(name)
    eager, ours = pair(name)
    inputs = prompt()
    wanted = greedy(eager, inputs, **MODES[mode])
    flash_mla.reset_path_counts()
    assert greedy(ours, inputs, **MODES[mode]).tolist() == wanted.tolist()
    found = counted(text_type(ours))
    assert found["sparse"]
    assert "gathered" not in found


@pytest.mark.parametrize("name", ["deepseek_v32", "hy_v4", "mistral_large4"])
@pytest.mark.parametrize("lengths", [(61, 61), (61, 40)], ids=["unpadded", "left-padded"])
def test_a_short_prompt_is_expanded_and_masked(name, lengths, monkeypatch):
    family = need(name)
    monkeypatch.setattr(sparse, "_longest_expanded", lambda module, topk: 61)
    eager, ours = pair(name)
    inputs = prompt(lengths)
    wanted = greedy(eager, inputs)
    flash_mla.reset_path_counts()
    assert greedy(ours, inputs).tolist() == wanted.tolist()
    assert_paths(family.text_type, prefill=family.sparse, sparse=family.sparse * (NEW_TOKENS - 1))


def test_a_long_prompt_goes_in_slices(monkeypatch):
    monkeypatch.setattr(sparse, "SLICE_BYTES", 2 * 4 * (32 + 8 + 32) * 4 * 5)  # five tokens of two rows
    eager, ours = pair("deepseek_v32")
    inputs = prompt((61, 40))
    assert greedy(ours, inputs).tolist() == greedy(eager, inputs).tolist()


@pytest.mark.parametrize(("rank", "rope", "nope", "v", "topk", "longest"), [(512, 64, 128, 128, 2048, 13926)])
def test_where_expanding_ends_to_pay(rank, rope, nope, v, topk, longest):
    class Module:
        kv_lora_rank, qk_rope_head_dim, qk_nope_head_dim, v_head_dim = rank, rope, nope, v

    assert sparse._longest_expanded(Module, topk) == longest


@pytest.mark.parametrize("more", [{"prompt_lookup_num_tokens": 3}, {"assistant": True}], ids=["lookup", "assistant"])
def test_assisted_decoding(more):
    """Tokens that were drafted and refused are forgotten, by the indexer too."""
    eager, ours = pair("deepseek_v32")
    inputs = prompt((61,))
    drafts = {"assistant_model": build("deepseek_v32", seed=5)} if "assistant" in more else more
    assert greedy(ours, inputs, **drafts).tolist() == greedy(eager, inputs, **drafts).tolist()


@pytest.mark.parametrize("name", ["deepseek_v32", "glm_moe_dsa", "mistral_large4"])
def test_two_turns_on_one_cache(name):
    need(name)
    eager, ours = pair(name)
    first, second = prompt((61, 61)), prompt((9, 9), seed=1)
    answers = []
    for model, cache in (
        (eager, DynamicCache(config=eager.config.get_text_config(decoder=True))),
        (ours, PagedLatentCache(ours.config)),
    ):
        start = model.generate(**first, max_new_tokens=5, do_sample=False, past_key_values=cache)
        ids = torch.cat((start, second["input_ids"]), 1)
        answers.append(greedy(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, past_key_values=cache))
    assert answers[1].tolist() == answers[0].tolist()


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["deepseek_v32", "mistral_large4"])
def test_a_paged_cache_under_another_attention(name, attention):
    need(name)
    model = build(name, attention)
    inputs = prompt()
    wanted = greedy(model, inputs)
    assert greedy(model, inputs, past_key_values=PagedLatentCache(model.config)).tolist() == wanted.tolist()


def test_transformers_own_cache_keeps_the_dense_path():
    family = need("deepseek_v32")
    eager, ours = pair("deepseek_v32")
    inputs = prompt()
    wanted = greedy(eager, inputs)
    flash_mla.reset_path_counts()
    assert greedy(ours, inputs, past_key_values=DynamicCache(config=ours.config)).tolist() == wanted.tolist()
    assert_paths("deepseek_v32", dense=family.sparse * NEW_TOKENS)


@pytest.mark.parametrize("name", ["deepseek_v32", "mistral_large4"])
def test_what_the_cache_holds(name):
    """Real tokens once per layer that has its own; the indexer's keys as Transformers keeps them, padding included."""
    need(name)
    eager, ours = pair(name)
    options = {"max_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True}
    inputs = prompt()
    theirs = eager.generate(**inputs, **options).past_key_values
    cache = ours.generate(**inputs, **options).past_key_values
    assert cache.memory_report().tokens_used == 61 + 40 + 57 + 3 * 2
    own = [layer for layer in cache.layers if isinstance(layer, PagedIndexedLayer) and layer.state is not None]
    # The third layer of mistral_large4 reads what the first one stored.
    assert len(own) == 3
    real = torch.nn.functional.pad(inputs["attention_mask"], (0, 2), value=1).bool()
    for index, layer in enumerate(cache.layers):
        kept = getattr(theirs.layers[index], "indexer_keys", None)
        if kept is not None:
            torch.testing.assert_close(layer.indexer_keys[real], kept[real])


def test_tokens_of_a_shared_layer_are_stored_once(monkeypatch):
    need("mistral_large4")
    ours = build("mistral_large4", "flash_mla")
    appended = []
    original = flash_mla.ops.append
    monkeypatch.setattr(
        "flash_mla.ops.append", lambda pool, *rest, **more: (appended.append(id(pool)), original(pool, *rest, **more))
    )
    ours.generate(**prompt(), max_new_tokens=4, do_sample=False)
    assert len(appended) == 3 * 4
    assert len(set(appended)) == 3


def test_copied_cropped_and_reset():
    ours = build("deepseek_v32", "flash_mla")
    ids = prompt((30, 30))["input_ids"]
    cache = PagedLatentCache(ours.config, block_size=16)
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


@pytest.mark.parametrize("max_cache_len", [None, 64], ids=["growing", "fixed"])
def test_rows_are_chosen(max_cache_len):
    """Row i becomes another one, its indexer keys with it."""
    ours = build("deepseek_v32", "flash_mla")
    ids = prompt((30, 30, 30))["input_ids"]
    rows = torch.tensor([2, 0, 0])
    cache, swapped = (PagedLatentCache(ours.config, max_cache_len=max_cache_len) for _ in range(2))
    with torch.no_grad():
        ours(input_ids=ids, past_key_values=cache)
        cache.reorder_cache(rows)
        ours(input_ids=ids[rows], past_key_values=swapped)
        last = ids[:, :1]
        torch.testing.assert_close(
            ours(input_ids=last, past_key_values=cache).logits, ours(input_ids=last, past_key_values=swapped).logits
        )


def test_an_up_projection_that_is_no_matrix():
    """With a bias the context is gathered and expanded; what the indexer chose stays chosen."""
    eager, ours = pair("deepseek_v32")
    for model in (eager, ours):
        for layer in model.model.layers:
            linear = layer.self_attn.kv_b_proj
            linear.bias = torch.nn.Parameter(torch.linspace(-1, 1, linear.out_features))
    inputs = prompt()
    wanted = greedy(eager, inputs)
    assert_varied(wanted)
    flash_mla.reset_path_counts()
    assert greedy(ours, inputs).tolist() == wanted.tolist()
    assert set(counted("deepseek_v32")) == {"gathered"}


def test_fp8_rows(monkeypatch):
    """Sparse attention reads what was rounded: other tokens than without, the same growing and at fixed capacity."""
    monkeypatch.setattr(sparse, "_longest_expanded", lambda module, topk: 0)
    family = need("deepseek_v32")
    config = family.config(family.load())
    config.kv_lora_rank = 128
    ours = build("deepseek_v32", "flash_mla", config=config)
    inputs = prompt()
    options = {"cache_config": {"dtype": "fp8"}}
    plain = greedy(ours, inputs)
    flash_mla.reset_path_counts()
    rounded = greedy(ours, inputs, **options)
    assert set(counted("deepseek_v32")) == {"sparse"}
    assert rounded.tolist() != plain.tolist()
    assert greedy(ours, inputs, **options, cache_implementation="static").tolist() == rounded.tolist()


def test_a_mask_is_needed():
    ours = build("deepseek_v32", "flash_mla")
    module = ours.model.layers[0].self_attn
    cache = PagedLatentCache(ours.config)
    new, _ = cache.update(torch.ones(1, 1, 1, 32), torch.ones(1, 1, 1, 8), 0)
    with pytest.raises(ValueError, match="needs the mask that its indexer saw, got None"):
        sparse.sparse(module, torch.ones(1, 4, 1, 28), new, None, 0.0, 0.1, {"indices": torch.zeros(1, 1, 8).int()})
    assert cache.get_seq_length() == 0


def test_a_mask_of_another_width_stores_nothing():
    ours = build("deepseek_v32", "flash_mla")
    ids = prompt((30, 30))["input_ids"]
    cache = PagedLatentCache(ours.config)
    with torch.no_grad():
        ours(input_ids=ids, past_key_values=cache)
    new, _ = cache.update(torch.ones(2, 1, 1, 32), torch.ones(2, 1, 1, 8), 0)
    module, mask = ours.model.layers[0].self_attn, torch.ones(2, 1, 1, 29, dtype=torch.bool)
    for wrong in (mask, mask[..., :1], torch.ones(2, 4, 1, 31, dtype=torch.bool)):  # short, one position, by head
        with pytest.raises(ValueError, match=r"attention_mask must be .*num_heads=1 or 1.*one of \[31\] positions\]"):
            sparse.sparse(
                module, torch.ones(2, 4, 1, 28), new, wrong, 0.0, 0.1, {"indices": torch.zeros(2, 1, 8).int()}
            )
    assert cache.get_seq_length() == 30


def test_an_additive_mask_is_added():
    """Finite biases say more than what is visible: the context is gathered, as for any mask of one's own."""
    eager, ours = pair("deepseek_v32")
    for model in (eager, ours):
        for layer in model.model.layers:
            layer.self_attn.indexer.index_topk = 64  # no ties at its boundary
    ids = prompt((30, 30))["input_ids"]
    bias = torch.zeros(2, 1, 1, 31).index_fill_(3, torch.arange(0, 31, 2), -3.0)
    logits = []
    for model, cache in ((eager, DynamicCache(config=eager.config)), (ours, PagedLatentCache(ours.config))):
        with torch.no_grad():
            model(input_ids=ids, past_key_values=cache)
            logits.append(model(input_ids=ids[:, :1], past_key_values=cache, attention_mask=bias).logits)
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-3, atol=1e-3)


class OddLinear(torch.nn.Linear):
    """Not plain: its matrix is found by applying it."""


@pytest.mark.parametrize("more", [{}, {"cache_implementation": "static"}, {"compiled": True}], ids=str)
def test_layers_that_share_latents_have_their_own_matrices(more):
    need("mistral_large4")
    eager, ours = pair("mistral_large4")
    for layer in ours.model.language_model.layers:
        layer.self_attn.kv_b_proj.__class__ = OddLinear
    inputs = prompt()
    if more.pop("compiled", False):
        torch._dynamo.reset()
        config = CompileConfig(backend="aot_eager", mode="default")
        config._compile_all_devices = True
        more = {"cache_implementation": "static", "compile_config": config}
    wanted = greedy(eager, inputs, **{key: value for key, value in more.items() if key != "compile_config"})
    assert greedy(ours, inputs, **more).tolist() == wanted.tolist()


@pytest.mark.parametrize("name", ["deepseek_v32", "mistral_large4"])
def test_rows_are_repeated(name):
    need(name)
    ours = build(name, "flash_mla")
    ids = prompt((30, 30))["input_ids"]
    rows = torch.tensor([0, 0, 1, 1])
    cache, whole = PagedLatentCache(ours.config), PagedLatentCache(ours.config)
    with torch.no_grad():
        ours(input_ids=ids, past_key_values=cache)
        cache.batch_repeat_interleave(2)
        ours(input_ids=ids[rows], past_key_values=whole)
        last = ids[rows, :1]
        torch.testing.assert_close(
            ours(input_ids=last, past_key_values=cache).logits, ours(input_ids=last, past_key_values=whole).logits
        )


@pytest.mark.parametrize("max_cache_len", [None, 64], ids=["growing", "fixed"])
def test_a_forward_that_stops_behind_the_indexer_is_found_out(max_cache_len):
    ours = build("deepseek_v32", "flash_mla")
    ids = prompt((30, 30))["input_ids"]
    cache = PagedLatentCache(ours.config, max_cache_len=max_cache_len)
    with torch.no_grad():
        ours(input_ids=ids, past_key_values=cache)
        with pytest.raises(RuntimeError, match="size"):
            ours(input_ids=ids[:, :1], past_key_values=cache, attention_mask=torch.ones(2, 1, 1, 29).bool())
        with pytest.raises(ValueError, match=r"stopped in layer 0 between its indexer and its attention.*reset\(\)"):
            ours(input_ids=ids[:, :1], past_key_values=cache)
        cache.reset()
        found = ours(input_ids=ids, past_key_values=cache).logits
        torch.testing.assert_close(found, ours(input_ids=ids, use_cache=False).logits, rtol=1e-3, atol=1e-3)


def test_a_fixed_cache_goes_from_mode_to_mode():
    ours = build("deepseek_v32", "flash_mla")
    ids = prompt((30, 30))["input_ids"]
    cache, other = (PagedLatentCache(ours.config, max_cache_len=64) for _ in range(2))
    with torch.inference_mode():
        ours(input_ids=ids, past_key_values=cache)
    with torch.no_grad():
        ours(input_ids=ids, past_key_values=other)
        found = ours(input_ids=ids[:, :1], past_key_values=cache).logits
        torch.testing.assert_close(found, ours(input_ids=ids[:, :1], past_key_values=other).logits)


def test_an_indexer_past_the_capacity_writes_nowhere_else():
    """A compiled step cannot ask for room; `validate` tells afterwards."""
    layer = PagedLatentCache(build("deepseek_v32", "flash_mla").config, max_cache_len=4).layers[0]
    keys = layer.update_indexer(torch.arange(8.0).view(2, 4, 1))
    layer.update_indexer(torch.full((2, 1, 1), 9.0))
    assert keys[:, :, 0].tolist() == [[0, 1, 2, 9], [4, 5, 6, 9]]


def test_a_step_finds_its_slots_once(monkeypatch):
    """The mask is applied once per forward; layers with another one's choice take its slots."""
    need("glm_moe_dsa")
    ours = build("glm_moe_dsa", "flash_mla")
    made = []
    original = torch.nn.functional.pad
    monkeypatch.setattr("torch.nn.functional.pad", lambda *args, **more: (made.append(1), original(*args, **more))[1])
    slots = []
    decode = flash_mla.ops.sparse_decode
    monkeypatch.setattr(
        "flash_mla.ops.sparse_decode",
        lambda q, pool, named, **more: (slots.append(named), decode(q, pool, named, **more))[1],
    )
    ours.generate(**prompt(), max_new_tokens=3, do_sample=False)
    first, second, third = slots[-3:]  # full, shared, full
    assert first is second
    assert third is not second
    assert len(made) == 2
