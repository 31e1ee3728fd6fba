"""The compiled append: its host side launched into a recording driver that does to CPU memory what the kernel does."""

from __future__ import annotations

import ctypes
import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from device_code import assert_mirrors
from fake_cuda import PRIMARY, FakeDriver, Launch

from flash_mla.backends.cuda import driver
from flash_mla.backends.cuda.append import ADDRESSES, GEOMETRY, AppendParams, append_refusals
from flash_mla.backends.cuda.append import append as cuda_append
from flash_mla.contract import AppendCall, check_append

host = sys.modules["flash_mla.backends.cuda.append"]  # the package has the function of this name
Install = Callable[..., FakeDriver]
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])


def do_append(launch: Launch) -> None:
    """`append_rows_*` in Python, row by row. A unit at an address that it does not divide fails, as on the device."""
    p = AppendParams.from_buffer_copy(launch.params)
    unit = int(launch.kernel.removeprefix("append_rows_"))
    warps = launch.block[0] // 32
    assert launch.block == (32 * warps, 1, 1)
    assert 1 <= warps <= 8
    assert p.latent_bytes % unit == p.row_bytes % unit == 0
    rope_bytes = p.row_bytes - p.latent_bytes
    units = p.q_rows * rope_bytes // unit
    assert launch.grid == (-(-p.num_rows // warps) + -(-units // (32 * warps)), 1, 1)
    for index in range(units):
        row, byte = divmod(index * unit, rope_bytes)
        head, token, request = row % p.num_heads, row // p.num_heads % p.seqlen_q, row // p.num_heads // p.seqlen_q
        source = p.q_rope + request * p.q_rope_stride_batch + token * p.q_rope_stride_token
        source += head * p.q_rope_stride_head + byte
        target = p.q + request * p.q_stride_batch + token * p.q_stride_token + head * p.q_stride_head + byte
        assert source % unit == target % unit == 0
        ctypes.memmove(target, source, unit)
    for row in range(p.num_rows):
        head, token, request = row % p.h_kv, row // p.h_kv % p.seqlen_q, row // p.h_kv // p.seqlen_q
        slot_address = p.slots + request * p.slots_stride_batch + token * p.slots_stride_token
        block, offset = divmod(ctypes.c_int64.from_address(slot_address).value, p.block_size)
        target = p.kv_cache + block * p.kv_stride_block + offset * p.kv_stride_token + head * p.kv_stride_head
        latent = (
            p.latent + request * p.latent_stride_batch + token * p.latent_stride_token + head * p.latent_stride_head
        )
        k_rope = p.k_rope + request * p.rope_stride_batch + token * p.rope_stride_token + head * p.rope_stride_head
        assert [address % unit for address in (target, latent, k_rope)] == [0, 0, 0]
        ctypes.memmove(target, latent, p.latent_bytes)
        ctypes.memmove(target + p.latent_bytes, k_rope, p.row_bytes - p.latent_bytes)


def on_hopper(call: AppendCall, device_index: int = 0) -> AppendCall:
    return dataclasses.replace(call, device_type="cuda", device_index=device_index, capability=(9, 0))


@pytest.fixture
def fake(fake_driver: Install, monkeypatch: pytest.MonkeyPatch) -> FakeDriver:
    monkeypatch.setattr(driver, "raw_stream", lambda device_index: 0x500 + device_index)
    return fake_driver(on_launch=do_append)


def append(
    pool: torch.Tensor, latent: torch.Tensor, k_rope: torch.Tensor, slots: torch.Tensor, device_index: int = 0
) -> None:
    """Append, and compare with the rows written one by one."""
    right = pool.clone()
    for request, token_slots in enumerate(slots.tolist()):
        for token, slot in enumerate(token_slots):
            row = torch.cat((latent[request, token], k_rope[request, token]), -1)
            right[slot // pool.shape[1], slot % pool.shape[1]] = row
    call = on_hopper(check_append(pool, latent, k_rope, slots), device_index)
    assert append_refusals(call) == []
    cuda_append(call, pool, latent, k_rope, slots)
    torch.testing.assert_close(pool, right, rtol=0, atol=0, equal_nan=True)


def make(
    batch: int, seqlen_q: int, h_kv: int, rank: int, rope: int, dtype: torch.dtype, block_size: int = 64
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    num_blocks = -(-batch * seqlen_q // block_size) + 2
    pool = torch.full((num_blocks, block_size, h_kv, rank + rope), float("nan"), dtype=dtype)
    latent = torch.randn((batch, seqlen_q, h_kv, rank), generator=generator).to(dtype)
    k_rope = torch.randn((batch, seqlen_q, h_kv, rope), generator=generator).to(dtype)
    slots = torch.randperm(num_blocks * block_size, generator=generator)[: batch * seqlen_q].view(batch, seqlen_q)
    return pool, latent, k_rope, slots


@DTYPES
@pytest.mark.parametrize(
    ("batch", "seqlen_q", "h_kv", "rank", "rope", "block_size"),
    [
        pytest.param(3, 1, 1, 512, 64, 64, id="one token each, DeepSeek's shape"),
        pytest.param(2, 3, 2, 256, 32, 48, id="two latent heads"),
        pytest.param(3, 347, 1, 128, 32, 64, id="prefill: eight rows per CTA, the last one not full"),
        pytest.param(2, 2, 1, 128, 0, 16, id="no rotated columns"),
    ],
)
def test_rows_land(
    batch: int, seqlen_q: int, h_kv: int, rank: int, rope: int, block_size: int, dtype: torch.dtype, fake: FakeDriver
) -> None:
    append(*make(batch, seqlen_q, h_kv, rank, rope, dtype, block_size))
    assert len(fake.launches) == 1
    if rope:  # torch gives a tensor of no elements the strides of one column
        assert fake.launches[0].kernel == "append_rows_16"


def test_rows_of_projections_and_layers(fake: FakeDriver) -> None:
    """Tokens before requests, slots out of a wider table, one layer's pool; columns of other things in between."""
    projected = torch.randn(4, 2, 1, 176).transpose(0, 1)  # [2, 4, 1, 128 latent | 16 other | 32 key]
    layers = torch.full((3, 2, 64, 1, 160), float("nan"))
    slots = torch.randperm(128)[:24].view(2, 4, 3)[..., 1]
    append(layers[:, 1], projected[..., :128], projected[..., 144:], slots)
    assert bool(layers[:, 0].isnan().all())
    assert [launch.kernel for launch in fake.launches] == ["append_rows_16"]


@DTYPES
@pytest.mark.parametrize("what", ["pool", "latent", "k_rope", "row stride", "head stride", "kv_lora_rank"])
def test_units_are_as_wide_as_everything_allows(what: str, dtype: torch.dtype, fake: FakeDriver) -> None:
    """One element off somewhere: units of its size, whatever it is."""
    rank = 129 if what == "kv_lora_rank" else 128
    pool, latent, k_rope, slots = make(2, 2, 2, rank, 32, dtype)
    if what == "pool":
        pool = torch.full((pool.numel() + 1,), float("nan"), dtype=dtype)[1:].view(pool.shape)
    elif what == "latent":
        latent = torch.cat((latent.flatten()[:1], latent.flatten()))[1:].view(latent.shape)
    elif what == "k_rope":
        k_rope = torch.cat((k_rope.flatten()[:1], k_rope.flatten()))[1:].view(k_rope.shape)
    elif what == "row stride":
        latent = torch.nn.functional.pad(latent.flatten(2), (0, 1))[..., :-1].unflatten(2, (2, rank))
    elif what == "head stride":
        latent = torch.nn.functional.pad(latent, (0, 1))[..., :-1]
    append(pool, latent, k_rope, slots)
    assert [launch.kernel for launch in fake.launches] == [f"append_rows_{dtype.itemsize}"]


def test_units_end_where_the_latent_does(fake: FakeDriver) -> None:
    """A pool of one token walks no stride; 129 columns still end at an odd place."""
    pool, latent, k_rope, slots = make(1, 1, 1, 129, 32, torch.bfloat16)
    append(pool[:1, :1], latent, k_rope, slots * 0)
    assert [launch.kernel for launch in fake.launches] == ["append_rows_2"]


def test_strides_that_are_never_walked_do_not_count(fake: FakeDriver) -> None:
    pool, latent, k_rope, slots = make(1, 1, 1, 128, 32, torch.bfloat16)
    latent = latent.as_strided(latent.shape, (1, 3, 5, 1))
    append(pool, latent, k_rope, slots)
    assert [launch.kernel for launch in fake.launches] == ["append_rows_16"]


@DTYPES
@pytest.mark.parametrize("what", ["nothing", "q", "q_rope", "rows of q", "columns of q"])
def test_queries_are_placed_in_the_same_launch(what: str, dtype: torch.dtype, fake: FakeDriver) -> None:
    """One element off in q or its source narrows the units too; columns apart are copied by torch."""
    pool, latent, k_rope, slots = make(3, 2, 1, 128, 32, dtype)
    q = torch.full((3, 2, 5, 160), 3.0, dtype=dtype)
    q_rope = torch.randn(3, 5, 2, 32).to(dtype).transpose(1, 2)
    if what == "q":
        q = torch.full((q.numel() + 1,), 3.0, dtype=dtype)[1:].view(q.shape)
    elif what == "q_rope":
        q_rope = torch.cat((q_rope.flatten()[:1], q_rope.flatten()))[1:].view(q_rope.shape)
    elif what == "rows of q":
        q = torch.full((3, 2, 5, 161), 3.0, dtype=dtype)[..., :-1]
    elif what == "columns of q":
        q = torch.full((160, 5, 2, 3), 3.0, dtype=dtype).permute(3, 2, 1, 0)
    cuda_append(on_hopper(check_append(pool, latent, k_rope, slots, q, q_rope)), pool, latent, k_rope, slots, q, q_rope)
    assert torch.equal(q[..., 128:], q_rope)
    assert bool((q[..., :128] == 3).all())
    assert torch.equal(pool.flatten(0, 1)[slots.flatten(), 0, :128], latent.flatten(0, 2))
    unit = 16 if what in ("nothing", "columns of q") else dtype.itemsize
    assert [launch.kernel for launch in fake.launches] == [f"append_rows_{unit}"]


def test_columns_apart_are_copied_first(fake: FakeDriver) -> None:
    latent = torch.randn(128, 1, 1, 2).permute(3, 1, 2, 0)
    k_rope = torch.randn(32, 1, 1, 2).permute(3, 1, 2, 0)
    append(torch.full((2, 64, 1, 160), float("nan")), latent, k_rope, torch.tensor([[5], [64]]))
    assert len(fake.launches) == 1


def test_far_pages(fake: FakeDriver) -> None:
    """4 GiB and more into the pool: strides are 64 bits wide on the way there."""
    fake.on_launch = None
    pool, latent, k_rope, slots = make(1, 1, 1, 512, 64, torch.bfloat16)
    call = on_hopper(check_append(pool, latent, k_rope, slots))
    far = dataclasses.replace(call, kv_cache_strides=(2**33, 2**20, 2**20, 1))
    cuda_append(far, pool, latent, k_rope, slots)
    p = AppendParams.from_buffer_copy(fake.launches[0].params)
    assert (p.kv_stride_block, p.kv_stride_token) == (2**34, 2**21)


def test_the_launch_goes_to_the_device_and_its_stream(fake: FakeDriver) -> None:
    fake.contexts.append(PRIMARY)
    append(*make(2, 1, 1, 512, 64, torch.bfloat16), device_index=1)
    (launch,) = fake.launches
    assert (launch.context, launch.stream) == (PRIMARY + 1, 0x501)
    # Not programmatic: the kernel does not wait for the one before it by itself.
    assert (launch.attributes, launch.shared_memory) == ({}, 0)
    assert fake.contexts == [PRIMARY]


def test_few_rows_go_to_as_many_ctas(fake: FakeDriver) -> None:
    append(*make(64, 1, 1, 128, 32, torch.bfloat16))
    append(*make(1, 1025, 1, 128, 32, torch.bfloat16))
    assert [(launch.grid[0], launch.block[0]) for launch in fake.launches] == [(64, 32), (129, 256)]


@pytest.mark.parametrize(("batch", "seqlen_q"), [(0, 1), (2, 0)])
def test_nothing_to_append(batch: int, seqlen_q: int, fake: FakeDriver) -> None:
    append(*make(batch, seqlen_q, 1, 128, 32, torch.bfloat16))
    assert fake.launches == []


def test_params_are_those_of_the_device_code(tmp_path: Path) -> None:
    assert_mirrors(
        tmp_path,
        "append.cu",
        "AppendParams",
        {name: getattr(AppendParams, name).offset for name, _ in AppendParams._fields_},
        ctypes.sizeof(AppendParams),
    )


def test_params_are_packed_whole(fake: FakeDriver) -> None:
    size = ctypes.sizeof(AppendParams)
    assert ADDRESSES.size + GEOMETRY.size == size
    driver.function(0, "append", "append_rows_16")
    assert set(fake.libraries[0].values()) == {size}


@pytest.mark.parametrize(
    ("changes", "reasons"),
    [
        ({}, []),
        ({"device_type": "cpu"}, ["needs a CUDA device, got cpu"]),
        ({"capability": (8, 0)}, ["needs compute capability 9.0 (Hopper), have 8.0"]),
        ({"capability": (10, 0)}, ["needs compute capability 9.0 (Hopper), have 10.0"]),
        ({"kv_cache_strides": (1, 2, 3, 4)}, ["needs the last stride of kv_cache to be 1, got 4"]),
        ({"num_blocks": 2**26}, [f"takes a pool of fewer than 2**32 tokens, got {2**26} x 64"]),
        ({"num_blocks": 2**26 - 1}, []),
        ({"batch": 2**16, "seqlen_q": 2**15}, ["takes fewer than 2**31 rows, got 65536 x 32768 x 1"]),
    ],
)
def test_refusals(changes: dict[str, object], reasons: list[str], fake: FakeDriver) -> None:
    call = on_hopper(check_append(*make(1, 1, 1, 128, 32, torch.bfloat16)))
    assert append_refusals(dataclasses.replace(call, **changes)) == reasons


def make_fp8() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    _, latent, k_rope, slots = make(2, 2, 2, 256, 32, torch.bfloat16)
    return torch.zeros((3, 64, 2, 336), dtype=torch.uint8), latent, k_rope, slots


@pytest.mark.parametrize(
    ("changes", "reasons"),
    [
        ({}, []),
        ({"dtype": "float16"}, []),
        ({"dtype": "float32"}, []),
        ({"dtype": "float64"}, ["encodes FP8 rows from bfloat16, float16 or float32, got float64"]),
        ({"qk_rope_head_dim": 31}, ["writes FP8 rows of an even qk_rope_head_dim, got 31"]),
        ({"capability": (8, 0)}, ["needs compute capability 9.0 (Hopper), have 8.0"]),
        ({"num_blocks": 2**26}, [f"takes a pool of fewer than 2**32 tokens, got {2**26} x 64"]),
    ],
)
def test_refusals_of_fp8_rows(changes: dict[str, object], reasons: list[str], fake: FakeDriver) -> None:
    call = on_hopper(check_append(*make_fp8()))
    assert append_refusals(dataclasses.replace(call, **changes)) == reasons


@pytest.mark.parametrize("off", ["pool", "block", "token", "head"])
def test_fp8_rows_begin_at_multiples_of_16_bytes(off: str, fake: FakeDriver) -> None:
    pool, latent, k_rope, slots = make_fp8()
    if off == "pool":
        pool = torch.zeros((pool.numel() + 8,), dtype=torch.uint8)[8:].view(pool.shape)
    else:
        strides = list(pool.stride())
        at = ("block", "token", "head").index(off)
        strides[at] += 8
        pool = torch.zeros(2 * pool.numel(), dtype=torch.uint8).as_strided(pool.shape, strides)
    (reason,) = append_refusals(on_hopper(check_append(pool, latent, k_rope, slots)))
    bytes_past = 8 if off == "pool" else 0
    assert reason == (
        f"needs FP8 rows that begin at multiples of 16 bytes, got strides {pool.stride()} "
        f"and a pool {bytes_past} bytes past one"
    )


def test_a_cpu_tensor_does_not_wake_the_driver(fake: FakeDriver) -> None:
    """After cuInit a forked child, a data loader's worker for one, cannot use CUDA."""
    append_refusals(check_append(*make(1, 1, 1, 128, 32, torch.bfloat16)))
    assert fake.calls == []


def test_the_reason_of_the_host_is_the_refusal(fake_driver: Install) -> None:
    fake_driver(version=11080)
    call = on_hopper(check_append(*make(1, 1, 1, 128, 32, torch.bfloat16)))
    assert append_refusals(call) == [driver.unavailable()]
