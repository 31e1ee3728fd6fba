"""Fixed capacity: one compiled graph per decode step, and nothing is overwritten when the pages run out.

Faults it must catch: a Python number, a mask or a counter that changes from step to step and so makes a new graph or a
break, a mutation that the graph does not know of, capacity off by one, an error that comes after something was written.
"""

from __future__ import annotations

import pytest
import torch
import transformers
from tiny_models import NEW_TOKENS, assert_paths, assert_varied, build, counted, greedy, need, pair, prompt
from torch._dynamo.backends.debugging import aot_eager
from torch._dynamo.utils import counters
from transformers import CompileConfig, DynamicCache

import flash_mla
from flash_mla import PagedLatentCache
from flash_mla.cache import SPARSE_IS_LATENT
from flash_mla.hf import attention

STEPS = NEW_TOKENS - 1
BATCHES = {"unpadded": (61, 61, 61), "left-padded": (61, 40, 57)}


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    counters.clear()
    flash_mla.reset_path_counts()


@pytest.fixture
def graphs():
    """Every graph that was compiled; `backend` is what compiles them."""
    return []


@pytest.fixture
def backend(graphs):
    def compile_and_keep(graph, inputs, **_):
        graphs.append(graph)
        return aot_eager(graph, inputs)

    return compile_and_keep


def compiled(backend):
    config = CompileConfig(backend=backend, mode="default")
    config._compile_all_devices = True
    return {"cache_implementation": "static", "compile_config": config}


@pytest.mark.parametrize("lengths", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize("name", ["deepseek_v3", "mistral4", "kimi_linear"])
def test_generate_compiles_one_graph(name, lengths, backend, graphs):
    eager, ours = pair(name)
    inputs, layers = prompt(lengths), {"kimi_linear": 2}.get(name, 3)
    expected = greedy(eager, inputs)
    assert_varied(expected)
    assert greedy(ours, inputs, **compiled(backend)).tolist() == expected.tolist()
    assert len(graphs) == 1
    # The trace records each layer once, the steps nothing.
    assert_paths(name, prefill=layers, absorbed=layers)
    again = prompt(lengths, seed=4)
    assert greedy(ours, again, **compiled(backend)).tolist() == greedy(eager, again).tolist()
    assert len(graphs) == 1, "the second call was compiled anew"
    assert not counters["graph_break"]
    assert_paths(name, prefill=2 * layers, absorbed=layers)


@pytest.mark.parametrize("lengths", BATCHES.values(), ids=BATCHES)
def test_a_compiled_step_plans_once_for_all_layers(lengths, backend, graphs, monkeypatch):
    """As on a GPU, where a plan is a kernel: its results stay inside the graph, and other lengths need no new one."""
    monkeypatch.setattr(attention, "_plans", lambda q: True)
    eager, ours = pair("deepseek_v3")
    for seed in (0, 4):
        inputs = prompt(lengths, seed=seed)
        assert greedy(ours, inputs, **compiled(backend)).tolist() == greedy(eager, inputs).tolist()
    assert len(graphs) == 1
    assert not counters["graph_break"]
    more = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "return_dict_in_generate": True}
    cache = ours.generate(**inputs, **more, **compiled(backend)).past_key_values
    assert [state.plan for state in cache.layers[0].group.states.values()] == [None], "kept beyond its graph"
    targets = [str(node.target) for node in graphs[0].graph.nodes if node.op == "call_function"]
    assert targets.count("flash_mla.plan.default") == 1
    assert targets.count("flash_mla.decode.default") == 3


def test_a_chunked_prefill_is_compiled_too(backend, graphs):
    """The first chunk is then inside a graph: no page and no pool may be made there."""
    eager, ours = pair("deepseek_v3")
    inputs = prompt((48, 48))
    expected = greedy(eager, inputs)
    assert greedy(ours, inputs, prefill_chunk_size=16, **compiled(backend)).tolist() == expected.tolist()
    assert not counters["graph_break"]
    compiled_once = len(graphs)
    assert compiled_once >= 2
    again = prompt((48, 48), seed=4)
    assert greedy(ours, again, prefill_chunk_size=16, **compiled(backend)).tolist() == greedy(eager, again).tolist()
    assert len(graphs) == compiled_once


