"""Memory that grows in place, against a driver whose device memory is the host's: calls, bytes, errors, accounts."""

from __future__ import annotations

import copy
import gc
import logging
import pickle
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from fake_cuda import INVALID_VALUE, PRIMARY, FakeDriver
from fake_memory import cpu_tensor
from test_cache import config, everything, store

from flash_mla import PagedLatentCache
from flash_mla.backends.cuda import driver, memory
from flash_mla.cache import pool

if sys.platform != "linux":
    pytest.skip("needs Linux: the fake's device memory is memfd_create and mmap", allow_module_level=True)

Install = Callable[..., FakeDriver]
MIB, GIB = 2**20, 2**30
GRANULE = 2 * MIB
SMALL = 2**16  # a granule of 85 pages of 16 tokens of the tests' caches
CPU = torch.device("cpu")
STREAM = 0x51
VIRTUAL = ("cuMemAddressReserve", "cuMemAddressFree", "cuMemCreate", "cuMemRelease", "cuMemMap", "cuMemSetAccess")
VIRTUAL += ("cuMemUnmap", "cuStreamSynchronize")
KEPT_BYTES = memory.KEPT_BYTES


@pytest.fixture
def install(fake_driver: Install, monkeypatch: pytest.MonkeyPatch):
    """A fake driver whose memory torch sees as CPU tensors; nothing is kept, and nothing of it may be left over."""
    fakes = []
    found_out = (memory.granule, memory.refusal, pool._grows_in_place)

    def forget() -> None:
        for cached in found_out:
            cached.cache_clear()
        memory._pending.clear()
        memory._kept.clear()
        memory._held.clear()
        memory._peak.clear()

    def make(**settings: object) -> FakeDriver:
        fakes.append(fake_driver(**settings))
        return fakes[-1]

    forget()
    monkeypatch.setattr(memory, "_as_tensor", cpu_tensor)
    monkeypatch.setattr(memory, "KEPT_BYTES", 0)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: STREAM, raising=False)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    yield make
    gc.collect()
    for fake in fakes:
        fake.capturing.clear()
        memory.release_kept()
        assert (fake.reserved, fake.physical, fake.mapped) == ({}, {}, {}), "everything is given back"
        assert fake.contexts == []
    forget()


@pytest.fixture
def in_place(install: Install, monkeypatch: pytest.MonkeyPatch) -> FakeDriver:
    """Pools of CPU tensors grow in place."""
    monkeypatch.setattr(pool, "_grows_in_place", lambda device: True)
    return install(granule=SMALL)


