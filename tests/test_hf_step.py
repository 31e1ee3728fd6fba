"""What a decode step keeps for the next one, and everything that must make it look again."""

from __future__ import annotations

import copy
import ctypes
import gc
import pickle
import random
import weakref
from types import SimpleNamespace

import pytest
import torch
import torch.nn.utils.prune
from tiny_models import NEW_TOKENS, build, greedy, pair, prompt
from transformers import DynamicCache

from flash_mla import PagedLatentCache, UnsupportedError, ops
from flash_mla.hf import attention, step

LAYERS = 3


@pytest.fixture
def models():
    return pair("deepseek_v3")


@pytest.fixture
def looked(monkeypatch):
    """Calls of `prepare`."""
    calls = []
    real = step.prepare
    monkeypatch.setattr(step, "prepare", lambda *args, **kwargs: calls.append(1) or real(*args, **kwargs))
    return calls


class Decoding:
    """Both models side by side, token by token, from the same random ids; each step's logits are compared."""

    def __init__(self, models, batch=2, length=20):
        self.models = models
        self.caches = [DynamicCache(config=models[0].config), PagedLatentCache(models[1].config, 16)]
        self.generator = torch.Generator().manual_seed(3)
        self.length = 0
        self.step(batch, length)

    def step(self, batch=2, length=1):
        ids = torch.randint(3, 90, (batch, length), generator=self.generator)
        logits = []
        for model, cache in zip(self.models, self.caches, strict=True):
            with torch.no_grad():
                logits.append(model(ids, past_key_values=cache, use_cache=True).logits)
        torch.testing.assert_close(logits[1], logits[0], rtol=1e-4, atol=1e-4)
        self.length += length


def test_a_layer_looks_once(models, looked):
    assert NEW_TOKENS > 3
    greedy(models[1], prompt(), cache_implementation="static")  # whose pool never grows
    assert len(looked) == LAYERS


def test_a_grown_pool_makes_it_look_again(models, looked):
    decoding = Decoding(models, length=30)
    decoding.step()
    assert len(looked) == LAYERS
    for _ in range(5):  # 2 rows of 30 to 36 tokens in pages of 16
        decoding.step()
    assert len(looked) == 2 * LAYERS


def test_a_pool_that_grows_under_the_same_table(models):
    """Rows of 26 and 14 tokens in pages of 16: the third step gives the shorter row a page, the table stays as wide."""
    eager, ours = models
    inputs = prompt((26, 14))
    wanted = greedy(eager, inputs, 6)
    assert torch.equal(greedy(ours, inputs, 6, past_key_values=PagedLatentCache(ours.config, 16)), wanted)


def test_a_batch_of_another_size(models, looked):
    decoding = Decoding(models)
    decoding.step()
    for cache in decoding.caches:
        cache.batch_select_indices(torch.tensor([1]))
    decoding.step(batch=1)
    decoding.step(batch=1)
    assert len(looked) == 2 * LAYERS


def on_both(decoding, act):
    for model in decoding.models:
        for layer in model.model.layers:
            act(layer.self_attn)


@torch.no_grad()
def scale(attention):
    attention.kv_b_proj.weight.mul_(1.5)


def move(attention):
    attention.kv_b_proj.weight.data = attention.kv_b_proj.weight.data.flip(0).contiguous()


def transpose(attention):
    attention.kv_b_proj.weight.data = attention.kv_b_proj.weight.data.t().contiguous().t()


def replace(attention):
    other = torch.nn.Linear(*reversed(attention.kv_b_proj.weight.shape), bias=False)
    with torch.no_grad():
        other.weight.copy_(attention.kv_b_proj.weight.flip(1))
    attention.__dict__["kept"] = attention.kv_b_proj  # alive, so that its weak reference still finds it
    attention.kv_b_proj = other


def add_bias(attention):
    attention.kv_b_proj.bias = torch.nn.Parameter(torch.linspace(-1, 1, attention.kv_b_proj.weight.shape[0]))


def hook(attention):
    attention.kv_b_proj.register_forward_hook(lambda module, args, output: output * 1.25)


def hook_before(attention):
    attention.kv_b_proj.register_forward_pre_hook(lambda module, args: (args[0] * 0.75,))


def own_forward(attention):
    linear = attention.kv_b_proj
    linear.forward = lambda latent: torch.nn.functional.linear(latent, linear.weight * 0.5)


def parametrize(attention):
    class Half(torch.nn.Module):
        def forward(self, weight):
            return weight / 2

    torch.nn.utils.parametrize.register_parametrization(attention.kv_b_proj, "weight", Half())


def prune(attention):
    torch.nn.utils.prune.l1_unstructured(attention.kv_b_proj, "weight", 0.3)


