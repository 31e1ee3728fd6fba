"""Chunks of a prompt on a context: attention in parts, put together by their log-sums."""

from __future__ import annotations

import itertools

import pytest
import torch
from tiny_models import NEW_TOKENS, assert_paths, assert_varied, greedy, pair, prompt
from transformers import DynamicCache

import flash_mla
from flash_mla import PagedLatentCache
from flash_mla.hf import sdpa, sliced
from flash_mla.hf.attention import _longest_absorbed

LAYERS = 3


@pytest.fixture(scope="module")
def models():
    return pair("deepseek_v3")


@pytest.fixture(autouse=True)
def _fresh_counters():
    flash_mla.reset_path_counts()


@pytest.mark.parametrize("slice_bytes", [1, 2**30], ids=["page by page", "in one slice"])
def test_long_chunks_expand_the_context_in_slices(models, slice_bytes, monkeypatch):
    monkeypatch.setattr(sliced, "SLICE_BYTES", slice_bytes)
    eager, ours = models
    chunk = _longest_absorbed(ours.model.layers[0].self_attn) + 6
    inputs = prompt((3 * chunk - 5,) * 2)
    expanded = []
    real = sliced._slice
    monkeypatch.setattr(sliced, "_slice", lambda *arguments: expanded.append(arguments[1:]) or real(*arguments))
    wanted = greedy(eager, inputs)
    assert_varied(wanted)
    assert torch.equal(greedy(ours, inputs, prefill_chunk_size=chunk), wanted)
    assert_paths("deepseek_v3", prefill=LAYERS, sliced=2 * LAYERS, absorbed=LAYERS * (NEW_TOKENS - 1))
    contexts = (chunk, 2 * chunk)
    assert len(expanded) == LAYERS * (sum(-(-context // 64) for context in contexts) if slice_bytes == 1 else 2)
    assert max(end for _, end in expanded) == 2 * chunk


@pytest.mark.parametrize("capacity", [None, 400], ids=["growing", "fixed"])
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
def test_a_long_chunk_on_rows_of_different_lengths(models, capacity, padded):
    """The context goes through the absorbed kernel; a row without any context sees its own tokens alone."""
    eager, ours = models
    first = prompt((21, 1, 17))
    first["attention_mask"][1] = 0  # this row holds nothing yet
    length = _longest_absorbed(ours.model.layers[0].self_attn) + 6
    second = prompt((length, length - 9 if padded else length, length), seed=1)
    mask = torch.cat((first["attention_mask"], second["attention_mask"]), 1)
    outputs = []
    for model, cache in (
        (eager, DynamicCache(config=eager.config)),
        (ours, PagedLatentCache(ours.config, 16, capacity)),
    ):
        with torch.no_grad():
            positions = (mask.cumsum(1) - 1).clamp(min=0)
            seen = first["input_ids"].shape[1]
            model(
                first["input_ids"],
                attention_mask=mask[:, :seen],
                position_ids=positions[:, :seen],
                past_key_values=cache,
            )
            output = model(
                second["input_ids"],
                attention_mask=mask,
                position_ids=positions[:, seen:],
                past_key_values=cache,
            )
        outputs.append(output.logits)
    real = second["attention_mask"].bool()
    torch.testing.assert_close(outputs[1][real], outputs[0][real], rtol=1e-4, atol=1e-4)
    assert bool(outputs[1].isfinite().all())
    assert_paths("deepseek_v3", prefill=LAYERS, sliced=LAYERS)


# --- parts of a softmax -----------------------------------------------------------------------------------------------


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def whole(query, key, value, visible):
    scores = (query @ key.mT * 0.3).masked_fill(~visible, float("-inf"))
    return scores.softmax(-1) @ value


@pytest.mark.parametrize("kind", ["bool", "additive"])
def test_parts_make_the_whole(kind):
    """Three parts: causal, masked (with a query that sees nothing there) and all visible."""
    query, key, value = drawn(2, 3, 7, 24), drawn(2, 3, 7 + 9 + 4, 24, seed=1), drawn(2, 3, 7 + 9 + 4, 16, seed=2)
    mask = torch.rand((2, 1, 7, 9), generator=torch.Generator().manual_seed(3)) < 0.5
    mask[:, :, 2] = False
    visible = torch.cat(
        (torch.ones(2, 1, 7, 7, dtype=torch.bool).tril(), mask, torch.ones(2, 1, 7, 4, dtype=torch.bool)), -1
    )
    if kind == "additive":
        mask = torch.zeros(mask.shape, dtype=query.dtype).masked_fill(~mask, torch.finfo(query.dtype).min)
    parts = []
    for (begin, end), own_mask, is_causal in (((0, 7), None, True), ((7, 16), mask, False), ((16, 20), None, False)):
        part = key[:, :, begin:end], value[:, :, begin:end]
        parts.append(sdpa.attend(query, *part, own_mask, is_causal, 0.3, calls=1))
    right = whole(query, key, value, visible)
    for order in itertools.permutations(range(3)):
        if order[0] == 1:
            continue  # the first part must see something in every row; in use it is the chunk itself
        out, lse = parts[order[0]][0].clone(), parts[order[0]][1]
        for number in order[1:]:
            out, lse = sdpa.merge(out, lse, *parts[number])
        torch.testing.assert_close(out, right)
        torch.testing.assert_close(lse, (query @ key.mT * 0.3).masked_fill(~visible, float("-inf")).logsumexp(-1))


def test_a_part_that_saw_nothing_weighs_nothing():
    out, lse = drawn(1, 1, 2, 4), torch.tensor([[[0.5, -3.0]]], dtype=torch.float64)
    merged, total = sdpa.merge(out.clone(), lse, drawn(1, 1, 2, 4, seed=1), torch.full_like(lse, float("-inf")))
    assert torch.equal(merged, out)
    assert torch.equal(total, lse)


def test_a_query_that_sees_nothing_gets_numbers():
    mask = torch.zeros((1, 1, 3, 5), dtype=torch.bool)
    for dtype in (torch.float32, torch.bfloat16):
        query, key, value = (drawn(1, 2, n, 8).to(dtype) for n in (3, 5, 5))
        out, lse = sdpa.attend(query, key, value, mask, False, 1.0, calls=1)
        assert bool(out.isfinite().all() and lse.isfinite().all())
        assert bool((lse < -1e30).all())


# --- when cuDNN plans -------------------------------------------------------------------------------------------------


@pytest.fixture
def lost(monkeypatch):
    account = {}
    monkeypatch.setattr(sdpa, "_lost", account)
    return account


def shaped(batch: int, seqlen: int) -> tuple[torch.Tensor, ...]:
    tensors = (torch.empty((batch, 16, seqlen, columns), device="meta") for columns in (192, 192, 128))
    return tuple(tensors)


def test_a_large_prompt_is_planned_at_once(lost):
    assert sdpa._wants_plan(*shaped(16, 4096), True, calls=27)
    assert not sdpa._wants_plan(*shaped(1, 1000), True, calls=27)


def test_a_shape_that_comes_again_is_planned_before_it_has_cost_two_plans(lost):
    """1 x 4,096: 86 GFLOP, 0.47 ms lost per call; a plan is worth 107 of them, 27 of which are seen coming."""
    wanted = [sdpa._wants_plan(*shaped(1, 4096), True, calls=27) for _ in range(6 * 27)]
    first = wanted.index(True)
    assert 107 - 27 <= first < 107
    assert all(wanted[first:])  # and keeps it
    # Other shapes have accounts of their own.
    assert not sdpa._wants_plan(*shaped(1, 4097), True, calls=27)
    assert not sdpa._wants_plan(*shaped(1, 4096), False, calls=1)


def test_the_oldest_account_is_closed(lost, monkeypatch):
    monkeypatch.setattr(sdpa, "MOST_SHAPES", 3)
    for seqlen in (10, 11, 12, 10, 13):
        sdpa._wants_plan(*shaped(1, seqlen), True, calls=1)
    assert [shape[4] for shape in lost] == [12, 10, 13]


def test_cudnn_is_switched_on_again_whoever_comes_last(monkeypatch):
    """Two threads whose calls overlap: the second to leave puts back what the user had, not what it found."""
    switch = [True]
    monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", lambda on: switch.__setitem__(0, on))
    first, second = sdpa._without_cudnn(), sdpa._without_cudnn()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert switch == [False]
    second.__exit__(None, None, None)
    assert switch == [True]


def test_layers_seen_coming_are_all_of_the_model(models, monkeypatch):
    """From the first layer of the first prompt on, when the others have not joined yet."""
    calls = []
    monkeypatch.setattr(sdpa, "_may_plan", lambda query: True)
    monkeypatch.setattr(sdpa, "_wants_plan", lambda *args: calls.append(args[-1]) or True)
    greedy(models[1], prompt())
    assert calls == [LAYERS] * LAYERS


def test_torch_is_asked_with_what_it_understands():
    """The parameters are built as on a GPU, with and without a bias; on the CPU the answer is no."""
    query, key, value = (drawn(1, 2, 16, columns).bfloat16() for columns in (24, 24, 16))
    for bias in (None, torch.zeros((1, 2, 16, 16), dtype=torch.bfloat16)):
        params = torch.backends.cuda.SDPAParams(query, key, value, bias, 0.0, bias is None, False)
        assert not torch.backends.cuda.can_use_cudnn_attention(params)
        assert not torch.backends.cuda.can_use_efficient_attention(params)
