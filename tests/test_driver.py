"""The host side of compiled kernels against a driver that records: what is loaded, where, and how it is launched."""

from __future__ import annotations

import ctypes
import struct
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from fake_cuda import INVALID_VALUE, NUM_SMS, PRIMARY, FakeDriver

from flash_mla.backends.cuda import driver

Install = Callable[..., FakeDriver]

MIB = 2**20
GREEN = 0xD000  # + device: a context of the device that is not its primary one


def params(size: int = 216) -> ctypes.Array[ctypes.c_char]:
    return ctypes.create_string_buffer(bytes(index % 251 for index in range(size)), size)


def launch(**changes: object) -> None:
    arguments = {"grid": (7, 2, 1), "block": 128, "shared_memory": 0, "stream": 0x57, "params": params()} | changes
    device_index = arguments.pop("device_index", 0)
    kernel = driver.function(device_index, "append", "append_rows_16", 232448)
    driver.launch(device_index, kernel, **arguments)


# --- whether it can run -----------------------------------------------------------------------------------------------


def test_importing_the_driver_loads_no_library() -> None:
    code = (
        "import ctypes, torch, flash_mla\n"
        "def refuse(*_): raise AssertionError('loaded')\n"
        "ctypes.CDLL = refuse\n"
        "import flash_mla.backends.cuda.append\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_nothing_against_it(fake_driver: Install) -> None:
    fake_driver()
    assert driver.unavailable() is None


def test_no_driver(fake_driver: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_driver()

    def missing() -> None:
        raise OSError("libcuda.so.1: cannot open shared object file")

    monkeypatch.setattr(driver, "_load_library", missing)
    assert driver.unavailable() == "no NVIDIA driver (libcuda.so.1 not found)"
    with pytest.raises(driver.DriverError, match="no NVIDIA driver"):
        driver.function(0, "append", "append_rows_16")


def test_old_driver_is_not_asked_for_what_it_lacks(fake_driver: Install) -> None:
    fake = fake_driver(version=11080, missing={"cuLibraryLoadData"})
    assert driver.unavailable() == "driver too old: it runs CUDA 11.8, needs CUDA 12.0 (driver 525 or newer)"
    assert [name for name, _ in fake.calls] == ["cuDriverGetVersion"]


def test_driver_without_a_function(fake_driver: Install) -> None:
    fake_driver(missing={"cuLaunchKernelEx"})
    assert driver.unavailable() == "libcuda.so.1 has no cuLaunchKernelEx"


def test_driver_that_does_not_start(fake_driver: Install) -> None:
    fake_driver(failing={"cuInit": 100})
    words = "cuInit failed: CUDA_ERROR_NO_DEVICE (no CUDA-capable device is detected)"
    assert driver.unavailable() == f"the NVIDIA driver does not start: {words}"


def test_error_that_the_driver_has_no_words_for(fake_driver: Install) -> None:
    fake_driver(failing={"cuInit": 987})
    assert "cuInit failed: CUresult 987 (no description)" in str(driver.unavailable())


def test_kernel_not_built(fake_driver: Install, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake = fake_driver()
    monkeypatch.setattr(driver, "CUBINS", tmp_path / "none")
    assert str(driver.unavailable()).startswith("kernel not built: ")
    assert not fake.calls  # nothing to run: the driver is left alone


def test_rocm(fake_driver: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_driver()
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert driver.unavailable() == "needs an NVIDIA driver, this torch is built for ROCm 6.4"


def test_other_system(fake_driver: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_driver()
    monkeypatch.setattr(driver.sys, "platform", "darwin")
    assert driver.unavailable() == "needs Linux, this is darwin"


def test_num_sms(fake_driver: Install) -> None:
    fake = fake_driver()
    assert [driver.num_sms(1), driver.num_sms(1)] == [NUM_SMS, NUM_SMS]
    assert [arguments[1:] for arguments in fake.called("cuDeviceGetAttribute")] == [(16, 1)]


def test_raw_stream_is_that_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    # A CPU build of torch has no such function.
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 0x700 + index, raising=False)
    assert driver.raw_stream(3) == 0x703


# --- kernels ----------------------------------------------------------------------------------------------------------


def test_a_kernel_is_loaded_once_and_readied_per_device(fake_driver: Install) -> None:
    fake = fake_driver()
    first = driver.function(0, "append", "append_rows_16", 65536)
    assert driver.function(1, "append", "append_rows_16", 65536) == first
    other = driver.function(1, "append", "append_rows_8")
    assert len(fake.called("cuLibraryLoadData")) == 1
    # attribute, bytes, kernel, device; a kernel without dynamic shared memory needs no limit
    assert fake.called("cuKernelSetAttribute") == [(8, 65536, first, 0), (8, 65536, first, 1)]
    assert other != first
    # The code is brought to each device here, in its own context, and nothing stays current.
    assert fake.called("cuCtxPushCurrent_v2") == [(PRIMARY,), (PRIMARY + 1,), (PRIMARY + 1,)]
    assert len(fake.called("cuKernelGetFunction")) == 3
    assert fake.contexts == []


def test_a_warm_call_does_not_reach_the_driver(fake_driver: Install) -> None:
    fake = fake_driver()
    first = driver.function(0, "append", "append_rows_16", 1024)
    before = len(fake.calls)
    assert driver.function(0, "append", "append_rows_16", 1024) == first
    assert len(fake.calls) == before


def test_less_shared_memory_takes_nothing_back(fake_driver: Install) -> None:
    fake = fake_driver()
    for shared_memory in (65536, 1024, 0, 131072):
        driver.function(0, "append", "append_rows_16", shared_memory)
    assert [arguments[1] for arguments in fake.called("cuKernelSetAttribute")] == [65536, 131072]


def test_loading_is_allowed_during_a_capture_and_only_loading(fake_driver: Install) -> None:
    fake = fake_driver()
    during = []
    get_kernel = fake._cuLibraryGetKernel
    fake._cuLibraryGetKernel = lambda *a: during.append(fake.thread.capture_mode) or get_kernel(*a)  # type: ignore
    fake.__post_init__()
    fake.initialised = True
    fake.thread.capture_mode = 0  # CU_STREAM_CAPTURE_MODE_GLOBAL, torch's default
    driver.function(0, "append", "append_rows_16")
    assert during == [2]  # CU_STREAM_CAPTURE_MODE_RELAXED
    assert fake.thread.capture_mode == 0
    with pytest.raises(driver.DriverError):
        driver.function(0, "append", "no_such_kernel")
    assert fake.thread.capture_mode == 0
    assert fake.contexts == []


def test_threads_load_once(fake_driver: Install) -> None:
    fake = fake_driver()
    found, start = [], threading.Barrier(8)

    def work() -> None:
        start.wait()
        found.append(driver.function(0, "append", "append_rows_16", 1024))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 1
    assert len(found) == 8
    assert len(fake.called("cuLibraryLoadData")) == len(fake.called("cuKernelSetAttribute")) == 1


def test_kernel_errors_name_what_was_asked_for(fake_driver: Install) -> None:
    fake_driver()
    with pytest.raises(driver.DriverError) as error:
        driver.function(0, "append", "append_rows_3")
    words = "cuLibraryGetKernel failed: CUDA_ERROR_NOT_FOUND (named symbol not found): "
    assert str(error.value) == words + "kernel append_rows_3 of append.cubin"
    with pytest.raises(driver.DriverError, match=r"kernel not built: no .*nothing\.cubin"):
        driver.function(0, "nothing", "append_rows_16")
    with pytest.raises(driver.DriverError, match=r"append_rows_16 of append\.cubin, 232449 bytes of shared memory"):
        driver.function(0, "append", "append_rows_16", 232449)


# --- launches ---------------------------------------------------------------------------------------------------------


def test_launch_passes_everything_on(fake_driver: Install) -> None:
    fake = fake_driver()
    launch(grid=(70000, 2, 3), block=256, shared_memory=232448, stream=0xFEED_F00D_BEEF)
    (seen,) = fake.launches
    assert seen.kernel == "append_rows_16"
    assert (seen.grid, seen.block) == ((70000, 2, 3), (256, 1, 1))
    assert (seen.shared_memory, seen.stream) == (232448, 0xFEED_F00D_BEEF)
    assert seen.params == params().raw
    assert seen.attributes == {}


@pytest.mark.parametrize(
    ("programmatic", "cluster", "attributes"),
    [
        (False, 1, {}),
        (True, 1, {6: (1, 0, 0)}),  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        (False, 2, {4: (2, 1, 1)}),  # CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
        (True, 4, {6: (1, 0, 0), 4: (4, 1, 1)}),
    ],
)
def test_launch_attributes(
    programmatic: bool, cluster: int, attributes: dict[int, tuple[int, ...]], fake_driver: Install
) -> None:
    fake = fake_driver()
    for _ in range(2):
        launch(programmatic=programmatic, cluster=cluster)
        launch()  # which must not inherit them
    assert [seen.attributes for seen in fake.launches] == [attributes, {}] * 2


def test_launch_in_a_thread_without_a_context(fake_driver: Install) -> None:
    fake = fake_driver()
    driver.function(1, "append", "append_rows_16", 232448)
    after = []

    def work() -> None:
        launch(device_index=1)
        after.append(list(fake.contexts))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert [seen.context for seen in fake.launches] == [PRIMARY + 1]
    assert after == [[]]


def test_launch_beside_a_context_of_another_device(fake_driver: Install) -> None:
    fake = fake_driver()
    driver.function(1, "append", "append_rows_16", 232448)
    fake.contexts.append(PRIMARY)
    launch(device_index=1)
    launch(device_index=0)
    assert [seen.context for seen in fake.launches] == [PRIMARY + 1, PRIMARY]
    assert fake.contexts == [PRIMARY]


def test_launch_leaves_a_context_of_its_device_alone(fake_driver: Install) -> None:
    """A green context is not the primary one, and its streams are not the primary one's."""
    fake = fake_driver()
    fake.contexts.append(GREEN + 1)
    launch(device_index=1)
    before = len(fake.calls)
    launch(device_index=1)
    assert [name for name, _ in fake.calls[before:]] == ["cuCtxGetDevice", "cuLaunchKernelEx"]
    assert [seen.context for seen in fake.launches] == [GREEN + 1] * 2
    assert fake.contexts == [GREEN + 1]


def test_launch_error_has_the_kernel_and_the_launch(fake_driver: Install) -> None:
    fake = fake_driver(failing={"cuLaunchKernelEx": INVALID_VALUE})
    with pytest.raises(driver.DriverError) as error:
        launch(shared_memory=99, cluster=3)
    assert str(error.value) == (
        "cuLaunchKernelEx failed: CUDA_ERROR_INVALID_VALUE (invalid argument): kernel append_rows_16 of append.cubin, "
        "grid (7, 2, 1), block 128, 99 bytes of shared memory, cluster 3, device 0"
    )
    assert fake.contexts == []  # restored in spite of it


def test_threads_do_not_share_what_they_launch_with(fake_driver: Install) -> None:
    fake = fake_driver()
    driver.function(0, "append", "append_rows_16", 232448)
    start = threading.Barrier(4)

    def work(number: int) -> None:
        fake.contexts.append(PRIMARY)
        start.wait()
        for _ in range(200):
            mine = ctypes.create_string_buffer(struct.pack("54I", *[number] * 54), 216)
            launch(grid=(number, 1, 1), stream=number, params=mine)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(fake.launches) == 800
    for seen in fake.launches:
        assert set(struct.unpack("54I", seen.params)) == {seen.stream} == {seen.grid[0]}


# --- tensor maps ------------------------------------------------------------------------------------------------------

PAGES = ((64, 64, 8), (1152, 73728), (64, 64, 1))


def test_tensor_map_arguments(fake_driver: Install) -> None:
    fake = fake_driver()
    seen = []
    encode = fake._cuTensorMapEncodeTiled

    def look(*arguments: int) -> None:
        rank = arguments[2]
        sizes, strides = (list((ctypes.c_uint64 * rank).from_address(arguments[i])) for i in (4, 5))
        box, steps = (list((ctypes.c_uint32 * rank).from_address(arguments[i])) for i in (6, 7))
        seen.append((*arguments[1:4], sizes, strides[: rank - 1], box, steps, *arguments[8:]))
        encode(*arguments)

    fake._cuTensorMapEncodeTiled = look  # type: ignore[method-assign]
    fake.__post_init__()
    sizes, strides, box = PAGES
    one = driver.tensor_map(0x7F00_0000_0010, "bfloat16", sizes, strides, box, 128, 256)
    two = driver.tensor_map(64 * MIB, "float16", (2**32 - 1,), (), (256,), 0, 0)
    assert seen == [
        (9, 3, 0x7F00_0000_0010, [64, 64, 8], [1152, 73728], [64, 64, 1], [1, 1, 1], 0, 3, 3, 0),
        (6, 1, 64 * MIB, [2**32 - 1], [], [256], [1], 0, 0, 0, 0),
    ]
    assert (one, two) == (b"\1" * 128, b"\2" * 128)


def test_tensor_map_is_made_once(fake_driver: Install) -> None:
    fake = fake_driver()
    assert driver.tensor_map(4096, "bfloat16", *PAGES, 128, 256) is driver.tensor_map(
        4096, "bfloat16", *PAGES, 128, 256
    )
    for address in range(0, 16 * 2000, 16):
        driver.tensor_map(address, "bfloat16", *PAGES, 128, 256)
    assert len(fake.called("cuTensorMapEncodeTiled")) == 2000  # 4096 was among them
    assert driver.tensor_map.cache_info().currsize <= 1024


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"address": 4104}, "address must be a multiple of 16 bytes, got 0x1008"),
        ({"dtype": "float32"}, "dtype must be one of ['float16', 'bfloat16'], got 'float32'"),
        ({"sizes": (64, 64, 2**32)}, f"sizes must be in 1..2**32 - 1, got (64, 64, {2**32})"),
        ({"sizes": (64, 64, 0)}, "sizes must be in 1..2**32 - 1, got (64, 64, 0)"),
        ({"strides_bytes": (1160, 73728)}, "multiples of 16 below 2**40, got (1160, 73728)"),
        ({"strides_bytes": (1152, 2**40)}, f"multiples of 16 below 2**40, got (1152, {2**40})"),
        ({"strides_bytes": (1152,)}, "strides_bytes one less, got 3, 3 and 1"),
        ({"box": (64, 257, 1)}, "box must be in 1..256, got (64, 257, 1)"),
        ({"box": (60, 64, 1)}, "multiple of 16 bytes and at most the swizzle of 128, got 120"),
        ({"swizzle": 64}, "multiple of 16 bytes and at most the swizzle of 64, got 128"),
        ({"swizzle": 256}, "swizzle must be one of [0, 32, 64, 128] bytes, got 256"),
        ({"l2_promotion": 32}, "l2_promotion must be one of [0, 64, 128, 256] bytes, got 32"),
    ],
)
def test_tensor_map_refuses(changes: dict[str, object], words: str, fake_driver: Install) -> None:
    fake = fake_driver()
    right = {"address": 4096, "dtype": "bfloat16", "sizes": PAGES[0], "strides_bytes": PAGES[1], "box": PAGES[2]}
    right |= {"swizzle": 128, "l2_promotion": 256}
    driver.tensor_map(**right)
    with pytest.raises(ValueError, match=r"^flash_mla\.tensor_map: ") as error:
        driver.tensor_map(**right | changes)
    assert words in str(error.value)
    assert len(fake.called("cuTensorMapEncodeTiled")) == 1


def test_tensor_map_error_has_the_numbers(fake_driver: Install) -> None:
    fake_driver(failing={"cuTensorMapEncodeTiled": INVALID_VALUE})
    with pytest.raises(driver.DriverError, match=r"invalid argument\): address 0x1000, bfloat16, \(64, 64, 8\), "):
        driver.tensor_map(4096, "bfloat16", *PAGES, 128, 256)
