"""Pools that grow in place on a GPU: addresses, bytes, what decode reads, what is given back, what generate() says."""

from __future__ import annotations

import copy
import gc
from collections.abc import Iterator

import pytest
import torch
from cases import Case, make
from numerics import assert_right
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

import flash_mla
from flash_mla.backends.cuda import memory
from flash_mla.cache import pool

if not torch.cuda.is_available():
    pytest.skip("needs a GPU: memory of the driver", allow_module_level=True)
if reason := memory.refusal(torch.cuda.current_device()):
    pytest.skip(f"needs a GPU with virtual memory management: {reason}", allow_module_level=True)

MIB = 2**20
DEVICE = torch.device("cuda", torch.cuda.current_device())
GRANULE = memory.granule(DEVICE.index)
PAGE = (64, 1, 576)
PAGE_BYTES = 64 * 576 * 2
RANK, ROPE = 512, 64


@pytest.fixture(autouse=True)
def _nothing_is_left_over() -> Iterator[None]:
    """Every test begins with nothing kept, and what it made is given back or, at its end, kept."""
    gc.collect()
    memory.release_kept()
    held = memory.held_bytes(DEVICE.index)
    yield
    gc.collect()
    torch.cuda.synchronize()
    assert memory.held_bytes(DEVICE.index) - memory.kept_bytes(DEVICE.index) == held
    memory.release_kept()
    assert memory.held_bytes(DEVICE.index) == held


def config(**changes: object) -> DeepseekV3Config:
    made = DeepseekV3Config(
        **{
            "vocab_size": 99,
            "hidden_size": 128,
            "intermediate_size": 192,
            "moe_intermediate_size": 64,
            "num_hidden_layers": 3,
            "first_k_dense_replace": 3,  # routing is a step function: a rounding error may choose another expert
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "kv_lora_rank": RANK,
            "q_lora_rank": 64,
            "qk_rope_head_dim": ROPE,
            "qk_nope_head_dim": 32,
            "v_head_dim": 32,
            "initializer_range": 0.12,
            "max_position_embeddings": 8192,
            "pad_token_id": 0,
            "eos_token_id": None,
            **changes,
        }
    )
    made._attn_implementation = "flash_mla"
    return made


def store(cache: flash_mla.PagedLatentCache, batch: int, seqlen_q: int, seed: int, dtype=torch.bfloat16) -> None:
    generator = torch.Generator(DEVICE).manual_seed(seed)
    for index in range(len(cache.layers)):
        rows = torch.randn(batch, 1, seqlen_q, RANK + ROPE, generator=generator, device=DEVICE, dtype=dtype)
        handle, _ = cache.update(rows[..., :RANK], rows[..., RANK:], index)
        handle.layer.write(handle, None)


def everything(cache: flash_mla.PagedLatentCache) -> list[torch.Tensor]:
    return [torch.cat(layer.gather(), dim=-1) for layer in cache.paged_layers]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_a_tensor_that_grows_stays_where_it_is_with_its_contents(dtype: torch.dtype) -> None:
    made = memory.GrowingMemory(DEVICE, 1)
    per_granule = GRANULE // dtype.itemsize
    tensor = made.tensor((per_granule,), dtype)
    address, wanted = tensor.data_ptr(), torch.randn(per_granule, device=DEVICE, dtype=dtype)
    tensor.copy_(wanted)
    for granules in (2, 3, 8, 40):
        made.grow(granules * GRANULE)
        grown = made.tensor((granules * per_granule,), dtype)
        assert (grown.data_ptr(), grown.device, grown.dtype) == (address, DEVICE, dtype)
        assert torch.equal(grown[: len(wanted)], wanted)
        assert grown[len(wanted) :].count_nonzero() == 0
        grown[len(wanted) :].normal_()
        wanted = grown.clone()
    assert torch.equal(tensor, wanted[:per_granule]), "the tensor from before shows the same memory"


@pytest.mark.parametrize("kept_bytes", [0, memory.KEPT_BYTES])
def test_new_memory_is_zero_where_old_memory_was_nan(kept_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "KEPT_BYTES", kept_bytes)
    for _ in range(3):
        made = memory.GrowingMemory(DEVICE, 64 * MIB)
        tensor = made.tensor((16 * MIB,), torch.float32)
        assert tensor.count_nonzero() == 0
        tensor.fill_(float("nan"))
        del made, tensor