def test_compiled_over_two_turns(backend, graphs):
    """A cache of one's own goes into a second call; padding then lies in the middle, and the graph stays."""
    eager, ours = pair("deepseek_v3")
    first, second = prompt((21, 9, 17)), prompt((5, 8, 6), seed=1)
    options = compiled(backend)
    answers = []
    for model, cache in ((eager, None), (ours, PagedLatentCache(ours.config, 16, 64))):
        more = {"compile_config": options["compile_config"]} if model is ours else {}
        turn = model.generate(
            **first,
            past_key_values=cache,
            max_new_tokens=6,
            do_sample=False,
            return_dict_in_generate=True,
            **more,
        )
        mask = torch.cat((first["attention_mask"], torch.ones(3, 6, dtype=torch.long), second["attention_mask"]), 1)
        ids = torch.cat((turn.sequences, second["input_ids"]), 1)
        inputs = {"input_ids": ids, "attention_mask": mask}
        answers.append(greedy(model, inputs, past_key_values=turn.past_key_values, **more))
    assert_varied(answers[0])
    assert answers[1].tolist() == answers[0].tolist()
    assert len(graphs) == 1
    assert not counters["graph_break"]
    # 3 layers each: the prompt, the padded second turn, the one trace.
    assert_paths("deepseek_v3", prefill=3, sliced=3, absorbed=3)


def filled(model, cache, inputs):
    """Run the prompt; returns the first new token and its position, each `[batch, 1]`."""
    positions = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        logits = model(**inputs, position_ids=positions, past_key_values=cache).logits[:, -1]
    return logits.argmax(-1, keepdim=True), positions[:, -1:] + 1


def stepper(model, cache):
    def step(ids, positions):
        return (
            model(input_ids=ids, position_ids=positions, past_key_values=cache).logits[:, -1].argmax(-1, keepdim=True)
        )

    return step


@pytest.mark.parametrize("lengths", BATCHES.values(), ids=BATCHES)
def test_a_compiled_loop_of_ones_own(lengths, backend, graphs):
    eager, ours = pair("deepseek_v3")
    inputs = prompt(lengths)
    cache = PagedLatentCache(ours.config, block_size=16, max_cache_len=96)
    ids, positions = filled(ours, cache, inputs)
    step = torch.compile(stepper(ours, cache), fullgraph=True, backend=backend)
    tokens = [ids]
    with torch.no_grad():
        for _ in range(STEPS):
            ids = step(ids, positions)
            positions = positions + 1
            tokens.append(ids)
    assert torch.cat(tokens, 1).tolist() == greedy(eager, inputs).tolist()
    assert len(graphs) == 1
    assert cache.get_seq_length() == 61 + STEPS
    assert cache.memory_report().tokens_used == sum(lengths) + 3 * STEPS


def stored(cache):
    """A copy of every page that may hold tokens, layer by layer (page 0 is for padding)."""
    return [layer.kv_cache[1:].clone() for layer in cache.paged_layers]


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("lengths", [(20, 20, 20), (20, 7, 11)], ids=["unpadded", "left-padded"])
def test_a_compiled_loop_past_the_capacity_overwrites_nothing(lengths, backend, graphs):
    """24 positions on pages of 16: also the rest of the last page stays as it is."""
    _, ours = pair("deepseek_v3")
    cache = PagedLatentCache(ours.config, block_size=16, max_cache_len=24)
    ids, positions = filled(ours, cache, prompt(lengths))
    step = torch.compile(stepper(ours, cache), fullgraph=True, backend=backend)
    with torch.no_grad():
        for _ in range(4):
            ids, positions = step(ids, positions), positions + 1
        cache.validate()
        assert cache.memory_report().tokens_used == sum(lengths) + 3 * 4
        full = stored(cache)
        for _ in range(20):
            ids, positions = step(ids, positions), positions + 1
    assert len(graphs) == 1
    for layer, before in zip(stored(cache), full, strict=True):
        # A shorter row may still have slots of its own; what was stored before is as it was.
        used = before.abs().sum((2, 3)) > 0
        assert used.sum() == sum(lengths) + 3 * 4
        assert torch.equal(layer[used], before[used])
    if lengths == (20, 20, 20):
        assert same(stored(cache), full)
    with pytest.raises(ValueError, match="max_cache_len=24"):
        cache.validate()
    with pytest.raises(ValueError, match="max_cache_len=24"):
        cache.memory_report()


# --- too small --------------------------------------------------------------------------------------------------------


