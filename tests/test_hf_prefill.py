"""A prompt of several sequences is computed once, and `prefill_progress` says how far a prompt is.

Faults it must catch: a prompt computed per sequence, rows repeated in another order than `generate` repeats them, a
mask or positions that stay cut to the batch, a copy of the prompt's pages per sequence, a cache with linear-attention
layers taken for one that can repeat its rows; a callback before its chunk has finished, a device kept waiting between
chunks, a context counted as new, news in another thread, a model left changed.
"""

from __future__ import annotations

import inspect
import logging
import re
import threading

import pytest
import torch
import transformers
from tiny_models import NEW_TOKENS, assert_paths, assert_varied, build, greedy, pair, prompt
from torch._dynamo.backends.debugging import aot_eager
from transformers import CompileConfig, DynamicCache, GenerationConfig
from transformers.cache_utils import DynamicLayer
from transformers.generation.utils import GenerationMixin

import flash_mla
from flash_mla import PagedLatentCache
from flash_mla.cache import PagedLatentLayer
from flash_mla.hf import prefill

BATCH = 3
BEAMS = {"num_beams": 4}
SEQUENCES = {"do_sample": True, "num_return_sequences": 3}


@pytest.fixture(scope="module")
def models():
    return pair("deepseek_v3")


@pytest.fixture(autouse=True)
def _fresh():
    flash_mla.reset_path_counts()
    prefill._say.cache_clear()


def sizes_seen(model, inputs, **options):
    """Generate; returns the output and `(rows, positions)` of every forward."""
    sizes = []

    def note(_, args, kwargs):
        given = kwargs.get("input_ids") if kwargs.get("inputs_embeds") is None else kwargs["inputs_embeds"]
        sizes.append(tuple(given.shape[:2]))

    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "return_dict_in_generate": True, **options}
    torch.manual_seed(0)
    hook = model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        return model.generate(**inputs, **options), sizes
    finally:
        hook.remove()


def ours_like_eager(models, inputs, **options):
    """Both generate with these options and give the same sequences; returns our output and its forwards' sizes."""
    eager, ours = models
    expected, _ = sizes_seen(eager, inputs, **options)
    output, sizes = sizes_seen(ours, inputs, **options)
    assert_varied(expected.sequences[:, -NEW_TOKENS:])
    assert output.sequences.tolist() == expected.sequences.tolist()
    output.past_key_values.validate()
    return output, sizes


# --- one prompt, several sequences ------------------------------------------------------------------------------------


@pytest.mark.parametrize("lengths", [(61, 61, 61), (61, 40, 57)], ids=["unpadded", "left-padded"])
@pytest.mark.parametrize(
    "options",
    [BEAMS, {**BEAMS, "num_return_sequences": 3}, SEQUENCES, {**SEQUENCES, "num_beams": 4}],
    ids=["beams", "beams returning 3", "sampled", "sampled beams"],
)
def test_a_prompt_is_computed_once(models, options, lengths):
    output, sizes = ours_like_eager(models, prompt(lengths), **options)
    rows = BATCH * options.get("num_beams", 3)
    assert sizes == [(BATCH, 61)] + [(rows, 1)] * (NEW_TOKENS - 1)
    assert output.past_key_values.layers[0].batch_size == rows
    assert_paths("deepseek_v3", prefill=3, absorbed=3 * (NEW_TOKENS - 1))


@pytest.mark.parametrize("options", [BEAMS, SEQUENCES], ids=["beams", "sampled"])
@pytest.mark.parametrize("lengths", [(61, 61, 61), (61, 40, 57)], ids=["unpadded", "left-padded"])
def test_once_in_chunks(models, lengths, options):
    _, sizes = ours_like_eager(models, prompt(lengths), prefill_chunk_size=16, **options)
    assert sizes[:5] == [(BATCH, 16)] * 3 + [(BATCH, 13), (BATCH * options.get("num_beams", 3), 1)]


@pytest.mark.parametrize("options", [BEAMS, SEQUENCES], ids=["beams", "sampled"])
def test_once_from_inputs_embeds(models, options):
    inputs = prompt()
    embedded = {
        "inputs_embeds": models[0].get_input_embeddings()(inputs["input_ids"]).detach(),
        "attention_mask": inputs["attention_mask"],
    }
    _, sizes = ours_like_eager(models, embedded, **options)
    assert sizes[:2] == [(BATCH, 61), (BATCH * options.get("num_beams", 3), 1)]


