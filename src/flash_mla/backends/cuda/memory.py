"""Device memory that grows where it lies: addresses are reserved once, physical memory is mapped behind what is there.

Small memory that dies is kept for the next cache, as torch's allocator keeps its blocks: made anew, 27 pools of 2 MiB
take 4.5 ms of driver calls on an H200, and 3 to 5 ms to be given back.
Neither torch's allocator nor `torch.cuda.memory_allocated` sees this memory: `held_bytes`, `kept_bytes` and
`peak_bytes` do. Source: CUDA driver API reference, section "Virtual Memory Management".
(Over 400 lines: mapping, keeping and giving back change the same lists and accounts under one lock.)
"""

from __future__ import annotations

import ctypes
import functools
import logging
import math
import os
import struct
import threading
import weakref
from collections import defaultdict
from ctypes import c_int, c_size_t, c_uint64

import torch

from . import driver

__all__ = [
    "GrowingMemory",
    "granule",
    "held_bytes",
    "kept_bytes",
    "peak_bytes",
    "refusal",
    "release_kept",
    "release_pending",
    "reset_peak",
    "round_up",
]

logger = logging.getLogger(__name__)

CUDA_ERROR_OUT_OF_MEMORY = 2
# Answers of cuStreamIsCapturing where a capture forbids even to ask: the legacy stream beside a blocking capture.
CAPTURE_ERRORS = (900, 906)
CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED = 102
CU_MEM_ALLOCATION_TYPE_PINNED = 1
CU_MEM_LOCATION_TYPE_DEVICE = 1
CU_MEM_ACCESS_FLAGS_PROT_READWRITE = 3
CU_MEM_ALLOC_GRANULARITY_MINIMUM = 0
# CUmemAllocationProp, 32 bytes: type, handle types, location (type, device), a pointer for Windows, 8 bytes of flags.
ALLOCATION_PROP = struct.Struct("@4iP8x")
# CUmemAccessDesc, 12 bytes: location (type, device), flags.
ACCESS_DESC = struct.Struct("@3i")

# Addresses cost no memory: at 47 bits of them (128 TiB), 61 layers could reserve 2 TiB each.
RESERVED_FACTOR = 16
MIN_RESERVED = 2**30  # bytes

# Physical memory of a device that is kept at most. It is taken from whatever runs between two caches, say a training
# step after a rollout, and torch cannot ask for it back; 27 pools of 9 MiB fit.
KEPT_BYTES = 256 * 2**20
# Kept memory serves if it has at most so much more than is wanted: what the last cache grew by is found again, and
# neither a cache that stays small nor the zeroing takes much (16 MiB at the 4.8 TB/s of an H200: 3.5 us).
SPARE_BYTES = 16 * 2**20

_lock = threading.RLock()  # a finalizer may run inside any call here, in the same thread
_held: defaultdict[int, int] = defaultdict(int)  # bytes of physical memory by device
_peak: defaultdict[int, int] = defaultdict(int)
_pending: list[_Mapping] = []
_kept: defaultdict[int, list[_Mapping]] = defaultdict(list)  # by device


class _Physical:
    """Physical memory of whole granules; given back when the last range that maps it is unmapped."""

    def __init__(self, device_index: int, num_bytes: int) -> None:
        out, properties = c_uint64(), ctypes.create_string_buffer(_properties(device_index))
        where = ctypes.addressof(out), num_bytes, ctypes.addressof(properties), 0
        driver.call("cuMemCreate", *where, purpose=f"{num_bytes} bytes on device {device_index}")
        self.handle = out.value
        self.num_bytes = num_bytes
        self.device_index = device_index
        self.num_ranges = 0
        _held[device_index] += num_bytes
        _note_peak(device_index)

    def release(self) -> None:
        """Let go of the handle; the driver frees the memory if nothing maps it."""
        driver.call("cuMemRelease", self.handle, purpose=f"{self.num_bytes} bytes on device {self.device_index}")
        _held[self.device_index] -= self.num_bytes