def test_generate_refuses_a_cache_that_is_too_small_before_prefill():
    """61 + 14 tokens, of which the last is never stored: 74 fit, 73 do not."""
    eager, ours = pair("deepseek_v3")
    small = PagedLatentCache(ours.config, 16, max_cache_len=73)
    with pytest.raises(ValueError, match=r"74.*73"):
        greedy(ours, prompt(), past_key_values=small)
    assert counted("deepseek_v3") == {}
    assert small.get_seq_length() == 0
    enough = PagedLatentCache(ours.config, 16, max_cache_len=74)
    assert greedy(ours, prompt(), past_key_values=enough).tolist() == greedy(eager, prompt()).tolist()
    enough.validate()


@pytest.mark.parametrize("ids", ["all", "new"])
def test_generate_refuses_a_second_turn_that_does_not_fit(ids):
    """20 + 5 stored; 1 + 8 more ids and 13 of the next 14 tokens need 47."""
    ours = build("deepseek_v3", "flash_mla")
    for capacity in (46, 47):
        cache = PagedLatentCache(ours.config, 16, max_cache_len=capacity)
        first, second = prompt((20, 11)), prompt((8, 8), seed=1)
        turn = ours.generate(**first, past_key_values=cache, max_new_tokens=6, return_dict_in_generate=True)
        full = torch.cat((turn.sequences, second["input_ids"]), 1)
        mask = torch.cat((first["attention_mask"], torch.ones(2, 14, dtype=torch.long)), 1)
        inputs = {"input_ids": full if ids == "all" else full[:, 25:], "attention_mask": mask}
        before = stored(cache)
        flash_mla.reset_path_counts()
        if capacity == 46:
            with pytest.raises(ValueError, match=r"47.*46"):
                greedy(ours, inputs, past_key_values=cache)
            assert counted("deepseek_v3") == {}
            assert cache.get_seq_length() == 25
            assert same(stored(cache), before)
        else:
            greedy(ours, inputs, past_key_values=cache)
            cache.validate()
            assert cache.get_seq_length() == 47


def test_a_loop_is_refused_before_anything_is_written():
    """22 of 24 positions are filled: three more are refused, two fit and are right."""
    eager, ours = pair("deepseek_v3")
    reference, cache = DynamicCache(config=eager.config), PagedLatentCache(ours.config, 16, max_cache_len=24)
    inputs = prompt((22, 22))
    filled(eager, reference, inputs)
    filled(ours, cache, inputs)
    before, report = stored(cache), cache.memory_report()
    more = prompt((3, 3), seed=1)["input_ids"]
    with pytest.raises(ValueError, match=r"max_cache_len=24.*22.*3"), torch.no_grad():
        ours(input_ids=more, past_key_values=cache)
    assert cache.get_seq_length() == 22
    assert same(stored(cache), before)
    assert cache.memory_report() == report
    with torch.no_grad():
        found, expected = (
            model(input_ids=more[:, :2], past_key_values=c).logits for model, c in ((ours, cache), (eager, reference))
        )
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)
    with pytest.raises(ValueError, match=r"max_cache_len=24.*24.*1"), torch.no_grad():
        ours(input_ids=more[:, 2:], past_key_values=cache)
    cache.validate()


@pytest.mark.skipif(
    not SPARSE_IS_LATENT,
    reason=f"Transformers {transformers.__version__} has no latents in the cache of a model with an indexer",
)
@pytest.mark.parametrize("lengths", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize("name", ["deepseek_v32", "glm_moe_dsa", "hy_v4", "mistral_large4"])
def test_sparse_attention_compiles_into_one_graph(name, lengths, backend, graphs):
    family = need(name)
    eager, ours = pair(name)
    for seed in (0, 4):
        inputs = prompt(lengths, seed=seed)
        # Ties at the top-k boundary: the reference is eager over all positions of a fixed capacity too.
        wanted = greedy(eager, inputs, cache_implementation="static")
        assert greedy(ours, inputs, **compiled(backend)).tolist() == wanted.tolist()
    assert len(graphs) == 1
    assert not counters["graph_break"]
    # Two prompts, and one trace of a step.
    assert_paths(family.text_type, sparse=3 * family.sparse)


def test_fp8_rows_in_a_graph(backend, graphs):
    config = need("deepseek_v3").config(need("deepseek_v3").load())
    config.kv_lora_rank = 128
    ours = build("deepseek_v3", "flash_mla", config=config)
    inputs, options = prompt(), {"cache_config": {"dtype": "fp8"}}
    wanted = greedy(ours, inputs, **options)
    assert_varied(wanted)
    assert greedy(ours, inputs, **options, **compiled(backend)).tolist() == wanted.tolist()
    assert len(graphs) == 1
    assert not counters["graph_break"]