@pytest.mark.parametrize(
    "change", [prune, scale, move, transpose, replace, add_bias, hook, hook_before, own_forward, parametrize]
)
def test_a_changed_projection_is_seen_in_the_next_step(models, change):
    decoding = Decoding(models)
    decoding.step()
    on_both(decoding, change)
    decoding.step()
    decoding.step()


def test_every_step_has_the_calls_of_its_own_tensors(models, monkeypatch):
    """Whatever is kept says what looking anew would: shapes, strides, backends, whatever a cache goes through."""
    runs = []
    real = step.run

    def checked(found, query, new, plan, scaling):
        layer, state = new.layer, new.layer.state
        now = ops.check_step(
            found.buffer.q,
            query[..., found.w_uk[0][1] :].transpose(1, 2),
            layer.kv_cache,
            new.latent.transpose(1, 2),
            new.k_rope.transpose(1, 2),
            state.slots,
            state.block_table,
            state.cache_seqlens,
            kv_lora_rank=layer.kv_lora_rank,
            causal=False,
            backend=layer.group.backend,
        )
        assert now == found.checked
        runs.append(1)
        return real(found, query, new, plan, scaling)

    monkeypatch.setattr(step, "run", checked)
    ours = models[1]
    for capacity in (None, 200):
        decoding = Decoding((models[0], ours), length=90)
        decoding.caches[1] = PagedLatentCache(ours.config, 16, capacity)
        for length in (90, 14):  # the pool is large enough the second time, and the table widens without it
            for cache in decoding.caches:
                cache.reset()
            decoding.caches[0] = DynamicCache(config=models[0].config)
            decoding.step(length=length)
            for _ in range(6):
                decoding.step()
            for cache in decoding.caches:
                cache.crop(-3)
            decoding.step()
            for cache in decoding.caches:
                cache.reorder_cache(torch.tensor([1, 0]))
            decoding.step()
    assert len(runs) == 2 * 2 * 8 * LAYERS


def test_a_pool_that_was_copied_is_let_go(models):
    """The step holds the pool: it must not keep the old one through a long prompt of the next turn."""
    decoding = Decoding(models)
    decoding.step()
    old = weakref.ref(decoding.caches[1].layers[0].kv_cache)
    decoding.step(length=50)
    gc.collect()
    assert old() is None


def test_another_backend_is_obeyed_at_once(models):
    decoding = Decoding(models)
    decoding.step()
    decoding.caches[1].group.backend = "cuda"
    with pytest.raises(UnsupportedError):
        decoding.step()


def test_with_gradients_enabled(models):
    """A forward of one's own without no_grad: the paged cache keeps no gradient, and nothing of it asks for one."""
    ours = models[1]
    cache = PagedLatentCache(ours.config, 16)
    ids = torch.randint(3, 90, (2, 9), generator=torch.Generator().manual_seed(1))
    outputs = [ours(part, past_key_values=cache, use_cache=True).logits for part in (ids[:, :7], ids[:, 7:8])]
    again = ours(ids[:, 8:], past_key_values=cache, use_cache=True).logits
    assert not cache.layers[0].kv_cache.requires_grad
    with torch.no_grad():
        right = models[0](ids, use_cache=False).logits
    torch.testing.assert_close(torch.cat((*outputs, again), 1), right, rtol=1e-4, atol=1e-4)


def test_between_inference_mode_and_no_grad(models):
    decoding = Decoding(models)
    with torch.inference_mode():
        decoding.step()
    decoding.step()
    with torch.inference_mode():
        decoding.step()


def test_a_cache_does_not_keep_the_model():
    model = build("deepseek_v3", "flash_mla")
    output = model.generate(**prompt(), max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
    linear = weakref.ref(model.model.layers[0].self_attn.kv_b_proj)
    del model
    gc.collect()
    assert output.past_key_values.layers[0].step is not None
    assert linear() is None


@pytest.mark.parametrize("how", [copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))])
def test_a_copied_cache_looks_for_itself(models, how):
    decoding = Decoding(models)
    decoding.step()
    old = decoding.caches[1]
    clone = how(old)
    assert clone.layers[0].step is None
    assert not any(
        isinstance(value, step.Query) for value in clone.group.states[clone.layers[0].device].buffers.values()
    )
    decoding.caches[1] = clone
    clone.group.config = decoding.models[1].config
    decoding.step()
    decoding.step()


def test_layers_share_one_query(models):
    decoding = Decoding(models)
    decoding.step()
    buffers = {id(layer.step.buffer.q) for layer in decoding.caches[1].paged_layers}
    assert len(buffers) == 1


