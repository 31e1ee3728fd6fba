"""FLASH_MLA_DEBUG=1: wrong values in device memory are named before anything is read or written."""

from __future__ import annotations

import pytest
import torch
from cases import DEVICE, Case, make

import flash_mla
from flash_mla import ops


@pytest.fixture(autouse=True)
def _on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASH_MLA_DEBUG", "1")


def decode(problem, **changes):  # type: ignore[no-untyped-def]
    names = ("q", "kv_cache", "block_table", "cache_seqlens")
    arguments = dict(zip(names, problem.arguments(), strict=True)) | changes
    return flash_mla.decode(**arguments, **problem.options(), backend="torch")


@pytest.mark.parametrize("fp8", [False, True])
def test_right_values_pass(fp8: bool) -> None:
    """Garbage past the lengths is none of its business."""
    problem = make(Case("right", (70, 0, 64), fp8=fp8), torch.float32)
    out, _ = decode(problem)
    assert bool(out.isfinite().all())


def test_a_length_past_the_table() -> None:
    problem = make(Case("long", (70, 3)), torch.float32)
    lengths = torch.tensor([70, 193], dtype=torch.int32, device=DEVICE)
    with pytest.raises(ValueError, match=r"decode: cache_seqlens must be in 0\.\.192 .* got 193 at \[1\]"):
        decode(problem, cache_seqlens=lengths)


def test_a_negative_length() -> None:
    problem = make(Case("negative", (70, 3)), torch.float32)
    with pytest.raises(ValueError, match=r"cache_seqlens must be in .* got -1 at \[0\]"):
        decode(problem, cache_seqlens=torch.tensor([-1, 3], dtype=torch.int32, device=DEVICE))


def test_a_page_that_is_not_there() -> None:
    problem = make(Case("page", (70, 3)), torch.float32)
    problem.block_table[0, 1] = problem.kv_cache.shape[0]
    with pytest.raises(ValueError, match=r"block_table must name pages in 0\.\.4, got 5 at \[0, 1\]"):
        decode(problem)


@pytest.mark.parametrize(
    ("bits", "value"), [((0, 0, 0xC0, 0x7F), "nan"), ((0, 0, 0x80, 0x7F), "inf"), ((0, 0, 0, 0), "0.0")]
)
def test_a_scale_that_is_none(bits: tuple[int, ...], value: str) -> None:
    problem = make(Case("scale", (70,), kv_lora_rank=256, fp8=True), torch.float32)
    page = int(problem.block_table[0, 1])
    problem.kv_cache[page, 2, 0, 260:264] = torch.tensor(bits, dtype=torch.uint8)
    slot = page * 64 + 2
    with pytest.raises(ValueError, match=rf"finite and above 0, got {value} for columns 128\.\.255 of slot {slot}:"):
        decode(problem)


def test_a_slot_outside_the_pool() -> None:
    pool = torch.zeros((2, 64, 1, 160), device=DEVICE)
    slots = torch.tensor([[5], [128]], device=DEVICE)
    with pytest.raises(ValueError, match=r"append: slots must be in 0\.\.127, got 128 at \[1, 0\]"):
        flash_mla.append(pool, torch.ones(2, 1, 1, 128).to(pool), torch.ones(2, 1, 1, 32).to(pool), slots)
    assert not pool.any()


def sparse(indices: list[int], topk_length: int | None = None) -> None:
    q, pool = torch.ones((1, 1, 4, 160), device=DEVICE), torch.zeros((2, 64, 1, 160), device=DEVICE)
    named = torch.tensor([[indices]], dtype=torch.int32, device=DEVICE)
    length = None if topk_length is None else torch.tensor([topk_length], dtype=torch.int32, device=DEVICE)
    ops.sparse_decode(q, pool, named, kv_lora_rank=128, softmax_scale=0.1, topk_length=length)


def test_indices() -> None:
    sparse([0, 127, -1, -5])
    with pytest.raises(ValueError, match=r"indices must be negative or below the 128 rows .* got 128 at \[0, 0, 1\]"):
        sparse([0, 128])
    sparse([0, 128], topk_length=1)
    with pytest.raises(ValueError, match=r"topk_length must be in 0\.\.topk=2, got 3 at \[0\]"):
        sparse([0, 1], topk_length=3)


def test_decode_steps_of_a_model_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also those that would go by what the step before found out."""
    from tiny_models import MLA, build, need, prompt

    from flash_mla import PagedLatentCache

    assert MLA["kv_lora_rank"] == 32
    config = need("deepseek_v3").config(need("deepseek_v3").load())
    config.kv_lora_rank = 128
    model = build("deepseek_v3", "flash_mla", config=config)
    cache, ids = PagedLatentCache(config, dtype="fp8"), prompt((30, 30))["input_ids"]
    with torch.no_grad():
        model(input_ids=ids, past_key_values=cache)
        model(input_ids=ids[:, :1], past_key_values=cache)
        layer = cache.layers[1]
        layer.kv_cache[int(layer.state.block_table[0, 0]), 3, 0, 128:132] = 0xFF
        with pytest.raises(ValueError, match="scales of FP8 rows must be finite and above 0, got nan"):
            model(input_ids=ids[:, :1], past_key_values=cache)


def test_off_unless_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASH_MLA_DEBUG", "0")
    sparse([0, 128])
