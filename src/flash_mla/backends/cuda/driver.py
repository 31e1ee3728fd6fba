"""The NVIDIA driver, called directly: kernels out of the package's cubins, launches, tensor maps.

`libcuda.so.1` is loaded when a kernel is first wanted, never at import. Nothing here copies, allocates device memory or
waits for the device (`memory.py` does, through `allocating` and `call`). Signatures and constants: CUDA driver API
reference, https://docs.nvidia.com/cuda/cuda-driver-api.
(Over 400 lines: launches and tensor maps share the library, its prototypes and its errors.)
"""

from __future__ import annotations

import ctypes
import functools
import struct
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from ctypes import c_char_p, c_int, c_size_t, c_uint, c_uint32, c_uint64, c_void_p
from pathlib import Path
from typing import Any

import torch

__all__ = [
    "DriverError",
    "Launch",
    "allocating",
    "attribute",
    "call",
    "capability",
    "function",
    "launch",
    "launch_all",
    "no_driver",
    "num_sms",
    "raw_stream",
    "reset",
    "tensor_map",
    "total_bytes",
    "unavailable",
]

CUBINS = Path(__file__).resolve().parents[2] / "cubins"
LIBRARY = "libcuda.so.1"
# CUDA 12.0 is the first with every function below, and what a cubin of CUDA 12.9 runs on: driver 525.
MIN_VERSION = 12000
MIN_DRIVER = 525

# Arguments of each function; pointers, and handles that are pointers, as addresses. All return a CUresult.
PROTOTYPES: dict[str, tuple[Any, ...]] = {
    "cuDriverGetVersion": (c_void_p,),
    "cuInit": (c_uint,),
    "cuGetErrorName": (c_int, c_void_p),
    "cuGetErrorString": (c_int, c_void_p),
    "cuDeviceGet": (c_void_p, c_int),
    "cuDeviceGetAttribute": (c_void_p, c_int, c_int),
    "cuDevicePrimaryCtxRetain": (c_void_p, c_int),
    "cuCtxGetDevice": (c_void_p,),
    "cuCtxPushCurrent_v2": (c_void_p,),
    "cuCtxPopCurrent_v2": (c_void_p,),
    "cuThreadExchangeStreamCaptureMode": (c_void_p,),
    # library, code, JIT options, their values, number, library options, their values, number
    "cuLibraryLoadData": (c_void_p, c_void_p, c_void_p, c_void_p, c_uint, c_void_p, c_void_p, c_uint),
    "cuLibraryGetKernel": (c_void_p, c_void_p, c_char_p),
    "cuKernelSetAttribute": (c_int, c_int, c_void_p, c_int),  # attribute, value, kernel, device
    "cuKernelGetFunction": (c_void_p, c_void_p),
    "cuLaunchKernelEx": (c_void_p, c_void_p, c_void_p, c_void_p),  # config, kernel, parameters, extra
    # map, dtype, rank, address, sizes, strides, box, element strides, interleave, swizzle, L2 promotion, fill
    "cuTensorMapEncodeTiled": (c_void_p, c_int, c_uint32, *(c_void_p,) * 5, *(c_int,) * 4),
    # Virtual memory; device addresses (CUdeviceptr) and handles of physical memory are 64-bit integers.
    "cuDeviceTotalMem_v2": (c_void_p, c_int),
    "cuMemGetAllocationGranularity": (c_void_p, c_void_p, c_int),  # out, properties, minimum or recommended
    "cuMemAddressReserve": (c_void_p, c_size_t, c_size_t, c_uint64, c_uint64),  # out, size, alignment, address, flags
    "cuMemAddressFree": (c_uint64, c_size_t),
    "cuMemCreate": (c_void_p, c_size_t, c_void_p, c_uint64),  # out, size, properties, flags
    "cuMemRelease": (c_uint64,),
    "cuMemMap": (c_uint64, c_size_t, c_size_t, c_uint64, c_uint64),  # address, size, offset, handle, flags
    "cuMemSetAccess": (c_uint64, c_size_t, c_void_p, c_size_t),  # address, size, descriptors, number
    "cuMemUnmap": (c_uint64, c_size_t),
    "cuStreamIsCapturing": (c_void_p, c_void_p),
    "cuStreamSynchronize": (c_void_p,),
}

