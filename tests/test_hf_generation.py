"""What `generate` and hand-written loops do with the cache: beams, sampling, chunks, drafts, turns, masks.

Faults it must catch: a beam reorder or a copy-on-write that is dropped, prompts stored once per sequence, a crop that
is dropped or counts padding wrongly, a padded chunk attending to its padding, a mask of one's own read only in part,
caches that share state between threads or keep it over a reset.
"""

from __future__ import annotations

import copy
import threading
from collections import Counter

import pytest
import torch
from tiny_models import (
    NEW_TOKENS,
    PAD,
    VOCAB,
    assert_paths,
    assert_varied,
    build,
    counted,
    greedy,
    pair,
    prompt,
)
from transformers import DynamicCache, StaticCache

import flash_mla
from flash_mla import PagedLatentCache, ops
from flash_mla.hf import attention

LAYERS = 3
STEPS = NEW_TOKENS - 1


@pytest.fixture(scope="module")
def models():
    return pair("deepseek_v3")


@pytest.fixture(autouse=True)
def _fresh_counters():
    flash_mla.reset_path_counts()


def ours_like_eager(models, inputs, **options):
    """Both generate with these options; the sequences are compared. Returns our output, with its cache."""
    eager, ours = models
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "return_dict_in_generate": True, **options}
    outputs = []
    for model in (eager, ours):
        torch.manual_seed(0)
        outputs.append(model.generate(**inputs, **options))
    expected, output = outputs
    assert_varied(expected.sequences[:, -NEW_TOKENS:])
    assert output.sequences.tolist() == expected.sequences.tolist()
    if isinstance(output.past_key_values, PagedLatentCache):
        output.past_key_values.validate()
    return output


# --- generate ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["deepseek_v3", "mistral4"])
def test_beam_search(name):
    output = ours_like_eager(pair(name), prompt(), num_beams=4, num_return_sequences=3)
    assert isinstance(output.past_key_values, PagedLatentCache)
    assert_paths(name, prefill=LAYERS, absorbed=LAYERS * STEPS)


def test_beam_search_of_a_hybrid():
    """Linear-attention layers reorder their own state beside the pages."""
    ours_like_eager(pair("kimi_linear"), prompt(), num_beams=3, num_return_sequences=2)
    assert_paths("kimi_linear", prefill=2, absorbed=2 * STEPS)


def test_sampling_with_a_seed(models):
    ours_like_eager(models, prompt(), do_sample=True, top_k=20, temperature=0.8)
    assert_paths("deepseek_v3", prefill=LAYERS, absorbed=LAYERS * STEPS)


@pytest.mark.parametrize("options", [{"do_sample": True}, {"num_beams": 3}], ids=["sampled sequences", "beams"])
def test_sequences_of_one_prompt_share_its_pages(models, options):
    output = ours_like_eager(models, prompt((130, 100)), num_return_sequences=3, **options)
    report = output.past_key_values.memory_report()
    # 130 = 2 full pages of 64 and a tail, 100 = 1 and a tail; each of the 6 sequences has a tail of its own at most.
    # Three copies of each prompt would be 3 * 3 + 3 * 2 = 15.
    assert report.pages_allocated <= 2 + 1 + 6
    assert report.tokens_used == 3 * (130 + 100) + 6 * STEPS


@pytest.mark.parametrize(("implementation", "kept"), [(None, 2), ("static", 0)], ids=["growing", "fixed"])
def test_slots_and_plan_are_made_once_per_forward(models, implementation, kept, monkeypatch):
    """Not once per layer; a GPU plans, so the CPU is made to. The plan of 62 tokens still holds for 63 and 64."""
    made = Counter()

    def count(name):
        real = getattr(ops, name)
        monkeypatch.setattr(ops, name, lambda *args, **kwargs: made.update([name]) or real(*args, **kwargs))

    count("next_slots")
    count("plan_splits")
    monkeypatch.setattr(attention, "_plans", lambda q: True)
    ours_like_eager(models, prompt(), cache_implementation=implementation)
    assert made == {"next_slots": 1 + STEPS, "plan_splits": STEPS - kept}