@pytest.mark.parametrize("options", [BEAMS, SEQUENCES], ids=["beams", "sampled"])
def test_once_with_sliding_layers(options):
    """Sliding layers keep Transformers' own cache and repeat their own rows."""
    _, sizes = ours_like_eager(pair("dots3_note"), prompt(), **options)
    assert sizes[0] == (BATCH, 61)


@pytest.mark.parametrize("name", ["kimi_linear", "bailing_hybrid"])
@pytest.mark.parametrize("options", [BEAMS, SEQUENCES], ids=["beams", "sampled"])
def test_linear_attention_computes_every_row(name, options, caplog):
    with caplog.at_level(logging.INFO, "flash_mla"):
        for _ in range(2):
            _, sizes = ours_like_eager(pair(name), prompt(), **options)
            assert sizes[0] == (BATCH * options.get("num_beams", 3), 61)
    said = [message for message in caplog.messages if "computed once per sequence" in message]
    assert len(said) == 1
    assert "cannot repeat their rows" in said[0]


def test_hidden_states_are_of_every_row(models):
    output, sizes = ours_like_eager(models, prompt(), output_hidden_states=True, **SEQUENCES)
    assert sizes[0] == (BATCH * 3, 61)
    assert output.hidden_states[0][-1].shape[:2] == (BATCH * 3, 61)


def test_an_unknown_tensor_computes_every_row(models, monkeypatch, caplog):
    """Five features for three prompts: nothing says which of them belong to which row."""
    eager, ours = models
    for model in models:
        monkeypatch.setattr(model, "_validate_model_kwargs", lambda kwargs: None, raising=False)
    expected, _ = sizes_seen(eager, prompt(), **SEQUENCES)
    with caplog.at_level(logging.INFO, "flash_mla"):
        output, sizes = sizes_seen(ours, prompt(), features=torch.zeros(5, 2), **SEQUENCES)
    assert output.sequences.tolist() == expected.sequences.tolist()
    assert sizes[0] == (BATCH * 3, 61)
    assert any("features of shape (15, 2) has no dimension of 9 rows" in message for message in caplog.messages)


def test_a_models_own_way_to_repeat_is_not_undone(models, monkeypatch):
    ours = models[1]

    def expand(*args, **kwargs):
        return GenerationMixin._expand_inputs_for_generation(*args, **kwargs)

    monkeypatch.setattr(type(ours), "_expand_inputs_for_generation", staticmethod(expand))
    if not isinstance(inspect.getattr_static(GenerationMixin, "_expand_inputs_for_generation"), staticmethod):
        monkeypatch.setattr(type(ours), "_expand_inputs_for_generation", expand)
    _, sizes = sizes_seen(ours, prompt(), **SEQUENCES)
    assert sizes[0] == (BATCH * 3, 61)


def test_a_cache_of_ones_own_gets_every_row(models):
    """Its rows were counted by whoever made it."""
    eager, ours = models
    cache = PagedLatentCache(ours.config, prompt_repeats=3)
    expected, _ = sizes_seen(eager, prompt(), **SEQUENCES)
    output, sizes = sizes_seen(ours, prompt(), past_key_values=cache, **SEQUENCES)
    assert output.sequences.tolist() == expected.sequences.tolist()
    assert sizes[0] == (BATCH * 3, 61)
    # One that `generate` made is the user's from then on.
    made = sizes_seen(ours, prompt(), **SEQUENCES)[0].past_key_values
    made.reset()
    output, sizes = sizes_seen(ours, prompt(), past_key_values=made, **SEQUENCES)
    assert output.sequences.tolist() == expected.sequences.tolist()
    assert sizes[0] == (BATCH * 3, 61)


def test_fixed_capacity_computes_every_row(models):
    _, sizes = ours_like_eager(models, prompt(), cache_implementation="static", **BEAMS)
    assert sizes[0] == (BATCH * 4, 61)


def test_sixteen_sequences_hold_one_copy_of_the_prompt(models):
    ours = models[1]
    inputs = prompt((200,))
    options = {"do_sample": True, "num_return_sequences": 16}
    pages = {}
    for new_tokens in (1, 2):
        output, sizes = sizes_seen(ours, inputs, max_new_tokens=new_tokens, **options)
        assert sizes[0] == (1, 200)
        output.past_key_values.validate()
        report = output.past_key_values.memory_report()
        assert report.tokens_used == 16 * (200 + new_tokens - 1)
        pages[new_tokens] = report.pages_allocated
    # 200 tokens: 3 full pages of 64 and a tail. The first written token gives each row but the last a tail of its own.
    assert pages == {1: 4, 2: 4 + 15}