class _Mapping:
    """A range of reserved addresses, the physical memory that fills it from its start, and the streams that used it."""

    def __init__(self, device_index: int, reserved_bytes: int) -> None:
        out = c_uint64()
        arguments = ctypes.addressof(out), reserved_bytes, 0, 0, 0
        driver.call("cuMemAddressReserve", *arguments, purpose=f"{reserved_bytes} bytes of addresses")
        self.device_index = device_index
        self.address = out.value
        self.reserved_bytes = reserved_bytes
        self.mapped_bytes = 0
        self.physical: list[_Physical] = []
        self.streams: set[int] = set()
        self.pid = os.getpid()

    def map(self, physical: _Physical) -> None:
        """Map `physical` behind what is there, readable and writable; if the driver refuses, nothing has changed."""
        address, size = self.address + self.mapped_bytes, physical.num_bytes
        purpose = f"{size} bytes at {address:#x} on device {self.device_index}"
        driver.call("cuMemMap", address, size, 0, physical.handle, 0, purpose=purpose)
        description = ACCESS_DESC.pack(
            CU_MEM_LOCATION_TYPE_DEVICE, self.device_index, CU_MEM_ACCESS_FLAGS_PROT_READWRITE
        )
        access = ctypes.create_string_buffer(description, ACCESS_DESC.size)
        try:
            driver.call("cuMemSetAccess", address, size, ctypes.addressof(access), 1, purpose=purpose)
        except driver.DriverError:
            driver.call("cuMemUnmap", address, size, purpose=purpose)
            raise
        self.physical.append(physical)
        self.mapped_bytes += size
        physical.num_ranges += 1

    def is_captured(self) -> bool:
        """Whether one of the streams is being captured into a graph: then it cannot be waited for."""
        return any(_is_capturing(stream) for stream in self.streams)

    def is_shared(self) -> bool:
        """Whether another range shows some of the same physical memory."""
        return any(physical.num_ranges > 1 for physical in self.physical)

    def wait(self, but_for: int | None = None) -> None:
        """Wait for the streams: neither cuMemUnmap nor cuMemRelease waits for kernels that use the memory.

        Args:
            but_for: a stream whose own order suffices.
        """
        for stream in self.streams - {but_for}:
            purpose = f"before memory at {self.address:#x} is given back or used again"
            driver.call("cuStreamSynchronize", stream, purpose=purpose)

    def free(self) -> None:
        """Unmap everything, piece by piece as it was mapped, and give it back where no other range maps it."""
        purpose = f"{self.mapped_bytes} bytes at {self.address:#x} on device {self.device_index}"
        while self.physical:
            physical = self.physical.pop()
            self.mapped_bytes -= physical.num_bytes
            driver.call("cuMemUnmap", self.address + self.mapped_bytes, physical.num_bytes, purpose=purpose)
            physical.num_ranges -= 1
            if physical.num_ranges == 0:
                physical.release()
        driver.call("cuMemAddressFree", self.address, self.reserved_bytes, purpose=purpose)


class _Range:
    """What keeps a mapping alive: the memory object holds it, and so does every tensor over these addresses.

    A finalizer and not `__del__`: weakref does not run it any more once the interpreter shuts down, when the process
    gives everything back anyway.
    """

    def __init__(self, mapping: _Mapping) -> None:
        self.mapping = mapping
        weakref.finalize(self, _drop, mapping).atexit = False


class _Bytes:
    """The first bytes of a range, for torch: its tensor refers to this object, and this object to the range."""

    def __init__(self, memory_range: _Range, num_bytes: int) -> None:
        self.range = memory_range
        self.__cuda_array_interface__ = {
            "shape": (num_bytes,),
            "typestr": "|u1",  # the interface knows no bf16
            "data": (memory_range.mapping.address, False),
            "strides": None,
            "version": 3,
        }