CUDA_SUCCESS = 0
CUDA_ERROR_INVALID_CONTEXT = 201
CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT = 16
CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES = 8
CU_STREAM_CAPTURE_MODE_RELAXED = 2
CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION = 4
CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION = 6
# CUlaunchConfig, 56 bytes: grid 3 x u32, block 3 x u32, shared memory u32, stream, attributes, their number u32.
LAUNCH_CONFIG = struct.Struct("@7I4xPPI4x")
# CUlaunchAttribute, 72 bytes: id u32, then at offset 8 a union of 64 bytes; three u32 are the most that is set of it.
LAUNCH_ATTRIBUTE = struct.Struct("@I4x3I52x")

TENSOR_MAP_BYTES = 128
TENSOR_MAP_ALIGNMENT = 64
TENSOR_MAP_DTYPES = {"float16": 6, "bfloat16": 9}
TENSOR_MAP_ITEMSIZE = 2
TENSOR_MAP_SWIZZLES = {0: 0, 32: 1, 64: 2, 128: 3}
TENSOR_MAP_L2_PROMOTIONS = {0: 0, 64: 1, 128: 2, 256: 3}


class DriverError(RuntimeError):
    """A call of the driver that failed; the message has the call, the CUresult in words, and what it was for.

    Attributes:
        result: the CUresult; 0 where no call failed (no driver, no such file).
    """

    def __init__(self, message: str, result: int = 0) -> None:
        super().__init__(message)
        self.result = result


class _PerThread(threading.local):
    """What a launch hands to the driver, which copies it before it returns: one set per thread, made once."""

    def __init__(self) -> None:
        self.config = ctypes.create_string_buffer(LAUNCH_CONFIG.size)
        self.config_address = ctypes.addressof(self.config)
        self.parameters = (c_void_p * 1)()  # a kernel here takes one struct by value
        self.parameters_address = ctypes.addressof(self.parameters)
        self.device = c_int()
        self.device_address = ctypes.addressof(self.device)
        self.popped = c_void_p()
        self.popped_address = ctypes.addressof(self.popped)


_thread = _PerThread()
_lock = threading.RLock()
_libraries: dict[str, int] = {}
_kernels: dict[tuple[str, str], int] = {}
_functions: dict[tuple[int, str, str, int], int] = {}
_names: dict[int, str] = {}
_shared_memory: dict[tuple[int, int], int] = {}


# What backends keep from call to call of what they found out here (tensor maps, packed parameters), by keys of theirs.
memo: dict[Any, Any] = {}


def reset() -> None:
    """Forget the library and everything that was loaded or found out through it; for tests."""
    with _lock:
        found_out = (_driver, no_driver, unavailable, attribute, capability, total_bytes, _device, _primary_context)
        for cached in (*found_out, tensor_map):
            cached.cache_clear()
        for known in (_libraries, _kernels, _functions, _names, _shared_memory, memo):
            known.clear()


# --- the library ------------------------------------------------------------------------------------------------------


def _load_library() -> Any:
    return ctypes.CDLL(LIBRARY)


@functools.cache
def _driver() -> Any:
    """libcuda with its prototypes, initialised. Raises DriverError with the reason why there is none."""
    try:
        library = _load_library()
    except OSError as error:
        raise DriverError(f"no NVIDIA driver ({LIBRARY} not found)") from error
    # Older drivers lack some of the functions: the version first.
    version = c_int()
    library.cuDriverGetVersion(ctypes.byref(version))
    if version.value < MIN_VERSION:
        have, need = (f"CUDA {number // 1000}.{number % 1000 // 10}" for number in (version.value, MIN_VERSION))
        raise DriverError(f"driver too old: it runs {have}, needs {need} (driver {MIN_DRIVER} or newer)")
    for name, arguments in PROTOTYPES.items():
        function = getattr(library, name, None)
        if function is None:
            raise DriverError(f"{LIBRARY} has no {name}")
        function.argtypes = arguments
    if result := library.cuInit(0):
        raise DriverError(f"the NVIDIA driver does not start: cuInit failed: {_describe(library, result)}")
    return library


def _describe(library: Any, result: int) -> str:
    texts = []
    for function in (library.cuGetErrorName, library.cuGetErrorString):
        text = c_char_p()
        found = function(result, ctypes.addressof(text)) == CUDA_SUCCESS
        texts.append(text.value.decode() if found and text.value else "")
    return f"{texts[0] or f'CUresult {result}'} ({texts[1] or 'no description'})"