def test_rows_are_not_compared(models, monkeypatch):
    """Nobody asks whether rows are equal, which would make the host wait: `generate` repeated them itself."""

    def compared(*args):
        raise AssertionError("rows were compared")

    monkeypatch.setattr(PagedLatentLayer, "_same_prompts", compared)
    ours_like_eager(models, prompt((61, 40, 57, 33)), do_sample=True, num_return_sequences=2)


def generation(**options):
    return GenerationConfig(**{"is_assistant": False, "token_healing": False, **options})


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({}, None),
        ({"is_assistant": True}, "assistants"),
        ({"token_healing": True}, "token healing"),
        ({"output_attentions": True, "return_dict_in_generate": True}, "output_attentions"),
    ],
    ids=["nothing", "assistant", "token healing", "attentions"],
)
def test_why_a_prompt_is_computed_per_sequence(models, options, named):
    ours = models[1]
    why = prefill._why_not_once(ours, PagedLatentCache(ours.config), generation(**options), {})
    assert why is None if named is None else named in why


def test_a_layer_that_inherits_its_repeat_is_not_trusted(models):
    """`LinearAttentionAndFullAttentionLayer`, for one, would repeat its keys and values and not its state."""

    class Stateful(DynamicLayer):
        pass

    ours = models[1]
    cache = PagedLatentCache(ours.config)
    cache.layers[1] = Stateful()
    assert "layers of type Stateful" in prefill._why_not_once(ours, cache, generation(), {})


def test_a_cache_with_tokens_cannot_take_fewer_rows(models):
    """A generation loop of one's own may fill the cache that it was given before it asks for a prefill."""
    ours = models[1]
    cache = PagedLatentCache(ours.config)
    with torch.no_grad():
        ours(torch.tensor([[5, 6]]), past_key_values=cache)
    assert prefill._why_not_once(ours, cache, generation(), {}) == "the cache holds tokens already"


def test_every_nth_row_takes_back_what_generate_repeats():
    """By each tensor's own dimension of rows; multimodal positions `[3, batch, positions]` have it second."""
    given = {
        "attention_mask": torch.arange(8).view(2, 4),
        "position_ids": torch.arange(24).view(3, 2, 4),
        "inputs_embeds": torch.randn(2, 4, 5),
        "use_cache": True,
        "logits_to_keep": 1,
        "token_type_ids": None,
    }
    ids = torch.arange(10, 18).view(2, 4)
    repeated = {
        name: value.repeat_interleave(3, 1 if name == "position_ids" else 0) if torch.is_tensor(value) else value
        for name, value in given.items()
    }
    why, once = prefill._every_nth_row(ids.repeat_interleave(3, 0), repeated, 3)
    assert why is None
    assert once.keys() == {"input_ids", *given}
    for name, value in {"input_ids": ids, **given}.items():
        assert torch.equal(once[name], value) if torch.is_tensor(value) else once[name] is value
    assert repeated["attention_mask"].shape == (6, 4)


@pytest.mark.parametrize(
    ("kwargs", "named"),
    [
        ({"pixel_values": torch.zeros(4, 3)}, r"pixel_values of shape \(4, 3\)"),
        ({"scale": torch.tensor(1.0)}, r"scale of shape \(\)"),
        ({"position_ids": torch.zeros(6, 3, 4)}, r"position_ids of shape \(6, 3, 4\)"),
        ({"mm_encoder_outputs": {"image": torch.zeros(6)}}, "mm_encoder_outputs of type dict"),
    ],
    ids=["other rows", "no dimension", "axes as many as rows", "nested"],
)
def test_every_nth_row_says_what_it_does_not_understand(kwargs, named):
    why, _ = prefill._every_nth_row(torch.zeros(6, 4), kwargs, 3)
    assert why is not None
    assert re.match(named, why)
    assert prefill._every_nth_row(torch.zeros(5, 4), {}, 3)[0] == "5 rows are not groups of 3"


# --- progress ---------------------------------------------------------------------------------------------------------

CHUNKS = [(16, 61), (32, 61), (48, 61), (61, 61)]


def heard(model, inputs, **options):
    """Generate; returns the new tokens and the callback's calls."""
    calls = []
    with flash_mla.prefill_progress(lambda *call: calls.append(call)):
        tokens = greedy(model, inputs, **options)
    return tokens, calls