def _as_tensor(data: _Bytes, device: torch.device) -> torch.Tensor:
    return torch.as_tensor(data, device=device)


def _properties(device_index: int) -> bytes:
    return ALLOCATION_PROP.pack(CU_MEM_ALLOCATION_TYPE_PINNED, 0, CU_MEM_LOCATION_TYPE_DEVICE, device_index, 0)


@functools.cache
def granule(device_index: int) -> int:
    """Bytes by which memory of a device grows: 2 MiB on every GPU so far."""
    out, properties = c_size_t(), ctypes.create_string_buffer(_properties(device_index))
    arguments = ctypes.addressof(out), ctypes.addressof(properties), CU_MEM_ALLOC_GRANULARITY_MINIMUM
    driver.call("cuMemGetAllocationGranularity", *arguments, purpose=f"device {device_index}")
    return out.value


def _is_capturing(stream: int) -> bool:
    status = c_int()
    try:
        driver.call("cuStreamIsCapturing", stream, ctypes.addressof(status), purpose=f"stream {stream:#x}")
    except driver.DriverError as error:
        if error.result in CAPTURE_ERRORS:
            return True
        raise
    return status.value != 0


def round_up(num_bytes: int, step: int) -> int:
    """The least multiple of `step` that is at least `num_bytes`."""
    return -(-num_bytes // step) * step


# --- keeping and giving back ------------------------------------------------------------------------------------------


def _drop(mapping: _Mapping) -> None:
    """The last tensor over a mapping is gone; kernels in flight may not be through with it."""
    if os.getpid() != mapping.pid:  # a forked child cannot call the driver, and the memory is its parent's
        return
    with _lock:
        if _is_worth_keeping(mapping):
            _kept[mapping.device_index].append(mapping)
        else:
            _pending.append(mapping)
    release_pending()


def _is_worth_keeping(mapping: _Mapping) -> bool:
    """Whether a dropped mapping is kept as it is, with its streams: nothing is waited for, nothing unmapped."""
    device_index = mapping.device_index
    if not 0 < mapping.mapped_bytes <= KEPT_BYTES - kept_bytes(device_index) or mapping.is_shared():
        return False
    try:
        with driver.allocating(device_index, "memory is kept"):
            # The last use may have been in another stream than the first: most likely the present one.
            mapping.streams.add(driver.raw_stream(device_index))
            return not mapping.is_captured()
    except driver.DriverError:
        return False


def _take_kept(device_index: int, num_bytes: int, reserved_bytes: int) -> _Mapping | None:
    """The smallest kept mapping of `num_bytes` to SPARE_BYTES more, or None.

    The current stream may write to it at once; what lies there is what its last tensors left.

    Args:
        reserved_bytes: what a mapping made anew would reserve: it has room to grow for no less.
    """
    stream = driver.raw_stream(device_index)
    # In a capture nothing can be waited for, and a graph would keep the addresses.
    if not _kept[device_index] or _is_capturing(stream):
        return None
    with _lock:
        fitting = [
            mapping
            for mapping in _kept[device_index]
            if num_bytes <= mapping.mapped_bytes <= num_bytes + SPARE_BYTES
            and mapping.reserved_bytes >= reserved_bytes
            and mapping.pid == os.getpid()  # not what a forked child found in its parent's list
        ]
        for mapping in sorted(fitting, key=lambda mapping: mapping.mapped_bytes):
            try:
                if mapping.is_captured():
                    continue
                mapping.wait(but_for=stream)
            except driver.DriverError:
                _kept[device_index].remove(mapping)
                _pending.append(mapping)  # which logs it
                continue
            _kept[device_index].remove(mapping)
            mapping.streams = {stream}
            _note_peak(device_index)
            return mapping
    return None


def release_kept(device_index: int | None = None) -> None:
    """Give kept memory back to the device, after its streams: of one device, or of all of them.

    Called when growing memory runs out; call it before something else wants the device's last 256 MiB. In a graph
    capture the memory is given back after it. Never raises: what the driver refuses is logged.
    """
    with _lock:
        for index in [*_kept] if device_index is None else [device_index]:
            _pending.extend(mapping for mapping in _kept.pop(index, []) if mapping.pid == os.getpid())
    release_pending()


def release_pending() -> None:
    """Give back memory whose last tensor died, after its streams; what a graph capture forbids to wait for, later.

    Called whenever memory grows or dies. Never raises: it runs in finalizers. What the driver refuses is logged.
    """
    with _lock:
        waiting = _pending[:]
        _pending.clear()
        for mapping in waiting:
            try:
                with driver.allocating(mapping.device_index, "memory is given back"):
                    # The last use may have been in another stream than the first: most likely the present one.
                    mapping.streams.add(driver.raw_stream(mapping.device_index))
                    if mapping.is_captured():
                        _pending.append(mapping)
                    else:
                        mapping.wait()
                        mapping.free()
            except driver.DriverError as error:
                # As text: a handler may keep the record, and the error's traceback the memory that called this.
                logger.warning("flash_mla: %d bytes are not given back: %s", mapping.mapped_bytes, str(error))


# --- accounts ---------------------------------------------------------------------------------------------------------


def held_bytes(device_index: int) -> int:
    """Bytes of physical memory that growing memory holds on a device: in use, kept, or waiting to be given back."""
    return _held[device_index]


def kept_bytes(device_index: int) -> int:
    """Those of `held_bytes` that no tensor uses: kept for the next memory of about that size."""
    with _lock:
        return sum(mapping.mapped_bytes for mapping in _kept[device_index])


def peak_bytes(device_index: int) -> int:
    """The most that `held_bytes` without `kept_bytes` was since the start or the last `reset_peak`.

    So kept memory counts from when it is used again, all of it: up to SPARE_BYTES more than was asked for.
    """
    return _peak[device_index]


def reset_peak() -> None:
    """Let `peak_bytes` of every device begin anew at what is held now and not kept."""
    with _lock:
        _peak.clear()
        for device_index in [*_held]:
            _note_peak(device_index)


def _note_peak(device_index: int) -> None:
    _peak[device_index] = max(_peak[device_index], _held[device_index] - kept_bytes(device_index))


# --- growing ----------------------------------------------------------------------------------------------------------


class GrowingMemory:
    """Zeroed memory of one device that grows without a copy and without moving, as long as its addresses last.

    It dies with its last tensor and is kept then, up to KEPT_BYTES of a device, for the next memory of about its size.

    Args:
        device: with an index.
        first_bytes: what is needed now. Addresses are reserved for 16 times that, at least 1 GiB and at most the memory
            of the device. Kept memory may have up to SPARE_BYTES more.
    Raises: torch.OutOfMemoryError: nothing is held then. DriverError: no driver, or it refuses.
    """

    def __init__(self, device: torch.device, first_bytes: int) -> None:
        self.device = device
        self.device_index = device.index or 0
        with driver.allocating(self.device_index, "addresses are reserved"):
            kept = _take_kept(self.device_index, first_bytes, self._reserved_bytes(first_bytes))
            self._range = self._reserve(first_bytes) if kept is None else _Range(kept)
        if kept is not None:
            # All of it at once: `grow` calls nothing for what is mapped already.
            self._bytes(kept.mapped_bytes).zero_()
        self.grow(first_bytes)

    @property
    def address(self) -> int:
        """Where it begins; changes only when `grow` goes beyond the reserved addresses."""
        return self._range.mapping.address

    @property
    def num_bytes(self) -> int:
        """Bytes that are there, whole granules."""
        return self._range.mapping.mapped_bytes

    def _reserved_bytes(self, num_bytes: int) -> int:
        reserved = min(max(RESERVED_FACTOR * num_bytes, MIN_RESERVED), driver.total_bytes(self.device_index))
        return round_up(max(reserved, num_bytes), granule(self.device_index))

    def _reserve(self, num_bytes: int) -> _Range:
        return _Range(_Mapping(self.device_index, self._reserved_bytes(num_bytes)))

    def grow(self, num_bytes: int) -> None:
        """Have at least `num_bytes`; what is new is zero, in the order of the current stream.

        Beyond the reserved addresses the same physical memory is mapped at new ones too: nothing is copied. Tensors
        over the old addresses stay valid and show the same bytes; the old range goes with the last of them.
        Raises: torch.OutOfMemoryError, DriverError: nothing has changed.
        """
        release_pending()
        before = self.num_bytes
        self._range.mapping.streams.add(driver.raw_stream(self.device_index))
        if num_bytes <= before:
            return
        missing = round_up(num_bytes - before, granule(self.device_index))
        with _lock, driver.allocating(self.device_index, f"{missing} bytes are added"):
            physical = self._create(missing, before)
            try:
                grown = self._range
                if before + missing > grown.mapping.reserved_bytes:
                    grown = self._reserve(before + missing)
                    grown.mapping.streams |= self._range.mapping.streams
                    for old in self._range.mapping.physical:
                        grown.mapping.map(old)
                grown.mapping.map(physical)
            except driver.DriverError:
                physical.release()
                raise
        self._range = grown
        # What another tensor left there could be NaN.
        self._bytes(before + missing)[before:].zero_()

    def _create(self, missing: int, before: int) -> _Physical:
        try:
            return _Physical(self.device_index, missing)
        except driver.DriverError as error:
            if error.result != CUDA_ERROR_OUT_OF_MEMORY:
                raise
        release_kept(self.device_index)
        # torch keeps what its tensors gave back; in a capture it may not let go of it.
        if not _is_capturing(driver.raw_stream(self.device_index)):
            torch.cuda.empty_cache()
        try:
            return _Physical(self.device_index, missing)
        except driver.DriverError as error:
            if error.result != CUDA_ERROR_OUT_OF_MEMORY:
                raise
            # transformers and accelerate know running out of memory by the first five words.
            raise torch.OutOfMemoryError(
                f"CUDA out of memory. flash_mla: memory of {before / 2**20:.0f} MiB wanted {missing / 2**20:.0f} MiB "
                f"more on device {self.device_index}; {_held[self.device_index] / 2**20:.0f} MiB are held in growing "
                f"memory, the device has {driver.total_bytes(self.device_index) / 2**20:.0f} MiB"
            ) from error

    def _bytes(self, num_bytes: int) -> torch.Tensor:
        return _as_tensor(_Bytes(self._range, num_bytes), self.device)

    def tensor(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """The first elements as a contiguous tensor, which keeps the memory alive by itself.

        Raises: ValueError: more bytes than `grow` was asked for.
        """
        needed = math.prod(shape) * dtype.itemsize
        if needed > self.num_bytes:
            raise ValueError(
                f"flash_mla.GrowingMemory.tensor: {shape} of {dtype} must fit into {self.num_bytes} bytes, got {needed}"
            )
        # Not an inference tensor, whatever mode this runs in: it is written in place later.
        with torch.inference_mode(False):
            return self._bytes(needed).view(dtype).view(shape)


@functools.cache
def refusal(device_index: int) -> str | None:
    """Why memory of a CUDA device cannot grow in place, in one line; None if it can. Tries it with one granule.

    Raises: torch.OutOfMemoryError: not even one granule is free.
    """
    if reason := driver.no_driver():
        return reason
    which = CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED
    try:
        if not driver.attribute(device_index, which):
            return f"device {device_index} has no virtual memory management"
        # Some sandboxes and virtual GPUs say yes and then refuse a call.
        GrowingMemory(torch.device("cuda", device_index), 1)
    except driver.DriverError as error:
        return str(error)
    return None
