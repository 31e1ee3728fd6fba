"""A driver that records: stands in for libcuda.so.1 behind the same C prototypes, so that the host side runs anywhere.

Every function is a ctypes callback of the type that `driver.PROTOTYPES` declares: arguments are converted as for the
library, and structs are read back from the addresses that came. Kernels and the sizes of their parameters are read out
of the cubin that is loaded, so a name or a struct that the device code does not have is an error here too.
"""

from __future__ import annotations

import ctypes
import struct
import threading
from collections.abc import Callable
from ctypes import CFUNCTYPE, c_int
from dataclasses import dataclass, field
from typing import Any

from fake_memory import FakeMemory

from flash_mla.backends.cuda import driver

INVALID_VALUE, OUT_OF_MEMORY, NOT_INITIALIZED, INVALID_CONTEXT, NOT_FOUND = 1, 2, 3, 201, 500
ERRORS = {
    INVALID_VALUE: (b"CUDA_ERROR_INVALID_VALUE", b"invalid argument"),
    OUT_OF_MEMORY: (b"CUDA_ERROR_OUT_OF_MEMORY", b"out of memory"),
    NOT_INITIALIZED: (b"CUDA_ERROR_NOT_INITIALIZED", b"initialization error"),
    100: (b"CUDA_ERROR_NO_DEVICE", b"no CUDA-capable device is detected"),
    INVALID_CONTEXT: (b"CUDA_ERROR_INVALID_CONTEXT", b"invalid device context"),
    NOT_FOUND: (b"CUDA_ERROR_NOT_FOUND", b"named symbol not found"),
}
NUM_SMS = 132
MAX_GRID_YZ = 65535  # CTAs in y and in z; in x there may be 2^31 - 1
PRIMARY = 0xC000  # + device: handle of a device's primary context
# In .nv.info.<kernel>: format, attribute, 12 bytes about a parameter; the last u32 is its size in bytes << 18.
EIATTR_KPARAM_INFO = b"\x04\x17\x0c\x00"


def kernels_of(cubin: bytes) -> dict[str, int]:
    """Kernels of a cubin, which is an ELF file, with the bytes of their parameters."""
    (offset,) = struct.unpack_from("<Q", cubin, 40)
    size, count, names_index = struct.unpack_from("<3H", cubin, 58)
    sections = [struct.unpack_from("<I I Q Q Q Q", cubin, offset + i * size) for i in range(count)]
    names = sections[names_index][4]
    found = {}
    for name, _, _, _, start, length in sections:
        text = cubin[names + name : cubin.index(b"\0", names + name)].decode()
        if text.startswith(".nv.info."):
            info = cubin[start : start + length]
            (last,) = struct.unpack_from("<I", info, info.index(EIATTR_KPARAM_INFO) + 12)
            found[text.removeprefix(".nv.info.")] = last >> 18
    return found


@dataclass
class Launch:
    """One launch as the driver saw it; `context` is what was current in the thread, attributes are by CUDA's number."""

    kernel: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared_memory: int
    stream: int
    attributes: dict[int, tuple[int, ...]]
    params: bytes
    context: int | None