@pytest.mark.parametrize("attn", ["eager", "sdpa", "flash_mla"])
def test_progress_by_chunk(attn):
    model = build("deepseek_v3", attn)
    silent = greedy(model, prompt(), prefill_chunk_size=16)
    tokens, calls = heard(model, prompt(), prefill_chunk_size=16)
    assert calls == CHUNKS
    assert tokens.tolist() == silent.tolist()
    assert greedy(model, prompt(), prefill_chunk_size=16).tolist() == silent.tolist()
    assert calls == CHUNKS, "called after the block"
    assert heard(model, prompt())[1] == [(61, 61)]


def test_progress_of_several_sequences(models):
    """Positions are counted per row."""
    assert heard(models[1], prompt(), prefill_chunk_size=16, **BEAMS)[1] == CHUNKS
    assert heard(models[1], prompt(), use_cache=True, num_beams=2)[1] == [(61, 61)]


def test_progress_from_inputs_embeds(models):
    inputs = prompt()
    embeds = models[0].get_input_embeddings()(inputs["input_ids"]).detach()
    for model in models:
        given = {"inputs_embeds": embeds, "attention_mask": inputs["attention_mask"]}
        assert heard(model, given)[1] == [(61, 61)]


@pytest.mark.parametrize("chunk", [None, 4])
@pytest.mark.parametrize("ids", ["all", "new"])
def test_progress_leaves_out_what_is_cached(models, ids, chunk):
    if chunk is not None and "past_length = 0" in inspect.getsource(inspect.unwrap(GenerationMixin._prefill)):
        pytest.skip(f"Transformers {transformers.__version__} has no chunks on a context: they begin at position 0")
    eager, ours = models
    first, second = prompt((21, 9, 17)), prompt((10, 10, 10), seed=1)
    mask = torch.cat((first["attention_mask"], second["attention_mask"]), 1)
    full = torch.cat((first["input_ids"], second["input_ids"]), 1)
    expected = greedy(eager, {"input_ids": full, "attention_mask": mask})
    positions = (first["attention_mask"].cumsum(1) - 1).clamp(min=0)
    for model, cache in ((eager, DynamicCache(config=eager.config)), (ours, PagedLatentCache(ours.config))):
        with torch.no_grad():
            model(**first, position_ids=positions, past_key_values=cache)
        turn = {"input_ids": full if ids == "all" else second["input_ids"], "attention_mask": mask}
        tokens, calls = heard(model, turn, past_key_values=cache, prefill_chunk_size=chunk)
        assert calls == ([(10, 10)] if chunk is None else [(4, 10), (8, 10), (10, 10)])
        assert tokens.tolist() == expected.tolist()


def test_a_chunk_is_queued_before_the_one_before_it_is_waited_for(models, monkeypatch):
    ours, log = models[1], []
    marks = iter(range(4))

    def mark(devices):
        assert devices == {torch.device("cpu")}
        number = next(marks)
        log.append(f"mark {number}")
        return lambda: log.append(f"wait {number}")

    monkeypatch.setattr(prefill, "_mark", mark)
    hook = ours.register_forward_hook(lambda *_: log.append("queue"))
    with flash_mla.prefill_progress(lambda done, total: log.append(done)):
        greedy(ours, prompt(), 1, prefill_chunk_size=16)
    hook.remove()
    middle = ["queue", "mark 1", "wait 0", 16, "queue", "mark 2", "wait 1", 32, "queue", "mark 3", "wait 2", 48]
    assert log == ["queue", "mark 0", *middle, "wait 3", 61]


def test_a_mark_is_an_event_on_every_gpu_of_the_model(monkeypatch):
    log = []

    class Event:
        def __init__(self, blocking):
            assert blocking

        def record(self, stream):
            self.stream = stream
            log.append(("record", stream))

        def synchronize(self):
            log.append(("wait", self.stream))

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: device.index)
    wait = prefill._mark({torch.device("cuda", 0), torch.device("cuda", 1), torch.device("cpu")})
    assert sorted(log) == [("record", 0), ("record", 1)]
    wait()
    assert sorted(log[2:]) == [("wait", 0), ("wait", 1)]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: events on its streams")
def test_progress_on_a_gpu():
    """At the last call nothing of the prompt is left on the stream."""
    model = build("deepseek_v3", "sdpa").to("cuda")
    inputs = {name: tensor.to("cuda") for name, tensor in prompt().items()}
    calls = []
    with flash_mla.prefill_progress(lambda *call: calls.append((*call, torch.cuda.current_stream().query()))):
        greedy(model, inputs, prefill_chunk_size=16)
    assert [call[:2] for call in calls] == CHUNKS
    assert calls[-1] == (61, 61, True)


