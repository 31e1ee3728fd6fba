"""Where new tokens go: the definition by example, and the compiled kernel's own source against it."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from cases import DEVICE

from flash_mla import ops
from flash_mla.backends import cuda as cuda_backend
from flash_mla.backends import torch as torch_backend
from flash_mla.backends.cuda import driver
from flash_mla.backends.cuda.slots import PARAMS

SOURCE = Path(__file__).parents[1] / "kernels" / "slots.cu"


def int32(values: list) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def next_slots(*arguments: object) -> tuple[list, list]:
    slots, lengths = torch_backend.next_slots(*arguments)
    assert (slots.dtype, lengths.dtype) == (torch.int64, torch.int32)
    return slots.tolist(), lengths.tolist()


def test_tokens_follow_those_that_are_there() -> None:
    table = int32([[3, 7], [5, 0]])
    assert next_slots(table, int32([15, 0]), 2, 16) == ([[3 * 16 + 15, 7 * 16], [5 * 16, 5 * 16 + 1]], [17, 2])


def test_padding_takes_no_place() -> None:
    valid = torch.tensor([[False, True, True], [True, False, True]], device=DEVICE)
    slots, lengths = next_slots(int32([[3, 7], [5, 0]]), int32([15, 0]), 3, 16, valid)
    assert slots == [[0, 3 * 16 + 15, 7 * 16], [5 * 16, 0, 5 * 16 + 1]]
    assert lengths == [17, 2]


def test_what_comes_past_the_capacity_is_not_stored() -> None:
    table = int32([[3, 7]])
    assert next_slots(table, int32([15]), 3, 16, None, 17) == ([[3 * 16 + 15, 7 * 16, 0]], [17])
    valid = torch.tensor([[True, False, True, True]], device=DEVICE)
    assert next_slots(table, int32([15]), 4, 16, valid, 17) == ([[3 * 16 + 15, 0, 7 * 16, 0]], [17])


def random_call(seed: int) -> tuple[object, ...]:
    generator = torch.Generator().manual_seed(seed)

    def number(least: int, most: int) -> int:
        return int(torch.randint(least, most + 1, (), generator=generator))

    batch, seqlen_q, block_size = number(1, 5), number(1, 90), 16 * number(1, 4)
    lengths = torch.randint(0, 200, (batch,), generator=generator, dtype=torch.int32)
    width = -(-(200 + seqlen_q) // block_size)
    table = torch.randint(1, 10**6, (batch, width + 3), generator=generator, dtype=torch.int32)[:, :width]
    valid = None if seed % 3 == 0 else torch.rand((seqlen_q, batch), generator=generator).mT < 0.7
    capacity = None if seed % 2 else number(1, 250)
    strided = torch.stack((lengths, lengths + 1), dim=1)[:, 0]
    return table, strided, seqlen_q, block_size, valid, capacity


HOST_MAIN = """
extern "C" void run(const SlotsParams* params, int blocks) { launch_on_host(next_slots, *params, blocks, 32); }
"""


@pytest.fixture(scope="module")
def source_on_host(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """kernels/slots.cu as a host library."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++")
    folder = tmp_path_factory.mktemp("slots")
    (folder / "slots.cpp").write_text(f'#include "block_on_host.h"\n{SOURCE.read_text()}{HOST_MAIN}')
    command = [compiler, "-std=c++17", "-O1", "-pthread", "-shared", "-fPIC", f"-I{Path(__file__).parent}"]
    subprocess.run([*command, "-o", str(folder / "slots.so"), str(folder / "slots.cpp")], check=True)
    return ctypes.CDLL(str(folder / "slots.so"))


@pytest.mark.parametrize("seed", range(24))
def test_the_kernels_source_on_the_host(
    seed: int, source_on_host: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Launch:
        """In place of `driver.Launch`."""

        def __init__(
            self, name: str, grid: tuple[int, int, int], threads: int, shared: int, stream: int, params: bytes
        ) -> None:
            assert (name, grid[1:], threads, shared, stream) == ("next_slots", (1, 1), 32, 0, 7)
            self.params, self.blocks = ctypes.create_string_buffer(params, len(params)), grid[0]

        def __call__(self) -> None:
            source_on_host.run(self.params, self.blocks)

    monkeypatch.setattr(driver, "function", lambda device_index, cubin, name: name)
    monkeypatch.setattr(driver, "raw_stream", lambda device_index: 7)
    monkeypatch.setattr(driver, "Launch", Launch)
    monkeypatch.setattr(driver, "launch_all", lambda device_index, launches: [launch() for launch in launches])
    monkeypatch.setattr(driver, "memo", {})
    call = random_call(seed)
    table, lengths, *rest = call
    for again in range(3):  # a launch that is kept, over other addresses
        if again:
            copies = table._base.clone(), lengths._base.clone() + again  # both are parts of wider tensors
            call = (copies[0][:, : table.shape[1]], copies[1][:, 0], *rest)
        for ours, definition in zip(cuda_backend.next_slots(*call), torch_backend.next_slots(*call), strict=True):
            assert ours.dtype == definition.dtype
            assert torch.equal(ours, definition)
    assert len(driver.memo) == 1


def test_params_are_those_of_the_device_code() -> None:
    assert f"static_assert(sizeof(SlotsParams) == {PARAMS.size});" in SOURCE.read_text()


def test_no_requests_need_no_launch() -> None:
    empty = torch.empty((0, 1), dtype=torch.int32)
    slots, lengths = cuda_backend.next_slots(empty, empty[:, 0], 4, 64)
    assert (slots.shape, lengths.shape) == ((0, 4), (0,))


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU: the compiled kernel")
@pytest.mark.parametrize("seed", range(24))
def test_on_the_device(seed: int) -> None:
    call = [value.to(DEVICE) if isinstance(value, torch.Tensor) else value for value in random_call(seed)]
    for ours, definition in zip(ops.next_slots(*call), torch_backend.next_slots(*call), strict=True):
        assert torch.equal(ours, definition)