@pytest.mark.parametrize("lengths", [(61, 61, 61), (61, 40, 57)], ids=["unpadded", "left-padded"])
@pytest.mark.parametrize("name", ["deepseek_v3", "longcat_flash"])
def test_chunked_prefill(name, lengths):
    ours_like_eager(pair(name), prompt(lengths), prefill_chunk_size=4)
    layers = {"deepseek_v3": 3, "longcat_flash": 4}[name]
    chunks = 15  # after the first of ceil(61 / 4)
    padded = 5 if lengths[1] == 40 else 0  # columns 0..20 of the second row: chunks 0..5, the first is the prefill
    assert_paths(name, prefill=layers, sliced=layers * padded, absorbed=layers * (chunks - padded) + layers * STEPS)


@pytest.fixture
def removed(monkeypatch):
    """How many positions each `crop` took away."""
    counts = []
    original = PagedLatentCache.crop

    def crop(self, tokens_to_remove):
        counts.append(-tokens_to_remove)
        original(self, tokens_to_remove)

    monkeypatch.setattr(PagedLatentCache, "crop", crop)
    return counts


@pytest.mark.parametrize("assistant_attn", ["eager", "flash_mla"])
def test_assisted_decoding_with_an_unrelated_assistant(models, removed, assistant_attn):
    eager, ours = models
    inputs = prompt((61,))
    expected = greedy(eager, inputs, 20)
    assistant = build("deepseek_v3", assistant_attn, seed=7)
    assert greedy(ours, inputs, 20, assistant_model=assistant).tolist() == expected.tolist()
    assert sum(removed) > 10, "the drafts were accepted, so that nothing was cropped"


def test_prompt_lookup(models, removed):
    """A prompt that repeats itself gives drafts; the model does not follow them."""
    eager, ours = models
    once = prompt((12,))["input_ids"]
    inputs = {"input_ids": once.repeat(1, 5), "attention_mask": torch.ones(1, 60, dtype=torch.long)}
    expected = greedy(eager, inputs, 20)
    assert greedy(ours, inputs, 20, prompt_lookup_num_tokens=4).tolist() == expected.tolist()
    assert sum(removed) > 0


@pytest.mark.parametrize("capacity", [None, 128], ids=["growing", "fixed"])
@pytest.mark.parametrize("ids", ["all", "new"])
@pytest.mark.parametrize("name", ["deepseek_v3", "minicpm3"])
def test_second_turn_with_holes_of_padding(name, ids, capacity):
    """Turn 2 is left-padded too, so its padding lies in the middle of the context."""
    eager, ours = pair(name)
    first, second = prompt((21, 9, 17)), prompt((5, 8, 6), seed=1)
    given = PagedLatentCache(ours.config, block_size=16, max_cache_len=capacity) if capacity else None
    answers = []
    for model in (eager, ours):
        options = {"past_key_values": given} if given is not None and model is ours else {}
        turn = model.generate(**first, max_new_tokens=6, do_sample=False, return_dict_in_generate=True, **options)
        cache = turn.past_key_values
        assert model is eager or isinstance(cache, PagedLatentCache)
        mask = torch.cat((first["attention_mask"], torch.ones(3, 6, dtype=torch.long), second["attention_mask"]), 1)
        full = torch.cat((turn.sequences, second["input_ids"]), 1)
        turn_ids = full if ids == "all" else full[:, cache.get_seq_length() :]
        answer = model.generate(
            input_ids=turn_ids,
            attention_mask=mask,
            past_key_values=cache,
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            return_dict_in_generate=True,
        )
        assert answer.past_key_values is cache
        answers.append(answer.sequences[:, -NEW_TOKENS:])
    assert_varied(answers[0])
    assert answers[1].tolist() == answers[0].tolist()
    cache.validate()
    # 5 of the 6 first answers went in with turn 1 and the last one with turn 2; the last token never does.
    assert cache.memory_report().tokens_used == 21 + 9 + 17 + 5 + 8 + 6 + 3 * (6 + STEPS)
    layers = LAYERS
    assert counted(name)["prefill"] == layers
    assert counted(name)["sliced"] == layers
    assert counted(name)["absorbed"] == layers * (5 + STEPS)


