"""The split plan: every token once, slots as even as the rule allows, the same integers from every backend."""

from __future__ import annotations

import ctypes
import random
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from cases import DEVICE, TRITON_DTYPES, Case, make, needs_hopper

import flash_mla
from flash_mla import contract
from flash_mla.backends import cuda as cuda_backend
from flash_mla.backends import torch as torch_backend
from flash_mla.backends import triton as triton_backend
from flash_mla.backends.cuda import driver
from flash_mla.backends.cuda.plan import PARAMS, THREADS
from flash_mla.contract import (
    CUT_COST,
    FIXED_UNITS,
    ITEM_COST,
    MAX_PARTS,
    MIN_TAKE,
    PLAN_BLOCK,
    PLAN_CANDIDATES,
    PLAN_WHOLE,
    fixed_slots,
)

UNUSED = [-1, 0, 0, -1]
# The definition's integers are promised for CPU tensors.
MADE_BY = {"torch": (torch_backend, "cpu"), "triton": (triton_backend, DEVICE), "cuda": (cuda_backend, DEVICE)}
ON_GPUS = [pytest.param("triton"), pytest.param("cuda", marks=needs_hopper)]

LENGTHS = {
    "no request": [],
    "one request": [100],
    "one long request": [64 * 1024],
    "nothing at all": [0, 0, 0],
    "a length at which many must be cut": [4096] * 70,
    "equal lengths": [4096] * 6,
    "one long request among short ones": [100_000, 1, 0, 64, 65],
    "lengths at unit boundaries": [63, 64, 65, 127, 128, 129],
    "the longest that int32 holds": [2**31 - 64, 5, 2**31 - 1],
    "slots of more units than int32 holds": [2**31 - 1] * 256 + [6400],
    "a negative length counts as none": [-5, 130, -(2**31)],
}


def random_lengths(batch: int) -> list[int]:
    draw = random.Random(batch)
    return [draw.choice((0, draw.randrange(1, 200), draw.randrange(1, 50_000))) for _ in range(batch)]


CASES = [pytest.param(lengths, id=name) for name, lengths in LENGTHS.items()]
CASES += [pytest.param(random_lengths(batch), id=f"random {batch}") for batch in (2, 17, 150)]
NUM_SLOTS = (1, 2, 7, 66, 132)