@pytest.fixture
def keeping(install: Install, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Dropped memory is kept, as outside of tests."""
    monkeypatch.setattr(memory, "KEPT_BYTES", KEPT_BYTES)
    return install


def dropped(*sizes: int) -> list[int]:
    """Addresses of memory of so many bytes, all made before the first is dropped, then dropped in this order."""
    made = [memory.GrowingMemory(CPU, size) for size in sizes]
    addresses = [one.address for one in made]
    while made:
        made.pop(0)
    return addresses


def on_stream(monkeypatch: pytest.MonkeyPatch, stream: int) -> None:
    monkeypatch.setattr(driver, "raw_stream", lambda index: stream)


def virtual(fake: FakeDriver) -> list[str]:
    return [name for name, _ in fake.calls if name in VIRTUAL]


# --- growing ----------------------------------------------------------------------------------------------------------


def test_calls_in_order(install: Install) -> None:
    fake = install()
    made = memory.GrowingMemory(CPU, 3 * MIB)
    assert virtual(fake) == ["cuMemAddressReserve", "cuMemCreate", "cuMemMap", "cuMemSetAccess"]
    assert [size for _, size, _, _ in fake.called("cuMemCreate")] == [4 * MIB], "whole granules"
    assert fake.called("cuMemMap")[0][:3] == (made.address, 4 * MIB, 0)
    fake.calls.clear()
    del made
    assert virtual(fake) == ["cuStreamSynchronize", "cuMemUnmap", "cuMemRelease", "cuMemAddressFree"]
    assert fake.called("cuStreamSynchronize") == [(STREAM,)]


def test_it_grows_at_the_same_address_with_what_is_there(install: Install) -> None:
    fake = install()
    made = memory.GrowingMemory(CPU, 1)
    small = made.tensor((100, 3), torch.bfloat16)
    small.copy_(torch.arange(300).view(100, 3))
    fake.calls.clear()
    made.grow(GRANULE)
    assert virtual(fake) == [], "what is mapped is enough"
    made.grow(GRANULE + 1)
    assert virtual(fake) == ["cuMemCreate", "cuMemMap", "cuMemSetAccess"]
    assert fake.called("cuMemMap")[0][:2] == (made.address + GRANULE, GRANULE)
    grown = made.tensor((GRANULE,), torch.bfloat16)
    assert grown.data_ptr() == small.data_ptr() == made.address
    assert torch.equal(grown[:300], torch.arange(300).bfloat16())
    assert grown[300:].count_nonzero() == 0, "new memory is zero: it was NaN"
    small.fill_(7)
    assert grown[299] == 7
    assert grown.untyped_storage().nbytes() == 2 * GRANULE


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_shapes_and_dtypes(dtype: torch.dtype, install: Install) -> None:
    install()
    made = memory.GrowingMemory(CPU, GRANULE)
    tensor = made.tensor((5, 16, 1, 12), dtype)
    assert (tensor.shape, tensor.dtype, tensor.is_contiguous()) == ((5, 16, 1, 12), dtype, True)
    with pytest.raises(ValueError, match=rf"must fit into {GRANULE} bytes, got {GRANULE + dtype.itemsize}"):
        made.tensor((GRANULE // dtype.itemsize + 1,), dtype)


@pytest.mark.parametrize(
    ("first", "total", "reserved"),
    [
        (1, 8 * GIB, GIB),  # the least
        (100 * MIB, 8 * GIB, 1600 * MIB),  # 16 times
        (100 * MIB, GIB + 1, GIB + GRANULE),  # the device's memory, whole granules
        (100 * MIB, 64 * MIB, 100 * MIB),  # never less than is needed
    ],
)
def test_reserved_addresses(first: int, total: int, reserved: int, install: Install) -> None:
    fake = install(total_memory=total)
    made = memory.GrowingMemory(CPU, first)
    assert fake.reserved == {made.address: reserved}


def test_beyond_its_addresses_the_same_memory_is_mapped_elsewhere(install: Install, monkeypatch) -> None:
    fake = install()
    monkeypatch.setattr(memory, "MIN_RESERVED", GRANULE)
    monkeypatch.setattr(memory, "RESERVED_FACTOR", 1)
    made = memory.GrowingMemory(CPU, 2 * GRANULE)
    before, address = made.tensor((2 * GRANULE,), torch.uint8), made.address
    before.fill_(3)
    monkeypatch.setattr(memory, "RESERVED_FACTOR", 2)
    fake.calls.clear()
    made.grow(3 * GRANULE)
    assert [size for _, size, _, _ in fake.called("cuMemCreate")] == [GRANULE], "no copy: only what is missing"
    after = made.tensor((3 * GRANULE,), torch.uint8)
    assert after.data_ptr() == made.address != address
    assert torch.equal(after[: 2 * GRANULE], before)
    before[0] = 9  # the same bytes under two addresses
    assert after[0] == 9
    assert len(fake.reserved) == 2
    assert memory.held_bytes(0) == 3 * GRANULE, "counted once"
    fake.calls.clear()
    del before
    assert virtual(fake) == ["cuStreamSynchronize", "cuMemUnmap", "cuMemAddressFree"], "not released: mapped elsewhere"
    assert after[1] == 3
    assert len(fake.reserved) == 1
    del made, after
    assert memory.held_bytes(0) == 0


def test_a_tensor_keeps_the_memory(install: Install) -> None:
    fake = install()
    made = memory.GrowingMemory(CPU, 1)
    tensor = made.tensor((8,), torch.float32)[2:]
    del made
    assert len(fake.mapped) == 1
    assert tensor.count_nonzero() == 0
    del tensor
    assert not fake.mapped


def test_tensors_are_no_inference_tensors(install: Install) -> None:
    install()
    with torch.inference_mode():
        made = memory.GrowingMemory(CPU, 1)
        made.grow(2 * GRANULE)
        tensor = made.tensor((8,), torch.float32)
    assert not tensor.is_inference()
    tensor.add_(1)


def test_calls_run_in_the_context_of_the_device_and_beside_a_capture(install: Install) -> None:
    fake = install()
    seen = set()
    for name in VIRTUAL:
        action = getattr(fake, f"_{name}")

        def look(*arguments: int, action: Callable[..., int] = action) -> int:
            seen.add((fake.contexts[-1], fake.thread.capture_mode))
            return action(*arguments)

        setattr(fake, f"_{name}", look)
    fake.__post_init__()
    fake.thread.capture_mode = 0  # CU_STREAM_CAPTURE_MODE_GLOBAL
    made = memory.GrowingMemory(torch.device("cpu", 0), 1)
    made.grow(2 * GRANULE)
    del made
    assert seen == {(PRIMARY, 2)}  # CU_STREAM_CAPTURE_MODE_RELAXED
    assert fake.thread.capture_mode == 0


# --- out of memory, and other refusals --------------------------------------------------------------------------------


def test_out_of_memory_leaves_everything_as_it_was(install: Install, monkeypatch) -> None:
    fake = install(free_memory=3 * GRANULE, total_memory=64 * MIB)
    emptied = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(1))
    made = memory.GrowingMemory(CPU, 2 * GRANULE)
    tensor = made.tensor((4,), torch.float32)
    before = dict(fake.mapped), dict(fake.physical), dict(fake.reserved)
    with pytest.raises(torch.OutOfMemoryError) as error:
        made.grow(4 * GRANULE)
    assert str(error.value) == (
        "CUDA out of memory. flash_mla: memory of 4 MiB wanted 4 MiB more on device 0; 4 MiB are held in growing "
        "memory, the device has 64 MiB"
    )
    assert emptied == [1]
    assert (fake.mapped, fake.physical, fake.reserved) == before
    assert (made.num_bytes, memory.held_bytes(0)) == (2 * GRANULE, 2 * GRANULE)
    made.grow(3 * GRANULE)
    assert made.tensor((4,), torch.float32).data_ptr() == tensor.data_ptr()
    with pytest.raises(torch.OutOfMemoryError):
        memory.GrowingMemory(CPU, GRANULE)


def test_torch_gives_back_its_cache_first(install: Install, monkeypatch) -> None:
    fake = install(free_memory=0)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: setattr(fake, "free_memory", GRANULE))
    assert memory.GrowingMemory(CPU, 1).num_bytes == GRANULE
    fake.free_memory = 0
    fake.capturing.add(STREAM)  # torch may not let go of its cache then
    with pytest.raises(torch.OutOfMemoryError):
        memory.GrowingMemory(CPU, 1)


@pytest.mark.parametrize(
    ("name", "beyond"),
    [
        ("cuMemMap", False),
        ("cuMemSetAccess", False),
        ("cuMemMap", True),
        ("cuMemSetAccess", True),
        ("cuMemAddressReserve", True),
    ],
)
def test_a_refused_call_leaves_nothing_half_mapped(name: str, beyond: bool, install: Install, monkeypatch) -> None:
    fake = install()
    if beyond:
        monkeypatch.setattr(memory, "MIN_RESERVED", GRANULE)
        monkeypatch.setattr(memory, "RESERVED_FACTOR", 1)
    made = memory.GrowingMemory(CPU, GRANULE)
    before = dict(fake.mapped), dict(fake.physical), dict(fake.reserved), memory.held_bytes(0)
    fake.failing[name] = INVALID_VALUE
    with pytest.raises(driver.DriverError, match=f"{name} failed: CUDA_ERROR_INVALID_VALUE"):
        made.grow(2 * GRANULE)
    assert (fake.mapped, fake.physical, fake.reserved, memory.held_bytes(0)) == before
    fake.failing.clear()
    made.grow(2 * GRANULE)
    assert made.tensor((2 * GRANULE,), torch.uint8).count_nonzero() == 0


# --- giving back ------------------------------------------------------------------------------------------------------


def test_every_stream_that_it_grew_on_and_the_present_one_are_waited_for(install: Install, monkeypatch) -> None:
    fake = install()
    made = memory.GrowingMemory(CPU, 1)
    monkeypatch.setattr(driver, "raw_stream", lambda index: 0x52)
    made.grow(2 * GRANULE)
    monkeypatch.setattr(driver, "raw_stream", lambda index: 0)
    del made
    waited = [index for index, (name, _) in enumerate(fake.calls) if name == "cuStreamSynchronize"]
    assert {stream for (stream,) in fake.called("cuStreamSynchronize")} == {STREAM, 0x52, None}
    assert max(waited) < [name for name, _ in fake.calls].index("cuMemUnmap")


@pytest.mark.parametrize("chance", ["grow", "drop", "make"])
def test_during_a_capture_it_waits_for_the_next_chance(chance: str, install: Install) -> None:
    fake = install()
    made, other = memory.GrowingMemory(CPU, 1), memory.GrowingMemory(CPU, 1)
    address = made.address
    fake.capturing.add(STREAM)
    del made
    assert address in fake.mapped
    assert not fake.called("cuStreamSynchronize")
    assert memory.held_bytes(0) == 2 * GRANULE
    fake.capturing.clear()
    if chance == "grow":
        other.grow(1)
    elif chance == "drop":
        del other
    else:
        memory.GrowingMemory(CPU, 1)
    assert address not in fake.reserved


def test_a_capture_that_forbids_to_ask_is_a_capture(install: Install) -> None:
    fake = install()
    made = memory.GrowingMemory(CPU, 1)
    fake.failing["cuStreamIsCapturing"] = 906  # CUDA_ERROR_STREAM_CAPTURE_IMPLICIT
    del made
    assert len(fake.mapped) == 1
    fake.failing.clear()
    memory.release_pending()
    assert not fake.mapped


def test_a_finalizer_logs_and_never_raises(install: Install, caplog, capsys) -> None:
    fake = install()
    made = memory.GrowingMemory(CPU, 1)
    fake.failing["cuStreamSynchronize"] = 700  # CUDA_ERROR_ILLEGAL_ADDRESS of an earlier kernel
    with caplog.at_level(logging.WARNING):
        del made
    assert "2097152 bytes are not given back: cuStreamSynchronize failed" in caplog.text
    assert capsys.readouterr().err == ""
    assert len(fake.mapped) == 1, "kernels may still use it"
    for mapping in (fake.mapped, fake.physical, fake.reserved):
        mapping.clear()


def test_a_forked_child_leaves_its_parents_memory_alone(install: Install, monkeypatch) -> None:
    fake = install()
    made, pid = memory.GrowingMemory(CPU, 1), memory.os.getpid()
    fake.calls.clear()
    monkeypatch.setattr(memory.os, "getpid", lambda: pid + 1)
    del made
    assert fake.calls == []
    for mapping in (fake.mapped, fake.physical, fake.reserved):
        mapping.clear()


def test_nothing_is_called_at_shutdown() -> None:
    code = (
        "from flash_mla.backends.cuda import driver, memory\n"
        "class Mapping: pid = memory.os.getpid()\n"
        "memory._drop = lambda mapping: print('called')\n"
        "kept, dropped = memory._Range(Mapping()), memory._Range(Mapping())\n"
        "del dropped\n"
    )
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert (out.stdout, out.stderr) == ("called\n", "")


# --- keeping ----------------------------------------------------------------------------------------------------------


def test_small_memory_is_used_again_without_a_call(keeping: Install) -> None:
    fake = keeping()
    made = memory.GrowingMemory(CPU, 1)
    made.grow(2 * GRANULE)
    address = made.address
    made.tensor((2 * GRANULE,), torch.uint8).fill_(0xFF)
    fake.calls.clear()
    del made
    assert (memory.held_bytes(0), memory.kept_bytes(0)) == (2 * GRANULE, 2 * GRANULE)
    again = memory.GrowingMemory(CPU, 3)
    assert virtual(fake) == []
    assert (again.address, again.num_bytes) == (address, 2 * GRANULE)
    assert (memory.held_bytes(0), memory.kept_bytes(0)) == (2 * GRANULE, 0)
    again.grow(GRANULE + 1)
    assert virtual(fake) == [], "what is mapped is enough"
    assert again.tensor((2 * GRANULE,), torch.uint8).count_nonzero() == 0, "the last owner's bytes"
    again.grow(3 * GRANULE)
    assert virtual(fake) == ["cuMemCreate", "cuMemMap", "cuMemSetAccess"]
    assert again.address == address
    assert len({memory.GrowingMemory(CPU, 1).address, again.address}) == 2, "given to one at a time"


def test_a_tensor_is_enough_to_keep_memory_from_being_used_again(keeping: Install) -> None:
    keeping()
    made = memory.GrowingMemory(CPU, 1)
    tensor = made.tensor((8,), torch.float32)[2:].fill_(7)
    del made
    assert memory.kept_bytes(0) == 0
    other = memory.GrowingMemory(CPU, 1)
    other.tensor((8,), torch.float32).fill_(3)
    assert tensor.tolist() == [7.0] * 6
    del tensor
    assert memory.kept_bytes(0) == GRANULE


def test_what_is_kept_has_a_limit(keeping: Install, monkeypatch) -> None:
    assert KEPT_BYTES == 256 * MIB
    fake = keeping()
    monkeypatch.setattr(memory, "KEPT_BYTES", 5 * GRANULE)
    dropped(2 * GRANULE, 3 * GRANULE, GRANULE)
    assert (memory.kept_bytes(0), memory.held_bytes(0)) == (5 * GRANULE, 5 * GRANULE)
    assert sum(size for size, _ in fake.mapped.values()) == 5 * GRANULE, "the third is given back at once"
    assert len(fake.called("cuStreamSynchronize")) == 1
    memory.GrowingMemory(torch.device("cpu", 1), 1)
    assert memory.kept_bytes(1) == GRANULE, "a limit per device"


@pytest.mark.parametrize(
    ("need", "found"),
    [
        (1, 0),  # the smallest of three that fit
        (GRANULE + 1, 1),
        (4 * GRANULE, 2),
        (4 * GRANULE + 1, None),  # none is large enough
    ],
)
def test_the_smallest_that_is_large_enough_is_used(need: int, found: int | None, keeping: Install) -> None:
    keeping()
    large, middle, small = dropped(4 * GRANULE, 2 * GRANULE, GRANULE)
    address = memory.GrowingMemory(CPU, need).address
    assert address not in (large, middle, small) if found is None else address == (small, middle, large)[found]


def test_a_small_cache_does_not_hold_large_memory(keeping: Install) -> None:
    fake = keeping()
    assert memory.SPARE_BYTES == 16 * MIB
    (large,) = dropped(18 * MIB)
    assert memory.GrowingMemory(CPU, 2 * MIB - 1).address != large, "a byte too far from what is wanted"
    memory.release_kept()
    (large,) = dropped(18 * MIB)
    fake.calls.clear()
    assert memory.GrowingMemory(CPU, 2 * MIB).address == large
    assert virtual(fake) == []


def test_kept_addresses_leave_the_room_to_grow_of_fresh_ones(keeping: Install) -> None:
    fake = keeping()
    made = memory.GrowingMemory(CPU, 60 * MIB)
    made.grow(66 * MIB)
    address = made.address
    assert fake.reserved[address] == GIB
    del made
    fresh = memory.GrowingMemory(CPU, 65 * MIB)  # reserves 1,040 MiB
    assert fresh.address != address
    assert memory.GrowingMemory(CPU, 64 * MIB).address == address


def test_other_streams_are_waited_for_before_it_is_used_again(keeping: Install, monkeypatch) -> None:
    fake = keeping()
    made = memory.GrowingMemory(CPU, 1)
    on_stream(monkeypatch, 0x52)
    del made  # most likely used there last
    on_stream(monkeypatch, 0x53)
    assert not fake.called("cuStreamSynchronize")
    made = memory.GrowingMemory(CPU, 1)
    assert sorted(fake.called("cuStreamSynchronize")) == [(STREAM,), (0x52,)]
    fake.calls.clear()
    del made
    made = memory.GrowingMemory(CPU, 1)
    assert virtual(fake) == [], "the others were waited for, and the order of a stream suffices"
    del made
    memory.release_kept()
    assert fake.called("cuStreamSynchronize") == [(0x53,)]


def test_memory_that_is_mapped_elsewhere_too_is_not_kept(keeping: Install, monkeypatch) -> None:
    fake = keeping()
    monkeypatch.setattr(memory, "MIN_RESERVED", GRANULE)
    monkeypatch.setattr(memory, "RESERVED_FACTOR", 1)
    made = memory.GrowingMemory(CPU, GRANULE)
    before = made.tensor((GRANULE,), torch.uint8).fill_(3)
    made.grow(2 * GRANULE)
    after = made.tensor((2 * GRANULE,), torch.uint8)
    del before
    assert memory.kept_bytes(0) == 0
    assert list(fake.reserved) == [made.address]
    other = memory.GrowingMemory(CPU, GRANULE)
    assert after[:GRANULE].unique().tolist() == [3]
    del made, after, other
    assert memory.kept_bytes(0) == 3 * GRANULE, "once no other range shows it"


def test_in_a_capture_nothing_is_kept(keeping: Install) -> None:
    fake = keeping()
    made = memory.GrowingMemory(CPU, 1)
    fake.capturing.add(STREAM)
    del made
    assert (memory.kept_bytes(0), memory.held_bytes(0)) == (0, GRANULE)
    fake.capturing.clear()
    memory.release_pending()
    assert memory.held_bytes(0) == 0


def test_in_a_capture_nothing_is_used_again(keeping: Install, monkeypatch) -> None:
    fake = keeping()
    (kept,) = dropped(1)
    fake.capturing.add(STREAM)
    assert memory.GrowingMemory(CPU, 1).address != kept
    on_stream(monkeypatch, 0x52)
    assert memory.GrowingMemory(CPU, 1).address != kept, "the stream that used it is being captured"
    fake.capturing = {0x52}
    assert memory.GrowingMemory(CPU, 1).address != kept, "a graph would keep the addresses"
    assert not fake.called("cuStreamSynchronize")
    fake.capturing.clear()
    assert kept in fake.mapped


def test_a_stream_that_fails_loses_its_memory_and_no_other(keeping: Install, caplog) -> None:
    fake = keeping()
    (kept,) = dropped(1)
    memory._kept[0][0].streams.add(0x66)
    fake.failing["cuStreamSynchronize"] = 700  # CUDA_ERROR_ILLEGAL_ADDRESS of an earlier kernel
    with caplog.at_level(logging.WARNING):
        made = memory.GrowingMemory(CPU, 1)
    assert made.address != kept
    assert "2097152 bytes are not given back: cuStreamSynchronize failed" in caplog.text
    assert memory.kept_bytes(0) == 0
    fake.failing.clear()
    del made  # which a logged error with its traceback would keep alive
    memory.release_kept()
    assert list(fake.reserved) == [kept], "kernels may still use it"
    for mapping in (fake.mapped, fake.physical, fake.reserved):
        mapping.clear()


def test_a_finalizer_that_keeps_never_raises(keeping: Install, caplog, capsys) -> None:
    fake = keeping()
    made = memory.GrowingMemory(CPU, 1)
    fake.failing["cuStreamIsCapturing"] = INVALID_VALUE
    with caplog.at_level(logging.WARNING):
        del made
    assert "2097152 bytes are not given back: cuStreamIsCapturing failed" in caplog.text
    assert capsys.readouterr().err == ""
    assert memory.kept_bytes(0) == 0
    for mapping in (fake.mapped, fake.physical, fake.reserved):
        mapping.clear()


def test_out_of_memory_kept_memory_is_given_back_first(keeping: Install, monkeypatch) -> None:
    fake = keeping(free_memory=4 * GRANULE)
    others = memory.GrowingMemory(torch.device("cpu", 1), 1).address
    kept_when_emptied = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: kept_when_emptied.append(memory.kept_bytes(0)))
    dropped(GRANULE, GRANULE)
    fake.calls.clear()
    made = memory.GrowingMemory(CPU, 3 * GRANULE)
    assert made.num_bytes == memory.held_bytes(0) == 3 * GRANULE
    names = virtual(fake)
    assert names.count("cuStreamSynchronize") == names.count("cuMemRelease") == 2
    assert names.index("cuStreamSynchronize") < names.index("cuMemUnmap")
    assert kept_when_emptied == [0]
    assert memory.kept_bytes(1) == GRANULE, "another device's would not help"
    with pytest.raises(torch.OutOfMemoryError):
        memory.GrowingMemory(CPU, 1)
    assert memory.kept_bytes(0) == 0
    assert set(fake.reserved) == {made.address, others}, "addresses alone are not worth keeping"


def test_out_of_memory_in_a_capture_waits_for_nothing(keeping: Install) -> None:
    fake = keeping(free_memory=GRANULE)
    dropped(GRANULE)
    fake.capturing.add(STREAM)
    with pytest.raises(torch.OutOfMemoryError):
        memory.GrowingMemory(CPU, GRANULE)
    assert not fake.called("cuStreamSynchronize")
    fake.capturing.clear()
    assert memory.GrowingMemory(CPU, GRANULE).num_bytes == GRANULE


def test_kept_memory_is_given_back_on_demand(keeping: Install) -> None:
    fake = keeping()
    other = torch.device("cpu", 1)
    memory.GrowingMemory(other, 1)
    dropped(1, 2 * GRANULE)
    fake.calls.clear()
    memory.release_kept(0)
    assert fake.called("cuStreamSynchronize") == [(STREAM,)] * 2
    assert [(memory.held_bytes(index), memory.kept_bytes(index)) for index in (0, 1)] == [(0, 0), (GRANULE, GRANULE)]
    dropped(1)
    memory.release_kept()
    assert (fake.mapped, memory.held_bytes(0), memory.held_bytes(1)) == ({}, 0, 0)


def test_a_forked_child_leaves_what_its_parent_kept_alone(keeping: Install, monkeypatch) -> None:
    fake = keeping()
    (kept,) = dropped(1)
    before = dict(fake.mapped)
    pid = memory.os.getpid()
    with monkeypatch.context() as patch:
        patch.setattr(memory.os, "getpid", lambda: pid + 1)
        assert memory.GrowingMemory(CPU, 1).address != kept
        fake.calls.clear()
        parents = memory._kept.copy()
        memory.release_kept()
        assert kept in fake.mapped
        assert (kept,) not in [arguments[:1] for arguments in fake.called("cuMemUnmap")]
    assert before.items() <= fake.mapped.items()
    memory._kept.update(parents)  # the parent's list is its own


def test_kept_memory_is_left_alone_at_shutdown() -> None:
    code = (
        "from flash_mla.backends.cuda import driver, memory\n"
        "class Mapping:\n"
        "    device_index, mapped_bytes, pid, streams = 0, 1, memory.os.getpid(), set()\n"
        "    def __getattr__(self, name): print(name)\n"
        "memory._kept[0].append(Mapping())\n"
        "driver.call = driver.allocating = lambda *arguments, **options: print('called')\n"
    )
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert (out.stdout, out.stderr) == ("", "")


# --- accounts, and whether it can -------------------------------------------------------------------------------------


def test_accounts(install: Install) -> None:
    install()
    first = memory.GrowingMemory(CPU, 3 * GRANULE)
    second = memory.GrowingMemory(CPU, 1)
    assert (memory.held_bytes(0), memory.peak_bytes(0)) == (4 * GRANULE, 4 * GRANULE)
    del first
    assert (memory.held_bytes(0), memory.peak_bytes(0)) == (GRANULE, 4 * GRANULE)
    memory.reset_peak()
    assert memory.peak_bytes(0) == GRANULE
    second.grow(2 * GRANULE)
    assert (memory.held_bytes(0), memory.peak_bytes(0), memory.held_bytes(1)) == (2 * GRANULE, 2 * GRANULE, 0)


def test_kept_memory_counts_from_when_it_is_used_again(keeping: Install) -> None:
    keeping()
    dropped(3 * GRANULE, GRANULE)
    assert (memory.held_bytes(0), memory.kept_bytes(0), memory.peak_bytes(0)) == (4 * GRANULE,) * 3
    memory.reset_peak()
    assert memory.peak_bytes(0) == 0
    first = memory.GrowingMemory(CPU, 1)
    assert (memory.held_bytes(0), memory.kept_bytes(0), memory.peak_bytes(0)) == (4 * GRANULE, 3 * GRANULE, GRANULE)
    second = memory.GrowingMemory(CPU, 2 * GRANULE)
    assert (memory.kept_bytes(0), memory.peak_bytes(0)) == (0, 4 * GRANULE), "all of it: the cache has it"
    del first
    memory.reset_peak()
    second.grow(4 * GRANULE)
    assert (memory.held_bytes(0), memory.peak_bytes(0)) == (5 * GRANULE, 4 * GRANULE)


def test_refusals(install: Install, monkeypatch) -> None:
    fake = install()
    assert memory.refusal(0) is None
    assert not fake.mapped, "tried, and given back"
    memory.refusal.cache_clear()
    install(grows_in_place=False)
    assert memory.refusal(0) == "device 0 has no virtual memory management"
    memory.refusal.cache_clear()
    install(failing={"cuMemMap": INVALID_VALUE})
    assert str(memory.refusal(0)).startswith("cuMemMap failed: CUDA_ERROR_INVALID_VALUE (invalid argument): ")
    memory.refusal.cache_clear()
    monkeypatch.setattr(torch.version, "hip", "6.4")
    driver.reset()
    assert memory.refusal(0) == "needs an NVIDIA driver, this torch is built for ROCm 6.4"


def test_no_kernel_is_needed(install: Install, monkeypatch, tmp_path) -> None:
    install()
    monkeypatch.setattr(driver, "CUBINS", tmp_path)
    assert str(driver.unavailable()).startswith("kernel not built")
    assert memory.refusal(0) is None


# --- the cache --------------------------------------------------------------------------------------------------------


def test_a_cache_grows_without_a_copy(in_place: FakeDriver) -> None:
    cache, plain = PagedLatentCache(config(), block_size=16), PagedLatentCache(config(), block_size=16)
    store(cache, 2, 20)
    layer = cache.layers[1]
    address, old = layer.kv_cache.data_ptr(), layer.kv_cache
    page = 16 * 12 * 4
    assert layer.kv_cache.shape[0] == SMALL // page, "whole granules"
    pages = cache.memory_report().pages_total
    store(cache, 2, (pages // 2) * 16, seed=1)
    assert layer.kv_cache.data_ptr() == address
    assert layer.kv_cache.shape[0] == 2 * SMALL // page
    old.fill_(5)
    assert torch.equal(layer.kv_cache[: old.shape[0]], old), "one memory, not a copy"
    assert memory.held_bytes(0) == 2 * 2 * SMALL, "what is missing and no more"
    report = cache.memory_report()
    assert report.bytes_allocated == 2 * (report.pages_total + 1) * page
    assert memory.held_bytes(0) - report.bytes_allocated < 2 * page
    del cache, layer, old, plain
    assert memory.held_bytes(0) == 0


@pytest.mark.parametrize("grows_first", [False, True])
def test_the_next_cache_finds_the_memory_of_the_last(grows_first: bool, keeping: Install, monkeypatch) -> None:
    fake = keeping(granule=SMALL)
    monkeypatch.setattr(pool, "_grows_in_place", lambda device: True)
    page = 16 * 12 * 4
    per_granule = SMALL // page
    longer = (2 * per_granule + 1) * 16
    cache = PagedLatentCache(config(), block_size=16)
    store(cache, 1, 20)
    if grows_first:
        store(cache, 1, longer, seed=5)
    for layer in cache.layers:
        layer.kv_cache.fill_(float("nan"))
    held = memory.held_bytes(0)
    assert held == len(cache.layers) * SMALL * (3 if grows_first else 1)
    del cache, layer
    assert memory.kept_bytes(0) == held
    fake.calls.clear()

    cache = PagedLatentCache(config(), block_size=16)
    store(cache, 1, 20)
    assert cache.layers[0].kv_cache.shape[0] == per_granule, "pages that were asked for, however much is mapped"
    store(cache, 1, longer, seed=1)
    assert cache.layers[0].kv_cache.shape[0] == 3 * SMALL // page
    assert memory.held_bytes(0) == len(cache.layers) * 3 * SMALL
    assert len(fake.called("cuMemCreate")) == (0 if grows_first else len(cache.layers))
    if grows_first:
        assert virtual(fake) == [], "it grows into what the last one had grown to"
    for layer in cache.layers:
        assert not layer.kv_cache.isnan().any()
    cache.validate()

    del layer

    monkeypatch.setattr(pool, "_grows_in_place", lambda device: False)
    plain = PagedLatentCache(config(), block_size=16)
    store(plain, 1, 20)
    store(plain, 1, longer, seed=1)
    for ours, theirs in zip(everything(cache), everything(plain), strict=True):
        assert torch.equal(ours, theirs)


def test_what_is_stored_is_that_of_a_cache_that_copies(install: Install, monkeypatch) -> None:
    install(granule=SMALL)
    caches = []
    for in_place in (True, False):
        monkeypatch.setattr(pool, "_grows_in_place", lambda device, in_place=in_place: in_place)
        cache = PagedLatentCache(config(), block_size=16)
        for step, seqlen_q in enumerate((70, 1, 1200, 1, 900, 1)):
            store(cache, 3, seqlen_q, seed=step)
        caches.append(cache)
    for ours, theirs in zip(*map(everything, caches), strict=True):
        assert torch.equal(ours, theirs)
    assert memory.held_bytes(0) > 0


def test_a_reset_cache_goes_on_in_whole_granules(in_place: FakeDriver) -> None:
    cache = PagedLatentCache(config(), block_size=16)
    store(cache, 1, 20)
    pages = cache.memory_report().pages_total
    cache.reset()
    store(cache, 1, (pages + 1) * 16)
    assert cache.memory_report().pages_total + 1 == 2 * SMALL // (16 * 12 * 4)


@pytest.mark.parametrize(
    "clone", [copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))], ids=["copy", "pickle"]
)
def test_a_copy_of_a_cache_is_independent_and_grows(clone, in_place: FakeDriver) -> None:
    cache = PagedLatentCache(config(), block_size=16)
    store(cache, 2, 20)
    other = clone(cache)
    before = everything(cache)
    assert [layer.pool._memory for layer in other.layers] == [None, None], "of the original, which may die first"
    assert other.layers[0].kv_cache.data_ptr() != cache.layers[0].kv_cache.data_ptr()
    held = memory.held_bytes(0)
    store(other, 2, 3000, seed=2)
    assert memory.held_bytes(0) > held, "grows in place from then on"
    for old, new, copied in zip(before, everything(cache), everything(other), strict=True):
        assert torch.equal(old, new)
        assert torch.equal(old, copied[:, :, :20])
    store(cache, 2, 3000, seed=3)
    assert not torch.equal(everything(cache)[0], everything(other)[0])


def test_a_pool_that_somebody_replaced_is_followed(in_place: FakeDriver) -> None:
    cache = PagedLatentCache(config(), block_size=16)
    store(cache, 1, 20)
    for layer in cache.layers:
        old, layer.kv_cache = layer.kv_cache, layer.kv_cache.clone()
        old.fill_(float("nan"))
    before = everything(cache)
    store(cache, 1, 3000, seed=1)
    for old, new in zip(before, everything(cache), strict=True):
        assert torch.equal(old, new[:, :, :20])


def test_out_of_memory_leaves_the_stored_tokens(in_place: FakeDriver) -> None:
    cache = PagedLatentCache(config(), block_size=16)
    store(cache, 1, 20)
    before = everything(cache)
    in_place.free_memory = 0
    pools = [layer.kv_cache for layer in cache.layers]
    with pytest.raises(torch.OutOfMemoryError, match=r"^CUDA out of memory"):
        store(cache, 1, 3000)
    assert all(layer.kv_cache is kept for layer, kept in zip(cache.layers, pools, strict=True))
    for layer, old in zip(cache.layers, before, strict=True):
        assert torch.equal(layer.kv_cache[[1, 2]].flatten(0, 1)[:20, 0], old[0, 0])


def test_fixed_capacity_is_an_ordinary_tensor(in_place: FakeDriver) -> None:
    cache = PagedLatentCache(config(), block_size=16, max_cache_len=64)
    store(cache, 2, 20)
    assert not in_place.called("cuMemCreate")


def test_while_compiling_pools_are_ordinary_tensors(in_place: FakeDriver, monkeypatch) -> None:
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    made = pool.Pool(grows=True)
    first = made.zeros((2, 16, 1, 12), torch.float32, CPU).fill_(4)
    grown = made.grow(first, 5)
    assert not in_place.called("cuMemCreate")
    assert torch.equal(grown[:2], first)
    assert grown[2:].count_nonzero() == 0


def test_which_way_is_said_once(install: Install, caplog) -> None:
    install()
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            store(PagedLatentCache(config(), block_size=16), 1, 20)
            pool.Pool(grows=True).round_up(torch.empty(1, 16, 1, 12))
    said = "flash_mla: pools on cpu are copied when they grow: cpu tensors cannot grow in place"
    assert [record.message for record in caplog.records if "pools on" in record.message] == [said]
    assert pool._grows_in_place(torch.device("cuda", 0))
    assert not pool._grows_in_place(torch.device("meta"))


@pytest.mark.parametrize(("num_layers", "most"), [(27, 64 * MIB), (61, 122 * MIB)])
def test_idle_memory_is_less_than_a_granule_per_layer(num_layers: int, most: int, in_place: FakeDriver) -> None:
    """Page by page of 64 tokens x 1,152 bytes through six granules."""
    in_place.granule = GRANULE
    page = 64 * 576 * 2
    round_up = pool.Pool(grows=True).round_up(torch.empty(1, 64, 1, 576, dtype=torch.bfloat16))
    for pages in range(1, 6 * GRANULE // page):
        given = round_up(pages)
        held = memory.round_up(given * page, GRANULE)
        assert pages * page <= given * page <= held
        assert num_layers * (held - pages * page) < most
        assert held - given * page < page, "every page that fits is given"
