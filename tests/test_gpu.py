"""generate() on a GPU: its kernels in bf16 and fp16, and compiled decode with CUDA graphs."""

import copy

import pytest
import torch
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, DynamicCache

import flash_mla
from flash_mla import ops
from flash_mla.backends.cuda.step import StepLaunches
from flash_mla.cache.growing import GrowingState

if not torch.cuda.is_available():
    pytest.skip("needs a GPU: bf16 kernels and CUDA graphs", allow_module_level=True)

PROMPT, STEPS = 70, 12
BACKEND = "cuda" if torch.cuda.get_device_capability() == (9, 0) else "triton"


def make(dtype: torch.dtype, attn: str) -> DeepseekV3ForCausalLM:
    torch.manual_seed(0)
    config = DeepseekV3Config(
        vocab_size=99,
        hidden_size=128,
        intermediate_size=192,
        moe_intermediate_size=64,
        num_hidden_layers=3,
        first_k_dense_replace=3,  # routing is a step function: a rounding error may choose another expert
        num_attention_heads=4,
        num_key_value_heads=4,
        kv_lora_rank=128,
        q_lora_rank=64,
        qk_rope_head_dim=32,
        qk_nope_head_dim=32,
        v_head_dim=32,
        initializer_range=0.12,
        max_position_embeddings=512,
        pad_token_id=0,
        eos_token_id=None,
    )
    config._attn_implementation = "eager"
    model = DeepseekV3ForCausalLM(config).eval()
    # One set of weights that every dtype can hold, so that only the arithmetic differs.
    model.to(torch.bfloat16).to(dtype).to("cuda")
    model.set_attn_implementation(attn)
    return model


def prompts() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 99, (3, PROMPT + STEPS), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, :41] = 0
    mask[2, :3] = 0
    return (ids * mask).cuda(), mask.cuda()


@torch.no_grad()
def forced_logits(model: DeepseekV3ForCausalLM, cache: object = None) -> torch.Tensor:
    """Logits of the last prompt position and of every following token, given one by one."""
    ids, mask = prompts()
    out = model(ids[:, :PROMPT], attention_mask=mask[:, :PROMPT], past_key_values=cache, use_cache=True)
    assert torch.isfinite(out.logits).all(), "padded positions must be finite too"
    logits = [out.logits[:, -1]]
    for end in range(PROMPT + 1, PROMPT + STEPS):
        out = model(
            ids[:, end - 1 : end], attention_mask=mask[:, :end], past_key_values=out.past_key_values, use_cache=True
        )
        logits.append(out.logits[:, -1])
    return torch.stack(logits).double()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("max_cache_len", [None, 128], ids=["growing", "fixed"])
def test_logits_are_no_further_from_fp64_than_twice_sdpa(dtype, max_cache_len):
    # Not eager: its softmax is in fp32, where the mask's fp64 minimum is -inf, so padded rows become NaN.
    exact = forced_logits(make(torch.float64, "sdpa"))
    plain = forced_logits(make(dtype, "sdpa"))
    model = make(dtype, "flash_mla")
    flash_mla.reset_path_counts()
    before = flash_mla.backend_counts().get(("decode", BACKEND), 0)
    ours = forced_logits(model, flash_mla.PagedLatentCache(model.config, max_cache_len=max_cache_len))
    assert flash_mla.path_counts() == {("deepseek_v3", "prefill"): 3, ("deepseek_v3", "absorbed"): 3 * (STEPS - 1)}
    assert flash_mla.backend_counts()["decode", BACKEND] - before == 3 * (STEPS - 1)
    yardstick = (plain - exact).norm().item()
    error = (ours - exact).norm().item()
    assert error <= 2 * yardstick, f"error {error:.3e}, sdpa in {dtype} has {yardstick:.3e}"


class Applied(torch.nn.Linear):
    """Not `nn.Linear` itself, so its matrix is found by applying it: before the graph, not inside."""


@pytest.mark.parametrize("linear", [torch.nn.Linear, Applied], ids=["plain", "applied"])
@pytest.mark.parametrize("cache", [None, "static"], ids=["growing", "compiled"])
def test_tokens_are_those_of_eager_in_fp32(cache, linear):
    """Static: inductor and CUDA graphs, replayed with growing lengths, over a ragged batch."""
    ids, mask = prompts()
    arguments = {"attention_mask": mask[:, :PROMPT], "do_sample": False, "max_new_tokens": 24}
    torch.backends.cuda.matmul.allow_tf32 = False
    wanted = make(torch.float32, "eager").generate(ids[:, :PROMPT], **arguments)
    model = make(torch.float32, "flash_mla")
    for layer in model.model.layers:
        layer.self_attn.kv_b_proj.__class__ = linear
    for _ in range(2):
        flash_mla.reset_path_counts()
        found = model.generate(ids[:, :PROMPT], cache_implementation=cache, **arguments)
        assert torch.equal(found, wanted)
        assert ("deepseek_v3", "prefill") in flash_mla.path_counts()
        assert {path for _, path in flash_mla.path_counts()} <= {"prefill", "absorbed"}