def _check(result: int, function: str, purpose: str) -> None:
    if result != CUDA_SUCCESS:
        raise DriverError(f"{function} failed: {_describe(_driver(), result)}: {purpose}", result)


def call(name: str, *arguments: Any, purpose: str) -> None:
    """Call a function of the driver by name; `purpose` is what the error says that it was for.

    Raises: DriverError: no driver, or the call failed.
    """
    _check(getattr(_driver(), name)(*arguments), name, purpose)


def _foreign() -> str | None:
    """Why this host or this torch cannot have an NVIDIA driver, without asking for it."""
    if sys.platform != "linux":
        return f"needs Linux, this is {sys.platform}"
    if torch.version.hip is not None:
        return f"needs an NVIDIA driver, this torch is built for ROCm {torch.version.hip}"
    return None


@functools.cache
def no_driver() -> str | None:
    """Why the driver cannot be called on this host, in one line; None if it can. It starts: see `unavailable`."""
    if reason := _foreign():
        return reason
    try:
        _driver()
    except DriverError as error:
        return str(error)
    return None


@functools.cache
def unavailable() -> str | None:
    """Why no compiled kernel can run on this host, in one line; None if nothing is known against it.

    Starts the driver (cuInit), after which a forked child cannot use CUDA: ask only when a CUDA tensor is there.
    """
    if reason := _foreign():
        return reason
    if not any(CUBINS.glob("*.cubin")):
        return "kernel not built: no flash_mla/cubins/*.cubin (in a checkout: python -m flash_mla._build)"
    return no_driver()


@functools.cache
def _device(device_index: int) -> int:
    device = c_int()
    _check(_driver().cuDeviceGet(ctypes.addressof(device), device_index), "cuDeviceGet", f"device {device_index}")
    return device.value


@functools.cache
def attribute(device_index: int, which: int) -> int:
    """Attribute number `which` (CU_DEVICE_ATTRIBUTE_*) of a device."""
    value, purpose = c_int(), f"attribute {which} of device {device_index}"
    call("cuDeviceGetAttribute", ctypes.addressof(value), which, _device(device_index), purpose=purpose)
    return value.value


def num_sms(device_index: int) -> int:
    """Streaming multiprocessors of a device."""
    return attribute(device_index, CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)


@functools.cache
def capability(device_index: int) -> tuple[int, int]:
    """Compute capability of a device; torch's own function takes 5 µs to say so."""
    return torch.cuda.get_device_capability(device_index)


@functools.cache
def total_bytes(device_index: int) -> int:
    """Bytes of memory that a device has."""
    out, purpose = c_size_t(), f"memory of device {device_index}"
    call("cuDeviceTotalMem_v2", ctypes.addressof(out), _device(device_index), purpose=purpose)
    return out.value


def raw_stream(device_index: int) -> int:
    """Handle of torch's current stream on a device."""
    return torch._C._cuda_getCurrentRawStream(device_index)


@functools.cache
def _primary_context(device_index: int) -> int:
    """The context that torch works in; retained once and kept for the life of the process."""
    context = c_void_p()
    result = _driver().cuDevicePrimaryCtxRetain(ctypes.addressof(context), _device(device_index))
    _check(result, "cuDevicePrimaryCtxRetain", f"device {device_index}")
    return context.value or 0


def _needs_context(library: Any, device_index: int) -> bool:
    """Whether this thread has no current context, or one of another device.

    A context of the same device is left alone even if it is not the primary one: under a green context the stream
    belongs to that.
    """
    result = library.cuCtxGetDevice(_thread.device_address)
    if result == CUDA_SUCCESS:
        return _thread.device.value != _device(device_index)
    if result != CUDA_ERROR_INVALID_CONTEXT:
        _check(result, "cuCtxGetDevice", f"before work on device {device_index}")
    return True


@contextmanager
def _context_of(library: Any, device_index: int) -> Iterator[None]:
    """The device's primary context made current, and what was current before (nothing, too) restored."""
    purpose = f"primary context of device {device_index}"
    _check(library.cuCtxPushCurrent_v2(_primary_context(device_index)), "cuCtxPushCurrent", purpose)
    try:
        yield
    finally:
        _check(library.cuCtxPopCurrent_v2(_thread.popped_address), "cuCtxPopCurrent", purpose)


