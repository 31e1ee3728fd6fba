"""Every MLA family: the same greedy tokens as eager, by the path that was meant.

Faults it must catch: padding stored as tokens, W_UK or W_UV with heads or halves swapped, lengths off by one, pages
mixed up at a page boundary, a family's scale or rotation applied twice, a left-padded batch run without a mask, sparse
attention run densely, sinks forgotten, a vision tower whose images see each other.
"""

from __future__ import annotations

import logging

import pytest
import torch
from tiny_models import (
    IMAGE_TOKEN,
    NEW_TOKENS,
    PAGED_FAMILIES,
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

import flash_mla

BATCHES = {"unpadded": (61, 61, 61), "left-padded": (61, 40, 57)}


def same_tokens(name, inputs):
    """Greedy tokens of both, compared; returns (eager model, our model)."""
    eager, ours = pair(name)
    expected = greedy(eager, inputs)
    assert_varied(expected)
    flash_mla.reset_path_counts()
    assert greedy(ours, inputs).tolist() == expected.tolist()
    return eager, ours


@pytest.mark.parametrize("lengths", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize("name", PAGED_FAMILIES)
def test_greedy_tokens_are_those_of_eager(name, lengths):
    family = need(name)
    same_tokens(name, prompt(lengths))
    assert_paths(
        family.text_type,
        prefill=family.paged,
        absorbed=family.paged * (NEW_TOKENS - 1),
        dense=family.dense * NEW_TOKENS,
    )


@pytest.mark.parametrize("lengths", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize("name", SPARSE_FAMILIES)
def test_sparse_attention_stays_sparse(name, lengths):
    """Prompt included: its 61 tokens are more than the 28 up to which top-k of 8 would be expanded and masked."""
    family = need(name)
    same_tokens(name, prompt(lengths))
    assert_paths(family.text_type, **family.paths(NEW_TOKENS))


@pytest.mark.parametrize("name", SPARSE_FAMILIES)
def test_top_k_matters_here(name):
    """The parity above would also hold for a model that ignores its indexer if top-k covered the context."""
    family = need(name)
    config = family.config(family.load())
    config.get_text_config(decoder=True).index_topk = 128
    sparse, dense = build(name), build(name, config=config)
    dense.load_state_dict(sparse.state_dict())
    inputs = prompt()
    assert greedy(sparse, inputs).tolist() != greedy(dense, inputs).tolist()


def test_a_family_with_its_own_cache_says_so_once(caplog):
    ours = build("glm5_next", "flash_mla")
    flash_mla.unregister()
    flash_mla.register()  # forgets what other tests were told already
    with caplog.at_level(logging.WARNING, logger="flash_mla"):
        for _ in range(2):
            output = ours.generate(**prompt((9, 5)), max_new_tokens=3, return_dict_in_generate=True)
    assert not isinstance(output.past_key_values, flash_mla.PagedLatentCache)
    told = [record.getMessage() for record in caplog.records if record.name.startswith("flash_mla")]
    assert len(told) == 1
    assert "glm5_next" in told[0]


def test_sliding_layers_keep_transformers_own_cache():
    ours = build("dots3_note", "flash_mla")
    output = ours.generate(**prompt(), max_new_tokens=3, return_dict_in_generate=True)
    cache = output.past_key_values
    assert isinstance(cache, flash_mla.PagedLatentCache)
    kinds = [type(layer).__name__ for layer in cache.layers]
    assert kinds[0] == kinds[2] == "PagedLatentLayer"
    assert kinds[1] == kinds[3] == "DynamicSlidingWindowLayer"


def test_padding_is_not_stored():
    """61 + 40 + 57 prompt tokens and two decoded ones per row, not three rows of the longest prompt."""
    ours = build("deepseek_v3", "flash_mla")
    output = ours.generate(**prompt(), max_new_tokens=3, return_dict_in_generate=True)
    report = output.past_key_values.memory_report()
    assert report.tokens_used == 61 + 40 + 57 + 3 * 2
    assert report.block_size == 64
    assert report.pages_allocated == 3
    assert output.past_key_values.get_seq_length() == 61 + 2


def picture_prompt():
    """Two rows with pictures of different size, left-padded; the second row has two of them."""
    generator = torch.Generator().manual_seed(1)
    grid = torch.tensor([[1, 4, 4], [1, 2, 4], [1, 2, 2]])
    tokens_of = [int(t * h * w) // 4 for t, h, w in grid.tolist()]

    def words(n):
        return torch.randint(1, IMAGE_TOKEN, (n,), generator=generator).tolist()

    def picture(i):
        return [IMAGE_TOKEN] * tokens_of[i]

    rows = [[*words(5), *picture(0), *words(6)], [*words(3), *picture(1), *words(2), *picture(2), *words(4)]]
    width = max(map(len, rows))
    return {
        "input_ids": torch.tensor([[0] * (width - len(row)) + row for row in rows]),
        "attention_mask": torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows]),
        "pixel_values": torch.randn(int(grid.prod(-1).sum()), 3, 2, 2, generator=generator),
        "image_grid_thw": grid,
    }


@pytest.mark.parametrize(
    "attn", ["flash_mla", {"text_config": "flash_mla", "vision_config": "sdpa"}], ids=["everywhere", "text-only"]
)
def test_pictures_do_not_see_each_other(attn):
    """A name with "flash" in it makes the vision tower pack all pictures into one call with `cu_seq_lens_q`."""
    eager, ours = build("kimi_k25"), build("kimi_k25", attn)
    inputs = picture_prompt()
    expected = greedy(eager, inputs)
    assert_varied(expected)
    flash_mla.reset_path_counts()
    assert greedy(ours, inputs).tolist() == expected.tolist()
    assert_paths("deepseek_v3", prefill=3, absorbed=3 * (NEW_TOKENS - 1))
    assert counted("kimi_k25_vision") == ({"dense": 2} if attn == "flash_mla" else {})