@pytest.mark.parametrize("attn", ["flash_mla", "eager", "sdpa"])
@pytest.mark.parametrize("capacity", [None, 96], ids=["growing", "fixed"])
@pytest.mark.parametrize("name", ["deepseek_v3", "kimi_linear"])
def test_a_cache_of_ones_own(name, attn, capacity):
    """Small pages: 61 + 13 tokens are five of them. Under eager and sdpa the cache is the reference, not ours."""
    expected = greedy(build(name), prompt())
    model = build(name, attn)
    cache = PagedLatentCache(model.config, block_size=16, max_cache_len=capacity)
    assert greedy(model, prompt(), past_key_values=cache).tolist() == expected.tolist()
    assert cache.get_seq_length() == 61 + STEPS
    cache.validate()
    layers = {"deepseek_v3": 3, "kimi_linear": 2}[name]
    assert_paths(name, **({"prefill": layers, "absorbed": layers * STEPS} if attn == "flash_mla" else {}))


def test_a_cache_made_from_an_equal_config(models):
    """For example from `AutoConfig.from_pretrained`: `generate` tells it which model it serves."""
    eager, ours = models
    config = copy.deepcopy(ours.config)
    config._attn_implementation = "sdpa"
    cache = PagedLatentCache(config)
    assert greedy(ours, prompt(), past_key_values=cache).tolist() == greedy(eager, prompt()).tolist()
    assert_paths("deepseek_v3", prefill=LAYERS, absorbed=LAYERS * STEPS)
    assert cache.memory_report().tokens_used == 61 + 40 + 57 + 3 * STEPS


@pytest.mark.parametrize(
    "options",
    [
        {"past_key_values": lambda config: DynamicCache(config=config)},
        {"past_key_values": lambda config: StaticCache(config=config, max_cache_len=96)},
        {"use_cache": False},
    ],
    ids=["DynamicCache", "StaticCache", "no cache"],
)
def test_without_pages_the_path_is_dense(models, options):
    eager, ours = models
    expected = greedy(eager, prompt())
    made = {key: value(ours.config) if callable(value) else value for key, value in options.items()}
    assert greedy(ours, prompt(), **made).tolist() == expected.tolist()
    assert_paths("deepseek_v3", dense=LAYERS * NEW_TOKENS)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_beams": 4, "num_return_sequences": 3},
        {"do_sample": True, "num_return_sequences": 2},
        {"num_beams": 2, "prefill_chunk_size": 16},
    ],
    ids=["greedy", "beams", "sampled", "beams in chunks"],
)
def test_static_cache_is_paged_with_fixed_capacity(models, options):
    output = ours_like_eager(models, prompt(), cache_implementation="static", **options)
    cache = output.past_key_values
    assert isinstance(cache, PagedLatentCache)
    assert cache.max_cache_len >= 61 + STEPS
    chunks = {"sliced": LAYERS, "absorbed": LAYERS * (2 + STEPS)} if "prefill_chunk_size" in options else {}
    assert_paths("deepseek_v3", **{"prefill": LAYERS, "absorbed": LAYERS * STEPS, **chunks})


def test_static_cache_serves_a_second_call(models):
    """A later, longer call must not find the first one's tokens."""
    ours_like_eager(models, prompt((9, 9, 9)), cache_implementation="static")
    ours_like_eager(models, prompt(seed=2), cache_implementation="static")


def test_inputs_embeds(models):
    eager, ours = models
    inputs = prompt()
    embedded = {
        "inputs_embeds": eager.get_input_embeddings()(inputs["input_ids"]).detach(),
        "attention_mask": inputs["attention_mask"],
    }
    expected = greedy(eager, inputs)
    assert greedy(ours, embedded).tolist() == expected.tolist()
    assert_paths("deepseek_v3", prefill=LAYERS, absorbed=LAYERS * STEPS)