@contextmanager
def allocating(device_index: int, purpose: str) -> Iterator[None]:
    """The device's primary context made current, and calls allowed that a capture anywhere in the process forbids in
    its default mode: whatever allocates, maps or loads.
    """
    exchange = _driver().cuThreadExchangeStreamCaptureMode
    mode = c_int(CU_STREAM_CAPTURE_MODE_RELAXED)
    _check(exchange(ctypes.addressof(mode)), "cuThreadExchangeStreamCaptureMode", f"before {purpose}")
    try:
        with _context_of(_driver(), device_index):
            yield
    finally:
        _check(exchange(ctypes.addressof(mode)), "cuThreadExchangeStreamCaptureMode", f"after {purpose}")


# --- kernels ----------------------------------------------------------------------------------------------------------


def function(device_index: int, cubin: str, name: str, shared_memory: int = 0) -> int:
    """Handle (CUkernel) of kernel `name` in `cubins/<cubin>.cubin`, ready to be launched on a device.

    Args:
        device_index: as torch counts.
        cubin, name: file without ".cubin", and the kernel in it.
        shared_memory: the most dynamic shared memory that it will be launched with, bytes per CTA.
    Raises: DriverError: no driver, no such file or kernel, more shared memory than the device has.
    Call it before a graph is captured, too: what the first call loads stays loaded.
    """
    key = (device_index, cubin, name, shared_memory)
    found = _functions.get(key)
    return _prepare(key) if found is None else found


def _prepare(key: tuple[int, str, str, int]) -> int:
    device_index, cubin, name, shared_memory = key
    library = _driver()
    with _lock:
        with allocating(device_index, f"loading {cubin}.cubin"):
            kernel = _load(library, cubin, name)
            _allow_shared_memory(library, device_index, kernel, shared_memory)
            # Under lazy loading (the default) the code reaches the device here and not in the first launch.
            unused = c_void_p()
            result = library.cuKernelGetFunction(ctypes.addressof(unused), kernel)
            _check(result, "cuKernelGetFunction", f"{_names[kernel]} on device {device_index}")
        _functions[key] = kernel
        return kernel


def _load(library: Any, cubin: str, name: str) -> int:
    if (known := _kernels.get((cubin, name))) is not None:
        return known
    handle = _libraries.get(cubin)
    if handle is None:
        file = CUBINS / f"{cubin}.cubin"
        try:
            code = file.read_bytes()
        except FileNotFoundError as error:
            raise DriverError(f"kernel not built: no {file}") from error
        loaded = c_void_p()
        result = library.cuLibraryLoadData(ctypes.addressof(loaded), code, None, None, 0, None, None, 0)
        _check(result, "cuLibraryLoadData", f"{file.name}, {len(code)} bytes")
        handle = _libraries[cubin] = loaded.value or 0
    kernel = c_void_p()
    result = library.cuLibraryGetKernel(ctypes.addressof(kernel), handle, name.encode())
    _check(result, "cuLibraryGetKernel", f"kernel {name} of {cubin}.cubin")
    found = _kernels[cubin, name] = kernel.value or 0
    _names[found] = f"kernel {name} of {cubin}.cubin"
    return found


def _allow_shared_memory(library: Any, device_index: int, kernel: int, shared_memory: int) -> None:
    # One limit per kernel and device: a smaller request must not take back what an earlier, larger one was given.
    if shared_memory <= _shared_memory.get((device_index, kernel), 0):
        return
    which = CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    result = library.cuKernelSetAttribute(which, shared_memory, kernel, _device(device_index))
    _check(result, "cuKernelSetAttribute", f"{_names[kernel]}, {shared_memory} bytes of shared memory per CTA")
    _shared_memory[device_index, kernel] = shared_memory


@functools.cache
def _attributes(programmatic: bool, cluster: int) -> tuple[int, int, Any]:
    """Address and number of the launch attributes, and the buffer that holds them; never changed once made."""
    packed = []
    if programmatic:
        packed.append(LAUNCH_ATTRIBUTE.pack(CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION, 1, 0, 0))
    if cluster > 1:
        packed.append(LAUNCH_ATTRIBUTE.pack(CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION, cluster, 1, 1))
    if not packed:
        return 0, 0, None
    buffer = ctypes.create_string_buffer(b"".join(packed), len(packed) * LAUNCH_ATTRIBUTE.size)
    return ctypes.addressof(buffer), len(packed), buffer


