"""The split plan: every part once, the longest part as short as possible, the same integers from every backend."""

from __future__ import annotations

import random

import pytest
import torch
from cases import DEVICE, TRITON_DTYPES, Case, make

import flash_mla
from flash_mla.backends import torch as torch_backend
from flash_mla.backends import triton as triton_backend
from flash_mla.contract import PLAN_BLOCK

BACKENDS = {"torch": torch_backend, "triton": triton_backend}
LENGTHS = {
    "one request": [100],
    "nothing at all": [0, 0, 0],
    "equal lengths stay whole below twice as many items": [4096] * 6,
    "one long request among short ones": [100_000, 1, 0, 64, 65],
    "lengths at unit boundaries": [63, 64, 65, 127, 128, 129],
    "the longest that int32 holds": [2**31 - 64, 5],
    "a negative length counts as none": [-5, 130],
}


def random_lengths(batch: int) -> list[int]:
    draw = random.Random(batch)
    return [draw.choice((0, draw.randrange(1, 200), draw.randrange(1, 50_000))) for _ in range(batch)]


CASES = [pytest.param(lengths, id=name) for name, lengths in LENGTHS.items()]
CASES += [pytest.param(random_lengths(batch), id=f"random {batch}") for batch in (2, 17, 1024, 1025, 2500)]


def plan(backend: str, lengths: list[int], num_items: int) -> tuple[torch.Tensor, torch.Tensor]:
    return BACKENDS[backend].plan(torch.tensor(lengths, dtype=torch.int32, device=DEVICE), num_items)


def spare(batch: int) -> list[int]:
    return [batch, batch + 1, 2 * batch - 1 + (batch == 1), 3 * batch + 40]


@pytest.mark.parametrize("lengths", CASES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_parts(lengths: list[int], backend: str) -> None:
    batch = len(lengths)
    units = [-(-max(length, 0) // PLAN_BLOCK) for length in lengths]
    for num_items in spare(batch):
        items, first_item = (tensor.tolist() for tensor in plan(backend, lengths, num_items))
        used = [item for item in items if item[0] >= 0]
        assert items == used + [[-1] * 4] * (num_items - len(used))
        right, begins = [], [0]
        for request in range(batch):
            parts = first_item[request + 1] - first_item[request]
            right += [[request, part, parts, begins[-1]] for part in range(parts)]
            begins.append(begins[-1] + parts)
        assert used == right
        assert first_item == begins
        assert all(parts >= 1 for parts in (first_item[i + 1] - first_item[i] for i in range(batch)))
        # With parts one unit shorter than the longest they would not fit.
        longest = max(-(-count // (first_item[i + 1] - first_item[i])) for i, count in enumerate(units))
        if longest > 1:
            assert sum(max(1, -(-count // (longest - 1))) for count in units) > num_items


@pytest.mark.parametrize("lengths", CASES)
def test_backends_agree(lengths: list[int]) -> None:
    for num_items in spare(len(lengths)):
        for ours, definition in zip(plan("triton", lengths, num_items), plan("torch", lengths, num_items), strict=True):
            assert torch.equal(ours, definition)


def test_strided_lengths() -> None:
    lengths = torch.tensor([[700, 1], [3, 1], [64, 1]], dtype=torch.int32, device=DEVICE)[:, 0]
    for ours, definition in zip(triton_backend.plan(lengths, 9), torch_backend.plan(lengths, 9), strict=True):
        assert torch.equal(ours, definition)


def test_parts_cover_every_token_at_any_length() -> None:
    """The rule by which kernels turn (part, num_parts) into tokens: contiguous, disjoint, complete, whole units."""
    for length in (0, 1, 63, 64, 65, 1000, 2**31 - 64):
        for num_parts in (1, 2, 7, 64):
            units = -(-length // PLAN_BLOCK)
            edges = [min(units * part // num_parts * PLAN_BLOCK, length) for part in range(num_parts + 1)]
            assert edges[0] == 0
            assert edges[-1] == length
            assert edges == sorted(edges)


@pytest.mark.parametrize("backend", BACKENDS)
def test_size_depends_on_shapes_alone(backend: str) -> None:
    """Two batches of the same shape get plans of the same size, as a captured graph needs."""
    dtype = TRITON_DTYPES[0]
    short, long = make(Case("short", (1, 2, 3)), dtype), make(Case("long", (1000, 2, 500)), dtype)
    sizes = set()
    for problem in (short, long):
        q, pool, table, lengths = problem.arguments()
        made = flash_mla.plan_splits(q, pool, table[:, :1], lengths, kv_lora_rank=128, backend=backend)
        assert (made.batch, made.seqlen_q, made.num_heads, made.h_kv) == (3, 1, 4, 1)
        assert made.items.shape[0] >= 3
        sizes.add(made.items.shape[0])
    assert len(sizes) == 1


def test_opcheck() -> None:
    lengths = torch.tensor([700, 0, 64], dtype=torch.int32, device=DEVICE)
    torch.library.opcheck(torch.ops.flash_mla.plan.default, (lengths, 8))