def test_a_prompt_of_one_token(models):
    """The first forward already looks like a decode step."""
    eager, ours = models
    inputs = prompt((1, 1))
    assert greedy(ours, inputs).tolist() == greedy(eager, inputs).tolist()
    assert_paths("deepseek_v3", absorbed=LAYERS * NEW_TOKENS)


def test_a_row_that_ends_early(models):
    eager, ours = models
    free = greedy(eager, prompt())
    end = next(token for token in free[1, 3:8].tolist() if token not in free[0] and token not in free[2])
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "eos_token_id": end, "pad_token_id": PAD}
    expected = eager.generate(**prompt(), **options)
    assert (expected[1] == PAD).sum() > (prompt()["input_ids"][1] == PAD).sum()
    assert ours.generate(**prompt(), **options).tolist() == expected.tolist()


@pytest.mark.parametrize("capacity", [None, 96], ids=["growing", "fixed"])
def test_reset_and_reuse(models, capacity):
    eager, ours = models
    cache = PagedLatentCache(ours.config, block_size=16, max_cache_len=capacity)
    greedy(ours, prompt(), past_key_values=cache)
    cache.reset()
    assert cache.get_seq_length() == 0
    assert cache.memory_report().tokens_used == cache.memory_report().pages_allocated == 0
    inputs = prompt((33, 50, 12), seed=3)
    assert greedy(ours, inputs, past_key_values=cache).tolist() == greedy(eager, inputs).tolist()
    cache.validate()


def test_reset_takes_another_batch_size(models):
    eager, ours = models
    cache = PagedLatentCache(ours.config)
    greedy(ours, prompt(), past_key_values=cache)
    cache.reset()
    inputs = prompt((12, 30), seed=3)
    assert greedy(ours, inputs, past_key_values=cache).tolist() == greedy(eager, inputs).tolist()


def test_two_models_in_two_threads():
    """Same class, other weights: whatever is kept per class or per process would be mixed up."""
    seeds, inputs = (5, 6), prompt()
    pairs = {seed: pair("deepseek_v3", seed) for seed in seeds}
    expected = {seed: greedy(eager, inputs).tolist() for seed, (eager, _) in pairs.items()}
    found = {seed: [] for seed in seeds}
    start = threading.Barrier(len(seeds))

    def work(seed):
        start.wait()
        for _ in range(3):
            found[seed].append(greedy(pairs[seed][1], inputs).tolist())

    threads = [threading.Thread(target=work, args=(seed,)) for seed in seeds]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {seed: [expected[seed]] * 3 for seed in seeds}


# --- loops of one's own -----------------------------------------------------------------------------------------------


def forward(model, cache, ids, mask=None, positions=None):
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache).logits


def tokens(batch, length, seed):
    return torch.randint(1, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def close(found, expected):
    """Same argmax everywhere, and logits (std about 2.8) as close as fp32 in another order of sums gives."""
    assert found.argmax(-1).tolist() == expected.argmax(-1).tolist()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)


def additive(visible):
    return torch.where(visible, 0.0, torch.finfo(torch.float32).min)


@pytest.mark.parametrize("capacity", [None, 64], ids=["growing", "fixed"])
@pytest.mark.parametrize("kind", ["additive", "bool"])
def test_masks_of_ones_own(models, kind, capacity):
    """A prefix that sees itself both ways, with a hole; a draft tree on that context; a step that skips keys."""
    eager, ours = models
    reference, cache = DynamicCache(config=eager.config), PagedLatentCache(ours.config, 16, capacity)
    prefix = torch.ones(20, 20, dtype=torch.bool).tril()
    prefix[:6, :6] = True
    prefix[10:, 8] = False
    tree = torch.ones(3, 23, dtype=torch.bool)
    tree[1, 21:] = tree[2, 21] = False  # token 21 and token 22 are alternatives after token 20
    tree[1, 21] = True
    tree[0, 21:] = False
    tree[:, 3] = False
    step = torch.ones(1, 24, dtype=torch.bool)
    step[0, [2, 11, 21]] = False
    for ids, visible in ((tokens(2, 20, 1), prefix), (tokens(2, 3, 2), tree), (tokens(2, 1, 3), step)):
        visible = visible.expand(2, 1, -1, -1)
        seen = reference.get_seq_length()
        positions = torch.arange(seen, seen + ids.shape[1]).expand(2, -1)
        expected = forward(eager, reference, ids, additive(visible), positions)
        found = forward(ours, cache, ids, visible if kind == "bool" else additive(visible), positions)
        close(found, expected)
    assert cache.get_seq_length() == 24
    assert_paths("deepseek_v3", prefill=LAYERS, gathered=2 * LAYERS)