def units_of(length: int) -> int:
    return -(-max(length, 0) // PLAN_BLOCK)


def plan(backend: str, lengths: list[int], num_slots: int, deterministic: bool = False) -> tuple[torch.Tensor, ...]:
    module, device = MADE_BY[backend]
    items, splits = module.plan(torch.tensor(lengths, dtype=torch.int32, device=device), num_slots, deterministic)
    assert items.dtype == splits.dtype == torch.int32
    assert items.shape == (num_slots + len(lengths), 4)
    assert splits.shape == (len(lengths), 2)
    return items.cpu(), splits.cpu()


def slots_of(items: torch.Tensor, num_slots: int) -> list[list[tuple[int, int, int]]]:
    """(request, begin, end) of each slot's items, in order; every row is unused or in exactly one slot."""
    rows = items.tolist()
    seen, slots = set(), []
    for slot in range(num_slots):
        row, taken = slot, []
        while row >= 0 and rows[row] != UNUSED:
            assert row not in seen
            seen.add(row)
            request, begin, end, following = rows[row]
            # After the first item of a slot, only requests that begin there, each in its own row.
            assert row == slot or (row == num_slots + request and begin == 0)
            taken.append((request, begin, end))
            row = following
        slots.append(taken)
    assert all(rows[row] == UNUSED for row in range(len(rows)) if row not in seen)
    return slots


def assert_layout(items: torch.Tensor, splits: torch.Tensor, batch: int) -> list[list[tuple[int, int, int]]]:
    """The rules that kernels rely on, whatever the lengths. Returns what each slot does."""
    num_slots = items.shape[0] - batch
    slots = slots_of(items, num_slots)
    parts: list[list[tuple[int, int, int, bool]]] = [[] for _ in range(batch)]
    for slot, taken in enumerate(slots):
        for index, (request, begin, end) in enumerate(taken):
            parts[request].append((slot, begin, end, index == 0))
            # A request that goes on elsewhere ends the slot: one partial result of a part 0 per slot is enough.
            assert end == PLAN_WHOLE or index == len(taken) - 1
    for request, (first_slot, num_parts) in enumerate(splits.tolist()):
        assert [part[0] for part in parts[request]] == list(range(first_slot, first_slot + num_parts))
        assert all(is_first for *_, is_first in parts[request][1:])
        edges = [0] + [end for _, _, end, _ in parts[request]]
        assert [begin for _, begin, _, _ in parts[request]] == edges[:-1]
        assert edges == sorted(set(edges))
        assert edges[-1] == PLAN_WHOLE
    return slots


def suffices(units: list[int], num_slots: int, capacity: int) -> bool:
    """The rule unit by unit: a request is laid down whole where it fits, else piece by piece, each as long as fits."""
    room = [capacity] * num_slots
    slot = 0
    for left in units:
        piece_cost = ITEM_COST
        while left + piece_cost > room[slot]:
            take = 0
            while left and take + 1 + ITEM_COST + CUT_COST <= room[slot]:
                take, left = take + 1, left - 1
            piece_cost += CUT_COST if take and piece_cost == ITEM_COST else 0
            slot += 1
            if slot == num_slots:
                return False
        room[slot] -= left + piece_cost
    return True


@pytest.mark.parametrize("lengths", CASES)
@pytest.mark.parametrize("num_slots", NUM_SLOTS)
def test_slots(lengths: list[int], num_slots: int) -> None:
    items, splits = plan("torch", lengths, num_slots)
    slots = assert_layout(items, splits, len(lengths))
    # In the order of the requests: a slot's first item never precedes the last item of an earlier slot.
    order = [request for taken in slots for request, _, _ in taken]
    assert order == sorted(order)

    units = [units_of(length) for length in lengths]
    fullest = 0
    for taken in slots:
        cost = 0
        for request, begin, end in taken:
            first, last = (units[request] * cut >> 30 for cut in (begin, end))
            is_cut = end - begin < PLAN_WHOLE
            assert last - first >= MIN_TAKE or not is_cut
            cost += last - first + ITEM_COST + CUT_COST * is_cut
        fullest = max(fullest, cost)
    even_share = -(-(sum(units) + ITEM_COST * len(units)) // num_slots)
    lowest = max(even_share, ITEM_COST + CUT_COST + MIN_TAKE)
    assert fullest <= lowest + ITEM_COST + 2 * CUT_COST
    if sum(units) < 10_000:  # unit by unit
        assert not any(suffices(units, num_slots, capacity) for capacity in range(lowest, fullest))


# Units per request, requests, slots -> slots in use, units of the fullest slot, parts in all.
EVEN = {
    "as many slots as units": (64, 1, 132, 64, 1, 64),
    "one request on all slots": (1024, 1, 66, 64, 16, 64),
    "eight slots each": (64, 16, 132, 128, 8, 128),
    "two whole requests per slot": (16, 128, 66, 64, 32, 128),
    "a whole request per slot": (64, 132, 132, 132, 64, 132),
    "four more requests than slots": (64, 70, 66, 66, 71, 131),
    "cutting 256 requests would cost more than two per slot": (64, 256, 132, 128, 128, 256),
}


@pytest.mark.parametrize(("units", "batch", "num_slots", "used", "most", "num_parts"), EVEN.values(), ids=list(EVEN))
def test_even_requests(units: int, batch: int, num_slots: int, used: int, most: int, num_parts: int) -> None:
    items, splits = plan("torch", [units * PLAN_BLOCK] * batch, num_slots)
    loads = [
        sum((units * end >> 30) - (units * begin >> 30) for _, begin, end in t) for t in slots_of(items, num_slots)
    ]
    assert (sum(load > 0 for load in loads), max(loads), int(splits[:, 1].sum())) == (used, most, num_parts)


@pytest.mark.parametrize("backend", ON_GPUS)
@pytest.mark.parametrize("lengths", CASES)
def test_backends_agree(lengths: list[int], backend: str) -> None:
    for num_slots in NUM_SLOTS:
        for ours, definition in zip(plan(backend, lengths, num_slots), plan("torch", lengths, num_slots), strict=True):
            assert torch.equal(ours, definition)


@pytest.mark.parametrize("backend", ON_GPUS)
@pytest.mark.parametrize("batch", [700] if DEVICE == "cpu" else [700, 2500, 9000, 100_000])
def test_backends_agree_on_large_batches(batch: int, backend: str) -> None:
    lengths = random_lengths(batch)
    for deterministic in (False, True):
        num_slots = fixed_slots(batch) if deterministic else 132
        ours = plan(backend, lengths, num_slots, deterministic)
        for tensor, definition in zip(ours, plan("torch", lengths, num_slots, deterministic), strict=True):
            assert torch.equal(tensor, definition)


@pytest.mark.parametrize("backend", ["torch", *ON_GPUS])
def test_strided_lengths(backend: str) -> None:
    module, device = MADE_BY[backend]
    lengths = torch.tensor([[7000, 1], [3, 9000], [640, 5000]], dtype=torch.int32, device=device)[:, 0]
    for deterministic in (False, True):
        strided = module.plan(lengths, 30, deterministic)
        for ours, dense in zip(strided, module.plan(lengths.contiguous(), 30, deterministic), strict=True):
            assert torch.equal(ours, dense)


def test_cut_points_give_the_units_back() -> None:
    """ceil(b * 2^30 / d) stands for b of d units: d times it, shifted, is b, up to the 2^25 units of 2^31 tokens."""
    draw = random.Random(0)
    pairs = [(b, d) for d in range(1, 130) for b in range(d + 1)]
    pairs += [(b, 2**25 - k) for k in range(3) for b in (0, 1, 2, 2**24 + 1, 2**25 - 4, 2**25 - k)]
    pairs += [(draw.randrange(d + 1), d) for d in (draw.randrange(1, 2**25 + 1) for _ in range(2000))]
    for units_before, units in pairs:
        cut = -(-units_before * PLAN_WHOLE // units)
        assert cut < 2**31
        assert units * cut >> 30 == units_before


@pytest.mark.parametrize("deterministic", [False, True], ids=["balanced", "deterministic"])
@pytest.mark.parametrize("planned_for", [1, 64, 70 * 64 + 5, 50_000, 2**31 - 64])
def test_a_plan_for_other_lengths_loses_no_token(planned_for: int, deterministic: bool) -> None:
    """The rule by which kernels turn cut points into tokens: contiguous, disjoint, complete, whole units."""
    lengths = [planned_for, 900, planned_for]
    num_slots = fixed_slots(3) if deterministic else 24
    items, splits = plan("torch", lengths, num_slots, deterministic)
    slots = assert_layout(items, splits, 3)
    for live in (0, 1, 63, 64, 65, 1000, 4096, 2**31 - 64):
        units = units_of(live)
        covered: dict[int, list[tuple[int, int]]] = {0: [], 1: [], 2: []}
        for request, begin, end in (item for taken in slots for item in taken):
            first, last = (min((units * cut >> 30) * PLAN_BLOCK, live) for cut in (begin, end))
            assert first % PLAN_BLOCK == 0 or first == live
            covered[request].append((first, last))
        for ranges in covered.values():
            assert [first for first, _ in ranges] == [0] + [last for _, last in ranges[:-1]]
            assert ranges[-1][1] == live


# --- deterministic ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["torch", *ON_GPUS])
@pytest.mark.parametrize("lengths", CASES)
def test_deterministic(lengths: list[int], backend: str) -> None:
    batch = len(lengths)
    for num_slots in (fixed_slots(batch), fixed_slots(batch) + 5):
        items, splits = plan(backend, lengths, num_slots, deterministic=True)
        slots = assert_layout(items, splits, batch)
        for request, length in enumerate(lengths):
            units = units_of(length)
            num_parts = min(MAX_PARTS, max(1, -(-units // FIXED_UNITS)))
            assert splits[request].tolist() == [request * MAX_PARTS, num_parts]
            for part in range(num_parts):
                (item,) = slots[request * MAX_PARTS + part]
                assert [units * cut >> 30 for cut in item[1:]] == [units * p // num_parts for p in (part, part + 1)]


def parts_beside(others: list[int], deterministic: bool) -> list[tuple[int, int]]:
    """Cut points of a request of 9000 tokens that comes after others."""
    num_slots = fixed_slots(len(others) + 1) if deterministic else 24
    items, _ = plan("torch", [*others, 9000], num_slots, deterministic)
    return [row[1:] for taken in slots_of(items, num_slots) for row in taken if row[0] == len(others)]


def test_deterministic_parts_do_not_depend_on_the_batch() -> None:
    batches = ([], [1, 70_000], [9000] * 20)
    alone, *beside = (parts_beside(others, True) for others in batches)
    assert beside == [alone, alone]
    alone, *beside = (parts_beside(others, False) for others in batches)
    assert alone not in beside  # the test can tell


# --- sizes, devices, errors -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("deterministic", [False, True], ids=["balanced", "deterministic"])
def test_size_depends_on_shapes_alone(backend: str, deterministic: bool) -> None:
    """Two batches of the same shape get plans of the same size, as a captured graph needs."""
    dtype = TRITON_DTYPES[0]
    short, long = make(Case("short", (1, 2, 3)), dtype), make(Case("long", (1000, 2, 500)), dtype)
    sizes = set()
    for problem in (short, long):
        q, pool, table, lengths = problem.arguments()
        made = flash_mla.plan_splits(
            q, pool, table[:, :1], lengths, kv_lora_rank=128, deterministic=deterministic, backend=backend
        )
        assert (made.batch, made.seqlen_q, made.num_heads, made.h_kv) == (3, 1, 4, 1)
        assert made.deterministic is deterministic
        assert made.items.shape == (made.num_slots + 3, 4)
        sizes.add(made.num_slots)
        if deterministic:
            assert made.num_slots == fixed_slots(3)
    assert len(sizes) == 1


@pytest.mark.parametrize("batch", [0, 1, 3, 7, 20])
@pytest.mark.parametrize("num_slots", [1, 7, 8])
def test_whole_requests_where_the_definition_may_not_read_lengths(batch: int, num_slots: int) -> None:
    items, splits = torch_backend.plan_whole(torch.zeros(batch, dtype=torch.int32, device=DEVICE), num_slots)
    slots = assert_layout(items.cpu(), splits.cpu(), batch)
    assert splits[:, 1].tolist() == [1] * batch
    loads = [len(taken) for taken in slots]
    assert max(loads) - min(loads) <= 1


@pytest.mark.parametrize("module", [torch_backend, triton_backend, cuda_backend], ids=["torch", "triton", "cuda"])
def test_too_few_slots(module: object) -> None:
    lengths = torch.zeros(3, dtype=torch.int32, device=DEVICE)
    with pytest.raises(ValueError, match=r"flash_mla\.plan: num_slots must be >= 1, got 0"):
        module.plan(lengths, 0)
    message = rf"num_slots must be >= {3 * MAX_PARTS} \(batch=3, deterministic\), got {3 * MAX_PARTS - 1}"
    with pytest.raises(ValueError, match=message):
        module.plan(lengths, 3 * MAX_PARTS - 1, True)


def test_opcheck() -> None:
    lengths = torch.tensor([7000, 0, 64], dtype=torch.int32, device=DEVICE)
    torch.library.opcheck(torch.ops.flash_mla.plan.default, (lengths, 8, False))
    torch.library.opcheck(torch.ops.flash_mla.plan.default, (lengths, fixed_slots(3), True))


def test_a_capacity_always_suffices() -> None:
    """What every backend takes for granted of the constants; see contract.PLAN_CANDIDATES."""
    assert MIN_TAKE <= CUT_COST + 1
    assert ITEM_COST + 2 * CUT_COST < PLAN_CANDIDATES


# --- the compiled kernel, from the host -------------------------------------------------------------------------------

SOURCE = Path(__file__).parents[1] / "kernels" / "plan.cu"


def test_cuda_source_has_the_constants_of_the_contract() -> None:
    found = dict(re.findall(r"^constexpr int (\w+) = ([^;]+);", SOURCE.read_text(), re.MULTILINE))
    shared = [name for name in found if hasattr(contract, name)]
    assert sorted(shared) == [
        "FIXED_UNITS", "MAX_PARTS", "MIN_TAKE", "PLAN_BLOCK", "PLAN_CANDIDATES", "PLAN_WHOLE"
    ]  # fmt: skip
    for name in shared:
        assert eval(found[name]) == getattr(contract, name), name
    assert int(found["THREADS"]) == THREADS


@pytest.mark.parametrize("deterministic", [False, True], ids=["balanced", "deterministic"])
def test_cuda_launch(deterministic: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    launches = []

    def launch(*arguments: object) -> None:
        launches.append((*arguments[:-1], PARAMS.unpack(arguments[-1])))

    monkeypatch.setattr(driver, "function", lambda device_index, cubin, name: (device_index, cubin, name))
    monkeypatch.setattr(driver, "raw_stream", lambda device_index: 77)
    monkeypatch.setattr(driver, "launch", launch)
    lengths = torch.zeros((300, 2), dtype=torch.int32)[:, 0]
    num_slots = fixed_slots(300) if deterministic else 132
    items, splits = cuda_backend.plan(lengths, num_slots, deterministic)
    assert items.shape == (num_slots + 300, 4)
    name, blocks = ("plan_fixed", 3) if deterministic else ("plan_splits", 1)  # 2700 rows, 1024 threads
    ((device_index, function, grid, block, shared_memory, stream, params),) = launches
    assert function == (device_index, "plan", name)
    assert (grid, block, shared_memory, stream) == ((blocks, 1, 1), 1024, 0, 77)
    addresses = (lengths.data_ptr(), items.data_ptr(), splits.data_ptr())
    assert params == (*addresses, 2, 300, num_slots, ITEM_COST, CUT_COST)


HOST_MAIN = """
extern "C" void run(const PlanParams* params, int blocks, int is_fixed) {
  launch_on_host(is_fixed ? plan_fixed : plan_splits, *params, blocks, THREADS);
}
"""


@pytest.fixture(scope="module")
def cuda_source_on_host(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """kernels/plan.cu as a host library, with blocks of 96 threads and 50 requests in shared memory at a time."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++")
    source = SOURCE.read_text()
    for name, small in (("THREADS", 96), ("CHUNK", 50)):
        source, found = re.subn(rf"constexpr int {name} = \d+;", f"constexpr int {name} = {small};", source)
        assert found == 1
    folder = tmp_path_factory.mktemp("plan")
    (folder / "plan.cpp").write_text(f'#include "block_on_host.h"\n{source}{HOST_MAIN}')
    command = [compiler, "-std=c++17", "-O1", "-pthread", "-shared", "-fPIC", f"-I{Path(__file__).parent}"]
    subprocess.run([*command, "-o", str(folder / "plan.so"), str(folder / "plan.cpp")], check=True)
    return ctypes.CDLL(str(folder / "plan.so"))


@pytest.mark.parametrize("lengths", CASES)
def test_cuda_source_on_the_host(
    lengths: list[int], cuda_source_on_host: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The arithmetic of the compiled kernel, launched as on a GPU: the definition's integers."""

    def launch(device_index: int, name: str, grid: tuple[int, int, int], *arguments: object) -> None:
        blocks = -(-grid[0] * THREADS // 96) if name == "plan_fixed" else grid[0]
        cuda_source_on_host.run(arguments[-1], blocks, name == "plan_fixed")

    monkeypatch.setattr(driver, "function", lambda device_index, cubin, name: name)
    monkeypatch.setattr(driver, "raw_stream", lambda device_index: 0)
    monkeypatch.setattr(driver, "launch", launch)
    on_host = torch.tensor(lengths, dtype=torch.int32)
    strided = torch.stack((on_host, on_host + 1), dim=1)[:, 0]
    for num_slots, deterministic in [(slots, False) for slots in NUM_SLOTS] + [(fixed_slots(len(lengths)) + 3, True)]:
        ours = cuda_backend.plan(strided, num_slots, deterministic)
        for tensor, definition in zip(ours, plan("torch", lengths, num_slots, deterministic), strict=True):
            assert torch.equal(tensor, definition)