def launch(
    device_index: int,
    function: int,
    grid: tuple[int, int, int],
    block: int,
    shared_memory: int,
    stream: int,
    params: Any,
    *,
    programmatic: bool = False,
    cluster: int = 1,
) -> None:
    """Launch a kernel that takes one struct by value.

    Args:
        device_index: device of the stream and of every address in `params`.
        function: from `function`, for that device and at least this much shared memory.
        grid: CTAs in x, y, z.
        block: threads per CTA.
        shared_memory: dynamic shared memory per CTA, bytes.
        stream: handle, see `raw_stream`.
        params: ctypes object over the struct's bytes; the driver copies them before this returns.
        programmatic: let it start before the kernel ahead of it in the stream has ended; it must then begin with
            griddepcontrol.wait before it reads what the launches ahead write, or writes.
        cluster: CTAs per cluster in x.
    Raises: DriverError: with the kernel's name and the launch.
    No host sync; capturable in a CUDA graph.
    """
    library = _driver()
    thread = _thread
    attributes, num_attributes, _ = _attributes(programmatic, cluster)
    config = (*grid, block, 1, 1, shared_memory, stream, attributes, num_attributes)
    LAUNCH_CONFIG.pack_into(thread.config, 0, *config)
    thread.parameters[0] = ctypes.addressof(params)
    if _needs_context(library, device_index):
        with _context_of(library, device_index):
            result = library.cuLaunchKernelEx(thread.config_address, function, thread.parameters_address, None)
    else:
        result = library.cuLaunchKernelEx(thread.config_address, function, thread.parameters_address, None)
    if result != CUDA_SUCCESS:
        name = _names.get(function, f"kernel {function:#x}")
        purpose = f"{name}, grid {grid}, block {block}, {shared_memory} bytes of shared memory, cluster {cluster}"
        _check(result, "cuLaunchKernelEx", f"{purpose}, device {device_index}")


class Launch:
    """A launch that is made again and again, its config written down: one call of the driver and nothing else.

    For one thread at a time, and for `launch_all`. Arguments as of `launch`.

    Attributes:
        params: the struct; to be changed before a call, which copies it.
    """

    __slots__ = ("_arguments", "_call", "_config", "_function", "_parameters", "params")

    def __init__(
        self,
        function: int,
        grid: tuple[int, int, int],
        block: int,
        shared_memory: int,
        stream: int,
        params: bytes,
        *,
        programmatic: bool = False,
    ) -> None:
        attributes, num_attributes, _ = _attributes(programmatic, 1)
        config = LAUNCH_CONFIG.pack(*grid, block, 1, 1, shared_memory, stream, attributes, num_attributes)
        self.params = ctypes.create_string_buffer(params, len(params))
        self._config = ctypes.create_string_buffer(config, len(config))
        self._parameters = (c_void_p * 1)(ctypes.addressof(self.params))
        self._function = function
        self._call = _driver().cuLaunchKernelEx
        self._arguments = (ctypes.addressof(self._config), function, ctypes.addressof(self._parameters), None)

    def __call__(self) -> None:
        """Launch. Raises: DriverError."""
        if result := self._call(*self._arguments):
            name = _names.get(self._function, f"kernel {self._function:#x}")
            _check(result, "cuLaunchKernelEx", f"{name}, config {LAUNCH_CONFIG.unpack(self._config.raw)}")


def launch_all(device_index: int, launches: Iterable[Launch]) -> None:
    """One after the other, whatever context is current in this thread. Raises: DriverError."""
    library = _driver()
    if _needs_context(library, device_index):
        with _context_of(library, device_index):
            for one in launches:
                one()
    else:
        for one in launches:
            one()


# --- tensor maps ------------------------------------------------------------------------------------------------------


