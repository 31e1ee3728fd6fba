"""The driver's virtual memory on the CPU: reserved addresses are real, physical memory is a file that is mapped there.

So a test reads and writes what was mapped, and a handle that is mapped at two addresses shows the same bytes at both.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import struct
from ctypes import c_int, c_size_t, c_uint64, c_void_p
from dataclasses import dataclass, field
from typing import Any

import torch

INVALID_VALUE, OUT_OF_MEMORY = 1, 2
MAP_FIXED, MAP_NORESERVE = 0x10, 0x4000
GARBAGE = 0xFF  # a bf16 or fp32 of these bytes is NaN

_libc = ctypes.CDLL(None)
_libc.mmap.restype = c_void_p
_libc.mmap.argtypes = (c_void_p, c_size_t, c_int, c_int, c_int, ctypes.c_long)
_libc.munmap.argtypes = (c_void_p, c_size_t)
_libc.mprotect.argtypes = (c_void_p, c_size_t, c_int)


@dataclass
class FakeMemory:
    """Memory of every device of a fake driver.

    Attributes:
        grows_in_place: what CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED says.
        granule: bytes; sizes and addresses that it does not divide are refused.
        total_memory: bytes that cuDeviceTotalMem says.
        free_memory: bytes that may be created before CUDA_ERROR_OUT_OF_MEMORY; all devices together.
        capturing: streams that are being captured.
    """

    grows_in_place: bool = True
    granule: int = 2 * 2**20
    total_memory: int = 8 * 2**30
    free_memory: int = 2**30
    capturing: set[int] = field(default_factory=set)
    reserved: dict[int, int] = field(default_factory=dict)  # address -> bytes
    physical: dict[int, tuple[int, int]] = field(default_factory=dict)  # file -> bytes, references
    mapped: dict[int, tuple[int, int]] = field(default_factory=dict)  # address -> bytes, file

    def _cuDeviceTotalMem_v2(self, out: int, device: int) -> None:
        c_size_t.from_address(out).value = self.total_memory

    def _cuMemGetAllocationGranularity(self, out: int, properties: int, option: int) -> None:
        assert struct.unpack("@3i", ctypes.string_at(properties, 12)) == (1, 0, 1), "pinned, no handle type, a device"
        assert option == 0, "CU_MEM_ALLOC_GRANULARITY_MINIMUM"
        c_size_t.from_address(out).value = self.granule

    def _cuMemAddressReserve(self, out: int, size: int, alignment: int, address: int, flags: int) -> int:
        if size % self.granule or not size or alignment or address or flags:
            return INVALID_VALUE
        # As the device's, an address is a multiple of the granule; the surplus is never touched.
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
        found = _libc.mmap(None, size + self.granule, 0, flags, -1, 0)
        assert found not in (None, c_void_p(-1).value)
        found += -found % self.granule
        self.reserved[found] = size
        c_uint64.from_address(out).value = found
        return 0

    def _cuMemAddressFree(self, address: int, size: int) -> int:
        if self.reserved.get(address) != size or any(address <= at < address + size for at in self.mapped):
            return INVALID_VALUE
        del self.reserved[address]
        _libc.munmap(address, size)
        return 0

    def _cuMemCreate(self, out: int, size: int, properties: int, flags: int) -> int:
        # CUmemAllocationProp: type pinned, no handle types, location (device, its number), nothing of Windows, no flags
        kind, handles, location, _, windows, more = struct.unpack("@4iPQ", ctypes.string_at(properties, 32))
        if (kind, handles, location, windows, more, flags) != (1, 0, 1, 0, 0, 0) or size % self.granule or not size:
            return INVALID_VALUE
        if size > self.free_memory:
            return OUT_OF_MEMORY
        self.free_memory -= size
        file = os.memfd_create("device memory")
        os.truncate(file, size)
        os.pwrite(file, bytes([GARBAGE]) * size, 0)
        self.physical[file] = (size, 1)
        c_uint64.from_address(out).value = file
        return 0

    def _let_go(self, file: int) -> None:
        size, references = self.physical.pop(file)
        if references > 1:
            self.physical[file] = (size, references - 1)
        else:
            os.close(file)
            self.free_memory += size

    def _cuMemRelease(self, handle: int) -> int:
        if handle not in self.physical:
            return INVALID_VALUE
        self._let_go(handle)
        return 0

    def _cuMemMap(self, address: int, size: int, offset: int, handle: int, flags: int) -> int:
        inside = any(start <= address and address + size <= start + room for start, room in self.reserved.items())
        taken = any(address < at + length and at < address + size for at, (length, _) in self.mapped.items())
        if not inside or taken or offset or flags or address % self.granule or self.physical[handle][0] != size:
            return INVALID_VALUE
        found = _libc.mmap(address, size, 0, mmap.MAP_SHARED | MAP_FIXED, handle, 0)
        assert found == address
        self.physical[handle] = (size, self.physical[handle][1] + 1)
        self.mapped[address] = (size, handle)
        return 0

    def _cuMemSetAccess(self, address: int, size: int, description: int, count: int) -> int:
        location, _, access = struct.unpack("@3i", ctypes.string_at(description, 12))
        if address not in self.mapped or self.mapped[address][0] != size or (location, access, count) != (1, 3, 1):
            return INVALID_VALUE
        return int(_libc.mprotect(address, size, mmap.PROT_READ | mmap.PROT_WRITE))

    def _cuMemUnmap(self, address: int, size: int) -> int:
        if address not in self.mapped or self.mapped[address][0] != size:
            return INVALID_VALUE
        _, handle = self.mapped.pop(address)
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE
        _libc.mmap(address, size, 0, flags, -1, 0)
        self._let_go(handle)
        return 0

    def _cuStreamIsCapturing(self, stream: int | None, out: int) -> None:
        c_int.from_address(out).value = int((stream or 0) in self.capturing)

    def _cuStreamSynchronize(self, stream: int | None) -> int:
        return 900 if (stream or 0) in self.capturing else 0  # CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED


def cpu_tensor(data: Any, device: torch.device) -> torch.Tensor:
    """What `torch.as_tensor` makes of `__cuda_array_interface__`, on the CPU: the tensor keeps `data`."""
    interface = data.__cuda_array_interface__
    (num_bytes,), (address, is_read_only) = interface["shape"], interface["data"]
    assert (interface["typestr"], interface["strides"], is_read_only) == ("|u1", None, False)
    view = type("View", ((ctypes.c_uint8 * num_bytes),), {"_length_": num_bytes, "_type_": ctypes.c_uint8})
    buffer = view.from_address(address)
    buffer.data = data
    return torch.frombuffer(buffer, dtype=torch.uint8)