@pytest.mark.parametrize("attn", ["sdpa", "flash_mla"])
def test_progress_of_compiled_chunks(attn):
    """Transformers compiles the forward of a chunk; the callback stays outside, the graphs are as without it."""
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs, **_):
        graphs.append(graph)
        return aot_eager(graph, inputs)

    config = CompileConfig(backend=backend, mode="default")
    config._compile_all_devices = True
    options = {"cache_implementation": "static", "compile_config": config, "prefill_chunk_size": 16}
    expected = greedy(build("deepseek_v3"), prompt())
    model = build("deepseek_v3", attn)
    assert greedy(model, prompt(), **options).tolist() == expected.tolist()
    silent = len(graphs)
    assert silent > 0
    tokens, calls = heard(model, prompt(), **options)
    assert tokens.tolist() == expected.tolist()
    assert calls == CHUNKS
    assert len(graphs) == silent


@pytest.mark.parametrize("chunk", [None, 16])
def test_an_error_in_the_callback_leaves_the_model_as_it_was(models, chunk):
    class Enough(Exception):
        pass

    def stop(done, total):
        raise Enough

    ours = models[1]
    expected = greedy(ours, prompt(), prefill_chunk_size=chunk)
    before = dict(vars(ours))
    with pytest.raises(Enough), flash_mla.prefill_progress(stop):
        greedy(ours, prompt(), prefill_chunk_size=chunk)
    assert vars(ours) == before
    assert greedy(ours, prompt(), prefill_chunk_size=chunk).tolist() == expected.tolist()


def test_a_model_with_its_own_preparation_keeps_it(models, monkeypatch):
    """PEFT puts a function on the instance; it runs, and it stays."""
    ours, calls = models[1], []
    original = ours.prepare_inputs_for_generation

    def prepare(*args, **kwargs):
        calls.append(1)
        return original(*args, **kwargs)

    monkeypatch.setitem(vars(ours), "prepare_inputs_for_generation", prepare)  # an attribute of a class would stay
    assert heard(ours, prompt(), new_tokens=1, prefill_chunk_size=16)[1] == CHUNKS
    assert len(calls) == 4
    assert ours.prepare_inputs_for_generation is prepare


def test_threads_hear_of_their_own_prompts(models):
    """Of one model in three threads; the third has no block."""
    ours = models[1]
    lengths = {0: (61, 61), 1: (33, 20), 2: (48, 48)}
    calls = {thread: [] for thread in lengths}
    before = dict(vars(ours))
    start = threading.Barrier(len(lengths))

    def work(thread):
        inputs = prompt(lengths[thread], seed=thread)
        start.wait()
        for _ in range(3):
            if thread == 2:
                greedy(ours, inputs, prefill_chunk_size=16)
                continue
            with flash_mla.prefill_progress(lambda *call: calls[thread].append(call)):
                greedy(ours, inputs, prefill_chunk_size=16)

    threads = [threading.Thread(target=work, args=(thread,)) for thread in lengths]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert calls == {0: CHUNKS * 3, 1: [(16, 33), (32, 33), (33, 33)] * 3, 2: []}
    assert vars(ours) == before


def test_a_block_inside_another(models):
    outer, inner = [], []
    with flash_mla.prefill_progress(lambda *call: outer.append(call)):
        with flash_mla.prefill_progress(lambda *call: inner.append(call)):
            greedy(models[1], prompt((7,)), 1)
        greedy(models[1], prompt((9,)), 1)
    assert (outer, inner) == ([(9, 9)], [(7, 7)])


def test_the_prompts_of_an_assistant_are_not_reported(models):
    """It prefills anew for every draft."""
    assistant = build("deepseek_v3", "eager", seed=7)
    tokens, calls = heard(models[1], prompt((61,)), assistant_model=assistant)
    assert tokens.tolist() == greedy(models[0], prompt((61,))).tolist()
    assert calls == []


def test_a_callback_must_be_callable():
    with (
        pytest.raises(ValueError, match=r"prefill_progress: needs a callable of \(done, total\), got 3"),
        flash_mla.prefill_progress(3),
    ):
        pass


def test_unregister_puts_the_prefill_back():
    flash_mla.unregister()
    try:
        assert not hasattr(GenerationMixin._prefill, "__wrapped__")
        assert heard(build("deepseek_v3"), prompt((7,)), new_tokens=1)[1] == []
    finally:
        flash_mla.register()
    assert heard(build("deepseek_v3"), prompt((7,)), new_tokens=1)[1] == [(7, 7)]