def test_a_mask_of_ones_own_differs_by_row(models):
    """The rows of one batch hide different keys of the context in a decode step."""
    eager, ours = models
    reference, cache = DynamicCache(config=eager.config), PagedLatentCache(ours.config, 16)
    ids, step = tokens(3, 18, 1), tokens(3, 1, 2)
    forward(eager, reference, ids)
    forward(ours, cache, ids)
    visible = torch.ones(3, 1, 1, 19, dtype=torch.bool)
    visible[0, ..., 4] = visible[2, ..., 10:15] = False
    positions = torch.full((3, 1), 18)
    close(
        forward(ours, cache, step, additive(visible), positions),
        forward(eager, reference, step, additive(visible), positions),
    )


@pytest.mark.parametrize("capacity", [None, 64], ids=["growing", "fixed"])
def test_right_padded_second_chunk(models, capacity):
    """Prompt padded on the left, next chunk on the right, then single tokens; a plain loop counts the positions."""
    eager, ours = models
    caches = [DynamicCache(config=eager.config), PagedLatentCache(ours.config, 16, capacity)]
    first = prompt((21, 9, 17))
    mask = first["attention_mask"]
    chunk_mask = torch.ones(3, 6, dtype=torch.long)
    chunk_mask[0, 4:] = chunk_mask[2, 1:] = 0
    steps = [(first["input_ids"], mask), (tokens(3, 6, 5), chunk_mask)]
    steps += [(tokens(3, 1, 6 + n), torch.ones(3, 1, dtype=torch.long)) for n in range(3)]
    so_far = torch.zeros(3, 0, dtype=torch.long)
    for ids, new in steps:
        so_far = torch.cat((so_far, new), 1)
        positions = (so_far.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        expected, found = (
            forward(model, cache, ids, so_far, positions) for model, cache in zip(models, caches, strict=True)
        )
        real = new.bool()
        close(found[real], expected[real])
    assert caches[1].memory_report().tokens_used == int(so_far.sum())
    assert_paths("deepseek_v3", prefill=LAYERS, sliced=LAYERS, absorbed=3 * LAYERS)


@pytest.mark.parametrize("capacity", [None, 64], ids=["growing", "fixed"])
def test_hidden_states_are_finite_at_padding(models, capacity):
    """Also in a row that is padding only, and in a padded chunk on top of a context."""
    _, ours = models
    cache = PagedLatentCache(ours.config, 16, capacity)
    inputs = prompt((12, 1, 7))
    inputs["attention_mask"][1] = 0
    mask = torch.cat((inputs["attention_mask"], torch.tensor([[0, 0, 1], [0, 0, 0], [1, 0, 1]])), 1)
    for ids, so_far in ((inputs["input_ids"], inputs["attention_mask"]), (tokens(3, 3, 1), mask)):
        with torch.no_grad():
            output = ours(input_ids=ids, attention_mask=so_far, past_key_values=cache, output_hidden_states=True)
        assert all(torch.isfinite(hidden).all() for hidden in output.hidden_states)
        assert torch.isfinite(output.logits).all()
    assert cache.memory_report().tokens_used == 12 + 0 + 7 + 1 + 0 + 2


def test_diverging_copies_share_full_pages(models):
    """40 tokens are two full pages of 16 and half a page: two copies that diverge hold 2 + 2 pages, not 6."""
    eager, ours = models
    reference, cache = DynamicCache(config=eager.config), PagedLatentCache(ours.config, 16)
    ids = tokens(1, 40, 1)
    close(forward(ours, cache, ids), forward(eager, reference, ids))
    assert cache.memory_report().pages_allocated == 3
    for c in (reference, cache):
        c.batch_repeat_interleave(2)
    assert cache.memory_report().pages_allocated == 3
    assert cache.memory_report().tokens_used == 80
    for step in range(3):
        ids = tokens(2, 1, 10 + step)
        close(forward(ours, cache, ids), forward(eager, reference, ids))
        assert cache.memory_report().pages_allocated == 4
    cache.validate()


def test_repeat_select_crop(models):
    """What contrastive search does: repeat the rows, try tokens, take one, forget the last ones, go on."""
    eager, ours = models
    reference, cache = DynamicCache(config=eager.config), PagedLatentCache(ours.config, 16)
    inputs = prompt((20, 11))
    mask, last = inputs["attention_mask"], None
    for model, c in ((eager, reference), (ours, cache)):
        last = forward(model, c, inputs["input_ids"], mask)
    real = mask.bool()
    assert torch.isfinite(last[real]).all()
    for c in (reference, cache):
        c.batch_repeat_interleave(3)
    mask = mask.repeat_interleave(3, 0)

    def step(length, seed):
        nonlocal mask
        ids = tokens(len(mask), length, seed)
        mask = torch.cat((mask, torch.ones(len(mask), length, dtype=torch.long)), 1)
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -length:]
        close(forward(ours, cache, ids, mask, positions), forward(eager, reference, ids, mask, positions))

    step(1, 1)
    step(4, 2)
    chosen = torch.tensor([4, 1, 1])
    for c in (reference, cache):
        c.batch_select_indices(chosen)
        c.crop(-3)
    mask = mask[chosen][:, :-3]
    step(1, 3)
    order = torch.tensor([2, 0, 0])
    for c in (reference, cache):
        c.reorder_cache(order)
    mask = mask[order]
    step(1, 4)
    for c in (reference, cache):  # beyond what was added since: into the left-padded prompt, across pages
        c.crop(-9)
    mask = mask[:, :-9]
    step(2, 5)
    step(1, 6)
    assert cache.get_seq_length() == mask.shape[1]
    assert cache.memory_report().tokens_used == int(mask.sum())
    cache.validate()