@dataclass
class FakeDriver(FakeMemory):
    """What tests set and read; memory is in `FakeMemory`.

    Attributes:
        version: what cuDriverGetVersion answers.
        failing: CUresult to return by function name; such a call does nothing else.
        missing: functions that this library does not have.
        calls: (function, arguments) in order, across threads.
        launches: every launch; `on_launch` is called with each, to do on the CPU what the kernel would.
        errors: what `on_launch` raised; an exception does not get through a C callback.
    """

    version: int = 12090
    failing: dict[str, int] = field(default_factory=dict)
    missing: set[str] = field(default_factory=set)
    calls: list[tuple[str, tuple[Any, ...]]] = field(default_factory=list)
    launches: list[Launch] = field(default_factory=list)
    errors: list[Exception] = field(default_factory=list)
    on_launch: Callable[[Launch], None] | None = None

    def __post_init__(self) -> None:
        self.kernels: list[tuple[str, int]] = []  # handle - 1 -> name, bytes of parameters
        self.libraries: list[dict[str, int]] = []
        self.thread = threading.local()
        self.initialised = False
        # Kept: ctypes does not hold on to what a C pointer leads to.
        self.strings = {code: tuple(map(ctypes.c_char_p, texts)) for code, texts in ERRORS.items()}
        for name, arguments in driver.PROTOTYPES.items():
            if name not in self.missing:
                setattr(self, name, CFUNCTYPE(c_int, *arguments)(self._record(name)))

    def _record(self, name: str) -> Callable[..., int]:
        action = getattr(self, f"_{name}")

        def call(*arguments: Any) -> int:
            self.calls.append((name, arguments))
            if name in self.failing:
                return self.failing[name]
            if not self.initialised and name not in ("cuInit", "cuDriverGetVersion") and "Error" not in name:
                return NOT_INITIALIZED
            return action(*arguments) or 0

        return call

    def called(self, name: str) -> list[tuple[Any, ...]]:
        """Arguments of every call of one function."""
        return [arguments for called, arguments in self.calls if called == name]

    @property
    def contexts(self) -> list[int]:
        """This thread's stack of contexts; tests put what they want to be current on it."""
        if not hasattr(self.thread, "contexts"):
            self.thread.contexts = []
        stack: list[int] = self.thread.contexts
        return stack

    def _cuDriverGetVersion(self, out: int) -> None:
        c_int.from_address(out).value = self.version

    def _cuInit(self, flags: int) -> None:
        assert flags == 0
        self.initialised = True

    def _error(self, which: int, result: int, out: int) -> int:
        if result not in self.strings:
            return INVALID_VALUE
        ctypes.memmove(out, ctypes.addressof(self.strings[result][which]), 8)
        return 0

    def _cuGetErrorName(self, result: int, out: int) -> int:
        return self._error(0, result, out)

    def _cuGetErrorString(self, result: int, out: int) -> int:
        return self._error(1, result, out)

    def _cuDeviceGet(self, out: int, ordinal: int) -> None:
        c_int.from_address(out).value = ordinal

    def _cuDeviceGetAttribute(self, out: int, attribute: int, device: int) -> None:
        # CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT, CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED
        c_int.from_address(out).value = {16: NUM_SMS, 102: int(self.grows_in_place)}[attribute]

    def _cuDevicePrimaryCtxRetain(self, out: int, device: int) -> None:
        ctypes.c_void_p.from_address(out).value = PRIMARY + device

    def _cuCtxGetDevice(self, out: int) -> int:
        if not self.contexts:
            return INVALID_CONTEXT
        c_int.from_address(out).value = self.contexts[-1] & 0xFF
        return 0

    def _cuCtxPushCurrent_v2(self, context: int) -> None:
        self.contexts.append(context)

    def _cuCtxPopCurrent_v2(self, out: int) -> None:
        ctypes.c_void_p.from_address(out).value = self.contexts.pop()

    def _cuThreadExchangeStreamCaptureMode(self, mode: int) -> None:
        before = getattr(self.thread, "capture_mode", 0)
        self.thread.capture_mode, c_int.from_address(mode).value = c_int.from_address(mode).value, before

    def _cuLibraryLoadData(self, out: int, code: int, *options: Any) -> None:
        assert [option or 0 for option in options] == [0] * 6
        (offset,) = struct.unpack("<Q", ctypes.string_at(code + 40, 8))
        size, count = struct.unpack("<2H", ctypes.string_at(code + 58, 4))
        self.libraries.append(kernels_of(ctypes.string_at(code, offset + size * count)))
        ctypes.c_void_p.from_address(out).value = len(self.libraries)

    def _cuLibraryGetKernel(self, out: int, library: int, name: bytes) -> int:
        kernels = self.libraries[library - 1]
        if name.decode() not in kernels:
            return NOT_FOUND
        self.kernels.append((name.decode(), kernels[name.decode()]))
        ctypes.c_void_p.from_address(out).value = len(self.kernels)
        return 0

    def _cuKernelSetAttribute(self, attribute: int, value: int, kernel: int, device: int) -> int:
        assert attribute == 8, "CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES"
        return INVALID_VALUE if value > 232448 else 0

    def _cuKernelGetFunction(self, out: int, kernel: int) -> int:
        return 0 if self.contexts else INVALID_CONTEXT

    def _cuLaunchKernelEx(self, config: int, kernel: int, params: int, extra: int | None) -> int:
        assert extra is None
        *numbers, stream, attributes, count = struct.unpack("@7I4xPPI4x", ctypes.string_at(config, 56))
        if max(numbers[1:3]) > MAX_GRID_YZ:
            return INVALID_VALUE
        name, size = self.kernels[kernel - 1]
        set_to = {}
        for index in range(count):
            number, *value = struct.unpack("@I4x3I52x", ctypes.string_at(attributes + 72 * index, 72))
            set_to[number] = tuple(value)
        first = ctypes.c_void_p.from_address(params).value
        assert first is not None
        launch = Launch(
            kernel=name,
            grid=tuple(numbers[:3]),
            block=tuple(numbers[3:6]),
            shared_memory=numbers[6],
            stream=stream,
            attributes=set_to,
            params=ctypes.string_at(first, size),
            context=self.contexts[-1] if self.contexts else None,
        )
        self.launches.append(launch)
        if self.on_launch is not None:
            try:
                self.on_launch(launch)
            except Exception as error:
                self.errors.append(error)
        return 0

    def _cuTensorMapEncodeTiled(self, out: int, *arguments: Any) -> None:
        """The map of this driver: a digest of nothing, 128 bytes of the number of the call."""
        assert out % 64 == 0
        ctypes.memset(out, len(self.called("cuTensorMapEncodeTiled")), 128)