def test_streams_have_queries_of_their_own_and_a_capture_keeps_none(models, monkeypatch):
    """A graph owns what it writes to: what is made in a capture dies with its step, and serves no other."""
    where = (0, False)
    monkeypatch.setattr(step, "_place_in_time", lambda query: where)
    decoding = Decoding(models)
    layer = decoding.caches[1].layers[0]

    def query(stream, is_capturing):
        nonlocal where
        where = (stream, is_capturing)
        decoding.step()
        return layer.step.buffer.q

    first, second = query(1, False), query(2, False)
    assert first is not second
    captured = query(1, True)
    assert captured is not first
    assert query(1, False) is first
    assert query(2, False) is second
    assert all(held.q is not captured for held in layer.state.buffers.values())
    for stream in range(3, 3 + 2 * step.MOST_BUFFERS):
        query(stream, False)
        assert len(layer.state.buffers) <= step.MOST_BUFFERS


def test_checked_calls_are_those_of_the_ops(models, monkeypatch):
    """The short way launches what `ops.append` and `ops.decode` would have launched."""
    seen = []
    real = ops.BACKENDS["torch"].decode
    monkeypatch.setattr(ops.BACKENDS["torch"], "decode", lambda call, *rest: seen.append(call) or real(call, *rest))
    decoding = Decoding(models)
    decoding.step()
    decoding.step()
    layer = decoding.caches[1].layers[0]
    q = layer.step.buffer.q
    ops.decode(
        q,
        layer.kv_cache,
        layer.state.block_table,
        layer.state.cache_seqlens,
        kv_lora_rank=layer.kv_lora_rank,
        softmax_scale=1.0,
        causal=False,
    )
    assert seen[-1] == seen[0] == seen[LAYERS]


@pytest.fixture
def planned(models, monkeypatch):
    """Plans of a device of seven slots, which the CPU is made to want: as used, each beside the same made anew."""
    made, used = [], []
    real_make, real_plan = ops.plan_splits, attention._plan

    def make(*args, **kwargs):
        made.append(real_make(*args, **kwargs))
        return made[-1]

    def plan(layer, q, causal):
        state, found = layer.state, real_plan(layer, q, causal)
        lengths = state.cache_seqlens
        anew = real_make(q, layer.kv_cache, state.block_table, lengths, kv_lora_rank=layer.kv_lora_rank, causal=causal)
        used.append((found, anew))
        return found

    monkeypatch.setattr(ops.BACKENDS["torch"], "num_slots", lambda call: 7)
    monkeypatch.setattr(ops, "plan_splits", make)
    monkeypatch.setattr(attention, "_plan", plan)
    monkeypatch.setattr(attention, "_plans", lambda q: True)
    return made, used


def assert_plans_are_right(used):
    assert used
    for found, anew in used:
        assert torch.equal(found.items, anew.items)
        assert torch.equal(found.splits, anew.splits)
        assert (found.batch, found.seqlen_q, found.num_heads) == (anew.batch, anew.seqlen_q, anew.num_heads)


def test_a_plan_is_kept_until_a_row_begins_another_unit(models, planned):
    made, used = planned
    decoding = Decoding(models, length=60)
    for _ in range(10):  # 61 to 70 tokens: the fifth of them begins the second unit of 64
        decoding.step()
    assert len(made) == 2
    assert len(used) == 10 * LAYERS
    assert_plans_are_right(used)


def test_a_kept_plan_is_the_one_that_would_be_made(models, planned):
    """Whatever becomes of the rows between two steps."""
    made, used = planned
    draw = random.Random(0)
    decoding = Decoding(models, length=150)
    rows = 2
    for _ in range(120):
        what = draw.choice(("step", "step", "step", "chunk", "crop", "crop", "far", "swap", "rows"))
        if what == "crop":
            positions = draw.choice((1, 2))
            for cache in decoding.caches:
                cache.crop(-positions)
        elif what == "far":
            for cache in decoding.caches:
                cache.crop(-50)
            decoding.step(rows, 50 + draw.randrange(20))
        elif what == "swap":
            order = torch.randperm(rows, generator=decoding.generator)
            for cache in decoding.caches:
                cache.reorder_cache(order)
        elif what == "rows":
            chosen = [draw.randrange(rows) for _ in range(draw.randrange(1, 4))]
            for cache in decoding.caches:
                cache.batch_select_indices(torch.tensor(chosen))
            rows = len(chosen)
        decoding.step(rows, 3 if what == "chunk" else 1)
    assert_plans_are_right(used)
    assert len(made) < len(used) / LAYERS * 0.8


@pytest.mark.parametrize(("lengths", "times"), [((63, 40), 4), ((40, 9), 1)], ids=["over a boundary", "within a unit"])
def test_a_plan_over_rows_of_unknown_lengths(models, planned, lengths, times):
    """Padding among the new tokens: the host has bounds of the lengths, 64 and 65 of the first row are two units."""
    made, used = planned
    ours = models[1]
    cache = PagedLatentCache(ours.config, 16)
    inputs = prompt(lengths)
    with torch.no_grad():
        ours(**inputs, past_key_values=cache, use_cache=True)
        mask = inputs["attention_mask"]
        for column in ((1, 0), (0, 1), (1, 1), (1, 0)):
            mask = torch.cat((mask, torch.tensor(column)[:, None]), 1)
            ours(torch.full((2, 1), 5), attention_mask=mask, past_key_values=cache, use_cache=True)
    assert len(made) == times
    assert_plans_are_right(used)