@pytest.mark.parametrize("capacity", [None, 64], ids=["growing", "fixed"])
def test_crop_over_a_hole(models, capacity):
    """The positions taken away hold padding in one row and tokens in the other: lengths shrink by different amounts."""
    eager, ours = models
    reference, cache = DynamicCache(config=eager.config), PagedLatentCache(ours.config, 16, capacity)
    mask = torch.ones(2, 24, dtype=torch.long)
    mask[0, :5] = mask[1, 18:21] = 0
    ids = tokens(2, 24, 1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    for start, end in ((0, 17), (17, 24)):
        for model, c in ((eager, reference), (ours, cache)):
            forward(model, c, ids[:, start:end], mask[:, :end], positions[:, start:end])
    for c in (reference, cache):
        c.crop(-5)
    assert cache.memory_report().tokens_used == int(mask[:, :19].sum())
    mask = torch.cat((mask[:, :19], torch.ones(2, 2, dtype=torch.long)), 1)
    positions = mask.cumsum(1) - 1
    for column in (19, 20):
        step = (tokens(2, 1, column), mask[:, : column + 1], positions[:, column : column + 1])
        close(forward(ours, cache, *step), forward(eager, reference, *step))


def test_a_plain_forward_without_a_cache(models):
    """`model(input_ids)` builds Transformers' own cache: the dense path, with padding and gradients."""
    eager, ours = models
    inputs = prompt()
    with torch.no_grad():
        expected, found = eager(**inputs).logits, ours(**inputs).logits
    real = inputs["attention_mask"].bool()
    close(found[real], expected[real])
    assert_paths("deepseek_v3", dense=LAYERS)