def test_a_tensor_outlives_the_memory_object_and_a_stream_its_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "KEPT_BYTES", 0)
    made = memory.GrowingMemory(DEVICE, 256 * MIB)
    tensor = made.tensor((64 * MIB,), torch.float32)[1:]
    del made
    for _ in range(50):
        tensor.add_(1)  # in flight when the last reference goes: unmapping now would be an illegal address
    total = tensor.sum(dtype=torch.float64)  # 3.4e9 is no fp32 number
    del tensor
    assert total.item() == 50 * (64 * MIB - 1)


def test_beyond_its_addresses_it_shows_the_same_memory_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "MIN_RESERVED", GRANULE)
    monkeypatch.setattr(memory, "RESERVED_FACTOR", 2)
    made = memory.GrowingMemory(DEVICE, 2 * GRANULE)
    old = made.tensor((2 * GRANULE // 4,), torch.float32)
    old.normal_()
    wanted = old.clone()
    memory.reset_peak()
    held = memory.held_bytes(DEVICE.index)
    made.grow(9 * GRANULE)
    new = made.tensor((9 * GRANULE // 4,), torch.float32)
    assert new.data_ptr() != old.data_ptr()
    assert memory.peak_bytes(DEVICE.index) == held + 7 * GRANULE, "no copy, not even for a while"
    assert torch.equal(new[: len(old)], wanted)
    old.add_(1)
    assert torch.equal(new[: len(old)], wanted + 1)
    del old
    new.add_(1)
    assert torch.equal(new[: len(wanted)], (wanted + 1) + 1)  # rounded twice, as there


def test_memory_is_given_back_to_the_device() -> None:
    memory.GrowingMemory(DEVICE, 1)  # whatever the first use loads stays loaded
    torch.cuda.empty_cache()
    before, _ = torch.cuda.mem_get_info(DEVICE)
    allocated = torch.cuda.memory_reserved(DEVICE)
    made = memory.GrowingMemory(DEVICE, 512 * MIB)
    during, _ = torch.cuda.mem_get_info(DEVICE)
    assert before - during >= 512 * MIB
    assert torch.cuda.memory_reserved(DEVICE) == allocated, "not torch's"
    del made
    after, _ = torch.cuda.mem_get_info(DEVICE)
    assert after == before


def test_small_memory_is_kept_and_given_back_on_demand() -> None:
    made = memory.GrowingMemory(DEVICE, 64 * MIB)
    during, _ = torch.cuda.mem_get_info(DEVICE)
    address = made.address
    del made
    kept, _ = torch.cuda.mem_get_info(DEVICE)
    assert kept == during
    assert memory.kept_bytes(DEVICE.index) == 64 * MIB
    made = memory.GrowingMemory(DEVICE, 50 * MIB)
    assert made.address == address
    del made
    memory.release_kept(DEVICE.index)
    after, _ = torch.cuda.mem_get_info(DEVICE)
    assert after - kept >= 64 * MIB


def test_another_stream_waits_before_it_uses_kept_memory_again() -> None:
    side = torch.cuda.Stream(DEVICE)
    made = memory.GrowingMemory(DEVICE, 64 * MIB)
    address, tensor = made.address, made.tensor((16 * MIB,), torch.float32)
    for _ in range(200):
        tensor.add_(1)  # 128 MiB of traffic each: some 8 ms in flight when the other stream zeroes it
    del made, tensor
    with torch.cuda.stream(side):
        made = memory.GrowingMemory(DEVICE, 64 * MIB)
        assert made.address == address
        assert made.tensor((16 * MIB,), torch.float32).count_nonzero() == 0
    torch.cuda.synchronize()
    assert made.tensor((16 * MIB,), torch.float32).count_nonzero() == 0, "nothing of the first stream came later"


def test_out_of_memory_is_torchs_error_and_leaves_everything_as_it_was() -> None:
    made = memory.GrowingMemory(DEVICE, GRANULE)
    tensor = made.tensor((16,), torch.float32)
    tensor.fill_(3)
    held = memory.held_bytes(DEVICE.index)
    with pytest.raises(torch.OutOfMemoryError, match=r"^CUDA out of memory\. flash_mla: memory of 2 MiB wanted"):
        made.grow(torch.cuda.get_device_properties(DEVICE).total_memory + GRANULE)
    assert (made.num_bytes, memory.held_bytes(DEVICE.index)) == (GRANULE, held)
    made.grow(2 * GRANULE)
    assert tensor.tolist() == [3.0] * 16


def test_memory_that_dies_in_a_capture_is_given_back_after_it() -> None:
    made = memory.GrowingMemory(DEVICE, GRANULE)
    static = torch.zeros(8, device=DEVICE)
    held = memory.held_bytes(DEVICE.index)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        static.add_(1)
        del made
        assert memory.held_bytes(DEVICE.index) == held
        static.add_(1)
    graph.replay()
    assert static.tolist() == [2.0] * 8
    memory.release_pending()
    assert memory.held_bytes(DEVICE.index) == held - GRANULE


@pytest.mark.parametrize("backend", [None, "triton"])
@pytest.mark.parametrize("num_heads", [16, 128])
def test_decode_over_a_grown_pool(num_heads: int, backend: str | None) -> None:
    """The pool of a problem put into memory that grows page by page; NaN wherever nothing may be read."""
    case = Case(
        "grown",
        (1, 700, 65, 2000),
        num_heads=num_heads,
        kv_lora_rank=RANK,
        qk_rope_head_dim=ROPE,
        block_size=64,
        softmax_scale=576**-0.5,
    )
    problem = make(case, torch.bfloat16, device=DEVICE)
    q, kv_cache, block_table, cache_seqlens = problem.arguments()
    memory_pool = pool.Pool(grows=True)
    grown = memory_pool.zeros((1, *PAGE), torch.bfloat16, DEVICE)
    address = grown.data_ptr()
    for pages in range(1, kv_cache.shape[0] + 1):
        if pages > 1:
            grown = memory_pool.grow(grown, pages)
        grown[pages - 1] = kv_cache[pages - 1]
        # A kernel over the smaller pool may still run when the next page is mapped.
        smaller = block_table.clamp(max=pages - 1), cache_seqlens.clamp(max=1)
        flash_mla.decode(q, grown, *smaller, **problem.options(), backend=backend)
    assert grown.data_ptr() == address
    assert grown.shape[0] * PAGE_BYTES > GRANULE, "more than one granule"
    out, lse = flash_mla.decode(q, grown, block_table, cache_seqlens, **problem.options(), backend=backend)
    plain_out, plain_lse = flash_mla.decode(*problem.arguments(), **problem.options(), backend=backend)
    assert torch.equal(out, plain_out), "the same kernel over the same pages elsewhere"
    assert torch.equal(lse, plain_lse)
    assert_right(problem, out, lse)


def test_a_cache_grows_in_place_and_holds_no_more_than_a_granule_beyond_its_pages() -> None:
    cache = flash_mla.PagedLatentCache(config())
    held = memory.held_bytes(DEVICE.index)
    memory.reset_peak()
    store(cache, 2, 500, seed=0)
    addresses = [layer.kv_cache.data_ptr() for layer in cache.layers]
    before = everything(cache)
    for step in range(1, 40):
        store(cache, 2, 97, seed=step)
        report = cache.memory_report()
        in_use = len(cache.layers) * (report.pages_allocated + 1) * PAGE_BYTES
        assert memory.peak_bytes(DEVICE.index) - held < in_use + len(cache.layers) * GRANULE
    assert report.bytes_allocated == len(cache.layers) * (report.pages_total + 1) * PAGE_BYTES
    assert [layer.kv_cache.data_ptr() for layer in cache.layers] == addresses
    for old, new in zip(before, everything(cache), strict=True):
        assert torch.equal(old, new[:, :, :500])
    cache.validate()


def test_a_deepcopied_cache_is_independent_and_grows() -> None:
    cache = flash_mla.PagedLatentCache(config())
    store(cache, 2, 2000, seed=0)
    before = everything(cache)
    clone = copy.deepcopy(cache)
    held = memory.held_bytes(DEVICE.index)
    store(clone, 2, 3000, seed=1)
    assert memory.held_bytes(DEVICE.index) > held
    address = clone.layers[0].kv_cache.data_ptr()
    store(clone, 2, 3000, seed=2)
    assert clone.layers[0].kv_cache.data_ptr() == address
    for old, ours, theirs in zip(before, everything(cache), everything(clone), strict=True):
        assert torch.equal(old, ours)
        assert torch.equal(old, theirs[:, :, :2000])


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_generate_says_the_same_with_pools_that_grow_in_place_by_copy_and_not_at_all(mode, monkeypatch) -> None:
    torch.manual_seed(0)
    model = DeepseekV3ForCausalLM(config()).eval().to(DEVICE)  # fp32: tokens are compared
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 99, (5, 400), generator=generator).to(DEVICE)
    mask = torch.ones_like(ids)
    mask[0, :100] = 0
    arguments = {"attention_mask": mask, "do_sample": False, "max_new_tokens": 150, "return_dict_in_generate": True}

    def tokens(**options: object) -> tuple[torch.Tensor, object]:
        with mode():
            out = model.generate(ids * mask, **arguments, **options)
        return out.sequences, out.past_key_values

    grown, cache = tokens()
    assert cache.layers[0].pool._memory is not None
    # 34 pages of 144 KiB for the prompts, 45 at the end: of 2 MiB, three granules at first and a fourth later.
    assert len(cache.layers[-1].pool._memory._range.mapping.physical) == 2
    cache.validate()
    del cache
    with monkeypatch.context() as patch:
        patch.setattr(pool, "_grows_in_place", lambda device: False)
        copied, cache = tokens()
        assert cache.layers[0].pool._memory is None
    fixed_cache = flash_mla.PagedLatentCache(model.config, max_cache_len=550)
    fixed, _ = tokens(past_key_values=fixed_cache, disable_compile=True)
    assert torch.equal(grown, copied)
    assert torch.equal(grown, fixed)


def test_generate_twice_says_the_same_and_allocates_once(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = DeepseekV3ForCausalLM(config()).eval().to(DEVICE)
    ids = torch.randint(3, 99, (5, 400), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    arguments = {"attention_mask": torch.ones_like(ids), "do_sample": False, "max_new_tokens": 150}
    created = []
    create = memory._Physical.__init__

    def count(self: memory._Physical, device_index: int, num_bytes: int) -> None:
        created.append(num_bytes)
        create(self, device_index, num_bytes)

    monkeypatch.setattr(memory._Physical, "__init__", count)
    held = memory.held_bytes(DEVICE.index)
    first = model.generate(ids, **arguments)
    gc.collect()
    assert sum(created) == memory.kept_bytes(DEVICE.index) == memory.held_bytes(DEVICE.index) - held > 0
    created.clear()
    second = model.generate(ids, **arguments)
    assert created == [], "prompt and growth lie where those of the first call lay"
    assert torch.equal(first, second)


def test_the_next_cache_of_the_same_size_is_zero() -> None:
    held = []
    for _ in range(2):
        cache = flash_mla.PagedLatentCache(config())
        store(cache, 2, 500, seed=0)
        for layer in cache.layers:
            assert layer.kv_cache.any(dim=-1).sum().item() == 2 * 500, "no row but those"
            layer.kv_cache.fill_(float("nan"))
        held.append(memory.held_bytes(DEVICE.index))
        del cache, layer
        gc.collect()
    assert held[0] == held[1], "the same memory"


def test_beams_copy_shared_pages_in_a_pool_that_grew(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = DeepseekV3ForCausalLM(config()).eval().to(DEVICE)
    ids = torch.randint(3, 99, (3, 300), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    arguments = {"num_beams": 4, "do_sample": False, "max_new_tokens": 80, "attention_mask": torch.ones_like(ids)}
    found = model.generate(ids, **arguments)
    monkeypatch.setattr(pool, "_grows_in_place", lambda device: False)
    assert torch.equal(found, model.generate(ids, **arguments))