def test_a_plan_does_not_outlast_a_capture(models, planned, monkeypatch):
    """A graph must own the plan that it uses, and one that it makes holds nothing before the graph runs."""
    made, _ = planned
    decoding = Decoding(models)
    decoding.step()
    state = decoding.caches[1].layers[0].state
    numbers = []
    for is_capturing in (False, True, True, False, False):
        monkeypatch.setattr(type(state), "_is_capturing", lambda self, answer=is_capturing: answer)
        decoding.step()
        numbers.append(len(made))
    assert numbers == [1, 2, 3, 4, 4]


class Launches:
    """In place of the compiled kernels' launches: does what they do, on the CPU, every other time it is asked to."""

    def __init__(self, checked, step_tensors, plan, scaling, results):
        self.checked, self.made_for, self.scaling = checked, plan.num_slots, scaling
        self.kv_cache, _, _, _, self.q, q_rope, _ = step_tensors
        self.rope_shape, self.rope_strides = q_rope.shape, q_rope.stride()
        self.results = results or SimpleNamespace(out=self.q.new_empty((*self.q.shape[:3], 32)), refused=0, run=0)

    def run(self, latent, k_rope, slots, q_rope, items, splits, block_table, cache_seqlens):
        if (self.results.refused + self.results.run) % 2:
            self.results.refused += 1
            return False
        self.results.run += 1
        _, _, num_heads, columns = self.rope_shape
        rows = []
        for request in range(self.rope_shape[0]):
            for head in range(num_heads):
                address = q_rope + 4 * (request * self.rope_strides[0] + head * self.rope_strides[2])
                assert self.rope_strides[3] == 1
                rows.append(list((ctypes.c_float * columns).from_address(address)))
        tokens = (latent.transpose(1, 2), k_rope.transpose(1, 2), slots)
        self.checked.append(self.kv_cache, *tokens, self.q, torch.tensor(rows).view(self.rope_shape))
        plan = SimpleNamespace(items=items, splits=splits)
        out = self.checked.decode(self.q, self.kv_cache, block_table, cache_seqlens, plan, self.scaling)
        self.results.out.copy_(out)
        return True


def test_launches_that_are_written_down(models, planned, monkeypatch):
    """They are looked for once per layer and number of slots, and what they refuse is done in the general way."""
    made = []

    def ready(checked, *arguments):
        *step_tensors, plan, scaling, results = arguments
        made.append(Launches(checked, step_tensors, plan, scaling, results))
        return made[-1]

    monkeypatch.setattr(ops.CheckedStep, "ready", ready)
    decoding = Decoding(models, length=97)
    before = ops.backend_counts()
    for _ in range(9):
        decoding.step()
    assert len(made) == LAYERS
    assert len({id(launches.results) for launches in made}) == 1
    assert made[0].results.run + made[0].results.refused == 9 * LAYERS
    assert abs(made[0].results.run - made[0].results.refused) <= 1
    after = ops.backend_counts()
    for op in ("append", "decode"):
        assert after[op, "torch"] - before.get((op, "torch"), 0) == 9 * LAYERS
    monkeypatch.setattr(ops.BACKENDS["torch"], "num_slots", lambda call: 9)
    decoding.caches[1].layers[0].state.plan = None
    decoding.step()
    assert len(made) == 2 * LAYERS


def test_a_capture_writes_no_launches_down(models, planned, monkeypatch):
    """The memory of partial results, which layers share otherwise, would be in the graph once per layer."""
    monkeypatch.setattr(step, "_place_in_time", lambda query: (0, True))
    monkeypatch.setattr(ops.CheckedStep, "ready", lambda checked, *rest: pytest.fail("in a capture"))
    decoding = Decoding(models)
    decoding.step()
    assert decoding.caches[1].layers[0].step.launches is None


def test_a_scale_that_changes_is_seen_in_the_next_step(models, planned, monkeypatch):
    made = []
    monkeypatch.setattr(
        ops.CheckedStep, "ready", lambda checked, *rest: made.append(1) or Launches(checked, rest[:-3], *rest[-3:])
    )
    decoding = Decoding(models)
    decoding.step()
    decoding.step()
    assert len(made) == LAYERS
    on_both(decoding, lambda attention: setattr(attention, "scaling", 2 * attention.scaling))
    decoding.step()
    decoding.step()
    assert len(made) == 2 * LAYERS