def test_compiled_decode_replays_the_kernel():
    """In bf16 the graph's arithmetic differs from eager's in rounding, so tokens are compared by their logits."""
    ids, mask = prompts()
    model = make(torch.bfloat16, "flash_mla")
    arguments = {"attention_mask": mask[:, :PROMPT], "do_sample": False, "max_new_tokens": 24}
    scores = {"return_dict_in_generate": True, "output_logits": True}
    torch._dynamo.utils.counters.clear()
    for _ in range(2):
        found = model.generate(ids[:, :PROMPT], cache_implementation="static", **arguments, **scores)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not torch._dynamo.utils.counters["graph_break"]
    found.past_key_values.validate()
    full_mask = torch.cat((mask[:, :PROMPT], mask.new_ones((3, 24))), dim=1)
    with torch.no_grad():
        exact = copy.deepcopy(model).double()
        exact.set_attn_implementation("sdpa")
        again = exact(found.sequences, attention_mask=full_mask, use_cache=False).logits[:, PROMPT - 1 : -1]
        plain = copy.deepcopy(model)
        plain.set_attn_implementation("sdpa")
        yardstick = plain(found.sequences, attention_mask=full_mask, use_cache=False).logits[:, PROMPT - 1 : -1]
    ours = torch.stack(found.logits, dim=1).double()
    assert (ours - again).norm() <= 2 * (yardstick.double() - again).norm()


def test_the_rows_of_a_fully_padded_query_are_finite():
    """SDPA on a GPU must give numbers, not NaN, where a query sees nothing; the cache then holds only real tokens."""
    model = make(torch.bfloat16, "flash_mla")
    ids, mask = prompts()
    cache = flash_mla.PagedLatentCache(model.config)
    with torch.no_grad():
        out = model(ids, attention_mask=mask, past_key_values=cache, use_cache=True, output_hidden_states=True)
    assert all(torch.isfinite(hidden).all() for hidden in out.hidden_states)
    assert cache.memory_report().tokens_used == int(mask.sum())


@torch.no_grad()
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("max_cache_len", [None, 256], ids=["growing", "fixed"])
def test_a_decode_step_never_waits_for_the_device(max_cache_len, padded):
    """70 steps, so every row takes a new page; growing pools take new memory at the first of them."""
    ids, mask = prompts()
    if not padded:
        ids, mask = ids.clamp(min=3), torch.ones_like(mask)
    model = make(torch.bfloat16, "flash_mla")
    cache = flash_mla.PagedLatentCache(model.config, max_cache_len=max_cache_len)
    width = ids.shape[1]
    model(ids, attention_mask=mask, past_key_values=cache, use_cache=True)
    whole = torch.cat((mask, mask.new_ones(3, 80)), dim=1)
    positions = whole.cumsum(1) - 1
    token = ids[:, -1:]
    model(  # kernels are loaded and pages mapped in a step of their own
        token, attention_mask=whole[:, : width + 1], position_ids=positions[:, width : width + 1], past_key_values=cache
    )
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for end in range(width + 2, width + 72):
            out = model(
                token,
                attention_mask=whole[:, :end] if padded else None,
                position_ids=positions[:, end - 1 : end],
                past_key_values=cache,
                use_cache=True,
            )
            token = out.logits[:, -1].argmax(-1, keepdim=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    cache.validate()
    assert cache.memory_report().tokens_used == int(mask.sum()) + 3 * 71


def kernels_of_a_step(attn: str) -> list[str]:
    """Names of the kernels of one decode step of three layers, when everything that happens once has happened."""
    ids, _ = prompts()
    model = make(torch.bfloat16, attn)
    cache = flash_mla.PagedLatentCache(model.config) if attn == "flash_mla" else DynamicCache(config=model.config)
    model(ids[:, :PROMPT], past_key_values=cache, use_cache=True)
    for step in range(3):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            model(ids[:, PROMPT + step : PROMPT + step + 1], past_key_values=cache, use_cache=True)
            torch.cuda.synchronize()
    return [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]


@pytest.mark.skipif(BACKEND != "cuda", reason="needs Hopper: only its launches are written down")
@pytest.mark.parametrize("options", [{}, {"max_cache_len": 128}], ids=["growing", "fixed"])
@torch.no_grad()
def test_what_is_kept_from_step_to_step_changes_no_bit(options, monkeypatch):
    """Launches that are written down and plans that still hold, against the general way and a plan in every step."""
    ids = prompts()[0].clamp(min=3)
    model = make(torch.bfloat16, "flash_mla")
    ran = []
    run = StepLaunches.run
    monkeypatch.setattr(StepLaunches, "run", lambda self, *rest: ran.append(run(self, *rest)) or ran[-1])

    def logits():
        cache = flash_mla.PagedLatentCache(model.config, **options)
        parts = [ids[:, :PROMPT], *ids[:, PROMPT:].split(1, 1)]
        return torch.cat([model(part, past_key_values=cache, use_cache=True).logits[:, -1:] for part in parts], 1)

    kept = logits()
    assert ran == [True] * 3 * STEPS
    monkeypatch.setattr(ops.CheckedStep, "ready", lambda self, *rest: None)
    monkeypatch.setattr(GrowingState, "_keeps_plan", lambda self, seqlen_q: False)
    assert torch.equal(kept, logits())
    assert len(ran) == 3 * STEPS


@torch.no_grad()
def test_launches_of_a_decode_step():
    """Per layer append (with the rotated columns of q), decode (and its merge) and two products; per forward slots, and
    the plan where a row begins another 64 tokens: not with the 73rd. Native attention has its cache's and the
    expansion's copies instead, and more launches."""
    names, native = kernels_of_a_step("flash_mla"), kernels_of_a_step("sdpa")
    layers = 3

    def count(part: str) -> int:
        return sum(part in name for name in names)

    if BACKEND == "cuda":
        assert (count("append_rows"), count("next_slots"), count("plan_splits")) == (layers, 1, 0)
        assert count("flash_fwd_splitkv") == layers
        assert count("flash_fwd_mla_combine") <= layers
    assert len(names) < len(native), (names, native)
    # The rotary embedding and the query are concatenated by the model; nothing of ours is.
    assert count("Cat") <= sum("Cat" in name for name in native) - 2 * layers