def _tensor_map_faults(
    address: int,
    dtype: str,
    sizes: tuple[int, ...],
    strides_bytes: tuple[int, ...],
    box: tuple[int, ...],
    swizzle: int,
    l2_promotion: int,
) -> Iterator[str]:
    """What TMA demands and these arguments break; the driver would answer CUDA_ERROR_INVALID_VALUE to all of it."""
    if dtype not in TENSOR_MAP_DTYPES:
        yield f"dtype must be one of {[*TENSOR_MAP_DTYPES]}, got {dtype!r}"
    if not 1 <= len(sizes) <= 5 or len(strides_bytes) != len(sizes) - 1 or len(box) != len(sizes):
        yield (
            "sizes and box must have 1 to 5 dimensions and strides_bytes one less, "
            f"got {len(sizes)}, {len(box)} and {len(strides_bytes)}"
        )
    if address % 16:
        yield f"address must be a multiple of 16 bytes, got {address:#x}"
    if not all(1 <= size < 2**32 for size in sizes):
        yield f"sizes must be in 1..2**32 - 1, got {sizes}"
    if not all(0 <= stride < 2**40 and stride % 16 == 0 for stride in strides_bytes):
        yield f"strides_bytes must be multiples of 16 below 2**40, got {strides_bytes}"
    if not all(1 <= extent <= 256 for extent in box):
        yield f"box must be in 1..256, got {box}"
    if swizzle not in TENSOR_MAP_SWIZZLES:
        yield f"swizzle must be one of {[*TENSOR_MAP_SWIZZLES]} bytes, got {swizzle}"
    row = box[0] * TENSOR_MAP_ITEMSIZE if box else 0
    if row % 16 or (swizzle and row > swizzle):
        most = f" and at most the swizzle of {swizzle}" if swizzle else ""
        yield f"a row of the box must be a multiple of 16 bytes{most}, got {row}"
    if l2_promotion not in TENSOR_MAP_L2_PROMOTIONS:
        yield f"l2_promotion must be one of {[*TENSOR_MAP_L2_PROMOTIONS]} bytes, got {l2_promotion}"


# 1,024 maps of 128 bytes and their keys are about 1 MiB; a model of 61 layers with four maps each has 244.
@functools.lru_cache(maxsize=1024)
def tensor_map(
    address: int,
    dtype: str,
    sizes: tuple[int, ...],
    strides_bytes: tuple[int, ...],
    box: tuple[int, ...],
    swizzle: int,
    l2_promotion: int,
    device_index: int = 0,
) -> bytes:
    """A CUtensorMap, the 128 bytes that a TMA load takes by way of a `__grid_constant__` parameter.

    Args:
        address: of the tensor in device memory.
        dtype: "bfloat16" or "float16".
        sizes: elements in each dimension, innermost first; a box is filled with zeros beyond them.
        strides_bytes: of every dimension but the innermost, whose elements are adjacent.
        box: elements per load in each dimension.
        swizzle: 0, 32, 64 or 128 bytes.
        l2_promotion: 0, 64, 128 or 256 bytes: what a load reads into L2 at the least.
        device_index: device of the address. The driver wants a current context to encode a map, which a fresh thread
            does not have.
    Raises: ValueError: what TMA demands and the arguments break. DriverError: no driver, or it refuses.
    """
    arguments = (address, dtype, sizes, strides_bytes, box, swizzle, l2_promotion)
    if faults := list(_tensor_map_faults(*arguments)):
        raise ValueError(f"flash_mla.tensor_map: {'; '.join(faults)}")
    rank = len(sizes)
    memory = ctypes.create_string_buffer(TENSOR_MAP_BYTES + TENSOR_MAP_ALIGNMENT)
    start = -ctypes.addressof(memory) % TENSOR_MAP_ALIGNMENT
    arrays = (
        (c_uint64 * rank)(*sizes),
        (c_uint64 * rank)(*strides_bytes),  # one longer than it is read
        (c_uint32 * rank)(*box),
        (c_uint32 * rank)(*(1,) * rank),
    )
    library = _driver()
    with _context_of(library, device_index) if _needs_context(library, device_index) else nullcontext():
        result = library.cuTensorMapEncodeTiled(
            ctypes.addressof(memory) + start,
            TENSOR_MAP_DTYPES[dtype],
            rank,
            address,
            *(ctypes.addressof(array) for array in arrays),
            0,  # not interleaved
            TENSOR_MAP_SWIZZLES[swizzle],
            TENSOR_MAP_L2_PROMOTIONS[l2_promotion],
            0,  # beyond the sizes: zeros, not NaN
        )
    _check(result, "cuTensorMapEncodeTiled", f"address {address:#x}, {', '.join(map(str, arguments[1:]))}")
    return memory.raw[start : start + TENSOR_MAP_BYTES]
