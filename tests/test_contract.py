"""What is refused, and in which words: wrong calls with this call's numbers, right ones with each backend's reasons."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch
from cases import BACKENDS, DEVICE, Case, make

import flash_mla
from flash_mla import ops
from flash_mla.backends import torch as torch_backend
from flash_mla.backends import triton as triton_backend
from flash_mla.contract import LATENT_SHAPES, AppendCall, DecodeCall, check_append, check_decode

DTYPE = torch.float16
OPTIONS = {"kv_lora_rank": 128, "softmax_scale": 0.1}


def decode_arguments() -> dict[str, object]:
    names = ("q", "kv_cache", "block_table", "cache_seqlens")
    return dict(zip(names, make(Case("valid", (65, 3)), DTYPE).arguments(), strict=True))


def append_arguments() -> dict[str, object]:
    return {
        "kv_cache": torch.zeros((2, 64, 1, 160), dtype=DTYPE, device=DEVICE),
        "latent": torch.zeros((2, 1, 1, 128), dtype=DTYPE, device=DEVICE),
        "k_rope": torch.zeros((2, 1, 1, 32), dtype=DTYPE, device=DEVICE),
        "slots": torch.tensor([[3], [64]], device=DEVICE),
    }


def zeros(*shape: int, dtype: torch.dtype = DTYPE, device: str = DEVICE) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype, device=device)


AT = re.escape(str(torch.empty(0, device=DEVICE).device))
WRONG_DECODE = {
    "kv_cache of rank 3": ({"kv_cache": zeros(2, 64, 160)}, r"kv_cache must be \[num_blocks.*got.*\(2, 64, 160\)"),
    "kv_cache no tensor": ({"kv_cache": "pool"}, r"kv_cache must be .* got str"),
    "kv_cache with no columns": ({"kv_cache": zeros(2, 64, 1, 0)}, r"kv_cache must be .*\(2, 64, 1, 0\)"),
    "kv_cache of integers": (
        {"kv_cache": zeros(2, 64, 1, 160, dtype=torch.int32)},
        r"kv_cache must be bfloat16.*int32",
    ),
    "FP8 rows of another width": (
        {"kv_cache": zeros(2, 64, 1, 160, dtype=torch.uint8)},
        r"kv_cache must be of FP8 rows of 208 bytes for \(128, 32\) columns, got torch\.uint8 \(2, 64, 1, 160\)",
    ),
    "FP8 rows of a latent that 128 does not divide": (
        {"kv_cache": zeros(2, 64, 1, 208, dtype=torch.uint8), "kv_lora_rank": 96},
        r"an FP8 cache needs a kv_lora_rank that 128 divides, got 96",
    ),
    "integers on FP8 rows": (
        {"kv_cache": zeros(2, 64, 1, 208, dtype=torch.uint8), "q": zeros(2, 1, 4, 160, dtype=torch.int32)},
        r"q must be bfloat16, float16, float32 or float64 on .* like kv_cache, got torch\.int32",
    ),
    "q of another width": ({"q": zeros(2, 1, 4, 161)}, r"q must be \[batch.*d_qk=160\], got.*\(2, 1, 4, 161\)"),
    "q with no queries": ({"q": zeros(2, 0, 4, 160)}, r"q must be .*seqlen_q >= 1.*\(2, 0, 4, 160\)"),
    "q of rank 3": ({"q": zeros(2, 4, 160)}, r"q must be .*\(2, 4, 160\)"),
    "q of another dtype": (
        {"q": zeros(2, 1, 4, 160, dtype=torch.float32)},
        r"q must be torch\.float16.*torch\.float32",
    ),
    "q on another device": ({"q": zeros(2, 1, 4, 160, device="meta")}, rf"q must be torch\.float16 on {AT}.*on meta"),
    "heads that h_kv does not divide": (
        {"kv_cache": zeros(2, 64, 3, 160)},
        r"q must be of a number of heads that h_kv=3 divides, got.*\(2, 1, 4, 160\)",
    ),
    "no heads": ({"q": zeros(2, 1, 0, 160)}, r"q must be of a number of heads.*\(2, 1, 0, 160\)"),
    "rank wider than the row": ({"kv_lora_rank": 161}, r"kv_lora_rank must be in 1\.\.d_qk=160, got 161"),
    "rank zero": ({"kv_lora_rank": 0}, r"kv_lora_rank must be in 1\.\.d_qk=160, got 0"),
    "rank no integer": ({"kv_lora_rank": 128.0}, r"kv_lora_rank must be .*got 128\.0"),
    "table of int64": (
        {"block_table": zeros(2, 4, dtype=torch.int64)},
        r"block_table must be int32 \[batch=2, max_blocks\].*torch\.int64 \(2, 4\)",
    ),
    "table of another batch": ({"block_table": zeros(3, 4, dtype=torch.int32)}, r"block_table must be .*\(3, 4\)"),
    "table of rank 1": ({"block_table": zeros(2, dtype=torch.int32)}, r"block_table must be .*\(2,\)"),
    "table elsewhere": ({"block_table": zeros(2, 4, dtype=torch.int32, device="meta")}, r"block_table must be .*meta"),
    "lengths of int64": (
        {"cache_seqlens": zeros(2, dtype=torch.int64)},
        r"cache_seqlens must be int32 \[batch=2\].*torch\.int64 \(2,\)",
    ),
    "lengths of another batch": ({"cache_seqlens": zeros(3, dtype=torch.int32)}, r"cache_seqlens must be .*\(3,\)"),
    "lengths as a list": ({"cache_seqlens": [1, 2]}, r"cache_seqlens must be .*got list"),
}
WRONG_APPEND = {
    "kv_cache of rank 3": ({"kv_cache": zeros(2, 64, 160)}, r"kv_cache must be .*\(2, 64, 160\)"),
    "latent of two latent heads": (
        {"latent": zeros(2, 1, 2, 128)},
        r"latent must be \[batch, seqlen_q, h_kv=1, kv_lora_rank\], got.*\(2, 1, 2, 128\)",
    ),
    "key too wide": ({"k_rope": zeros(2, 1, 1, 33)}, r"k_rope must be \[batch=2.*d_qk - kv_lora_rank = 32\].*33\)"),
    "key of another batch": ({"k_rope": zeros(3, 1, 1, 32)}, r"k_rope must be .*\(3, 1, 1, 32\)"),
    "latent of another dtype": (
        {"latent": zeros(2, 1, 1, 128, dtype=torch.float32)},
        r"latent must be torch\.float16.*like kv_cache, got torch\.float32",
    ),
    "slots of int32": (
        {"slots": zeros(2, 1, dtype=torch.int32)},
        r"slots must be int64 \[batch=2, seqlen_q=1\].*int32",
    ),
    "slots of rank 1": ({"slots": zeros(2, dtype=torch.int64)}, r"slots must be .*\(2,\)"),
    "q without its rotated columns": ({"q": zeros(2, 1, 4, 160)}, r"q_rope must be .*\[2, 1, 4\], 32\] with q.*None"),
    "rotated columns without q": ({"q_rope": zeros(2, 1, 4, 32)}, r"q must be .*d_qk=160\] with q_rope, got NoneType"),
    "q of another batch": (
        {"q": zeros(3, 1, 4, 160), "q_rope": zeros(3, 1, 4, 32)},
        r"q must be \[batch=2, seqlen_q=1.*\(3, 1, 4, 160\)",
    ),
    "q_rope of other heads": (
        {"q": zeros(2, 1, 4, 160), "q_rope": zeros(2, 1, 5, 32)},
        r"q_rope must be .*\(2, 1, 5, 32\)",
    ),
    "q of another dtype": (
        {"q": zeros(2, 1, 4, 160, dtype=torch.float32), "q_rope": zeros(2, 1, 4, 32)},
        r"q must be torch\.float16.*like latent, got torch\.float32",
    ),
}


@pytest.mark.parametrize(("change", "message"), WRONG_DECODE.values(), ids=WRONG_DECODE.keys())
def test_wrong_decode(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=r"flash_mla\.decode: " + message):
        flash_mla.decode(**{**decode_arguments(), **OPTIONS, **change})


def test_wrong_plan_splits_says_its_own_name() -> None:
    with pytest.raises(ValueError, match=r"flash_mla\.plan_splits: cache_seqlens must be int32"):
        flash_mla.plan_splits(**{**decode_arguments(), "cache_seqlens": None}, kv_lora_rank=128)


@pytest.mark.parametrize(("change", "message"), WRONG_APPEND.values(), ids=WRONG_APPEND.keys())
def test_wrong_append(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=r"flash_mla\.append: " + message):
        flash_mla.append(**{**append_arguments(), **change})


def test_plan_of_another_shape() -> None:
    arguments = decode_arguments()
    plan = flash_mla.plan_splits(**arguments, kv_lora_rank=128)
    other = dataclasses.replace(plan, num_heads=8)
    with pytest.raises(ValueError, match=r"plan was made for .* = \(2, 1, 8, 1\), got \(2, 1, 4, 1\)"):
        flash_mla.decode(**arguments, **OPTIONS, plan=other)


@pytest.mark.parametrize(
    ("items", "splits", "message"),
    [
        (zeros(2, 4, dtype=torch.int32), zeros(2, 2, dtype=torch.int32), r"plan items must be .*batch=2.*\(2, 4\)"),
        (zeros(3, 3, dtype=torch.int32), zeros(2, 2, dtype=torch.int32), r"plan items must be .*\(3, 3\)"),
        (zeros(3, 4, dtype=torch.int64), zeros(2, 2, dtype=torch.int32), r"plan items must be .*int64"),
        (zeros(3, 4, dtype=torch.int32), zeros(3, dtype=torch.int32), r"plan splits must be .*=2, 2\].*\(3,\)"),
        (zeros(3, 4, dtype=torch.int32), zeros(2, 3, dtype=torch.int32), r"plan splits must be .*=2, 2\].*\(2, 3\)"),
        (zeros(3, 4, dtype=torch.int32), zeros(2, 2, dtype=torch.int64), r"plan splits must be .*int64"),
        (zeros(3, 4, dtype=torch.int32), None, r"a plan is items and splits together"),
    ],
)
def test_plan_of_another_layout(items: torch.Tensor, splits: torch.Tensor | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        torch.ops.flash_mla.decode(*decode_arguments().values(), items, splits, 128, 0.1, True, "torch")


# --- backends: obeyed or refused --------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_named_backend_is_obeyed(backend: str) -> None:
    before = flash_mla.backend_counts()
    flash_mla.decode(**decode_arguments(), **OPTIONS, backend=backend)
    flash_mla.append(**append_arguments(), backend=backend)
    after = flash_mla.backend_counts()
    for op in ("decode", "append"):
        assert after[op, backend] == before.get((op, backend), 0) + 1
    assert sum(after.values()) == sum(before.values()) + 2


def test_an_unknown_backend_is_a_wrong_argument() -> None:
    with pytest.raises(ValueError, match=r"backend must be one of .*'triton'.* or None, got 'cuda9'"):
        flash_mla.decode(**decode_arguments(), **OPTIONS, backend="cuda9")


def test_a_named_backend_that_cannot_is_refused_and_not_replaced() -> None:
    arguments = decode_arguments()
    before = flash_mla.backend_counts()
    with pytest.raises(
        flash_mla.UnsupportedError, match=r"(?s)no backend accepts this call\n  triton: takes \(kv_lora"
    ):
        flash_mla.decode(**arguments, kv_lora_rank=100, softmax_scale=0.1, backend="triton")
    assert flash_mla.backend_counts() == before


def test_without_a_name_the_first_that_accepts_runs() -> None:
    before = flash_mla.backend_counts()
    flash_mla.decode(**decode_arguments(), kv_lora_rank=100, softmax_scale=0.1)
    assert flash_mla.backend_counts()["decode", "torch"] == before.get(("decode", "torch"), 0) + 1


def test_the_interpreter_is_never_the_automatic_choice() -> None:
    others = ["torch", "triton"] if triton_backend.INTERPRETED else ["triton", "torch"]
    assert list(ops.BACKENDS) == ["cuda", *others]


def decode_call(**changes: object) -> DecodeCall:
    arguments = decode_arguments()
    return dataclasses.replace(check_decode(**arguments, kv_lora_rank=128, causal=True), **changes)


def append_call(**changes: object) -> AppendCall:
    return dataclasses.replace(check_append(**append_arguments()), **changes)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"kv_lora_rank": 96}, r"takes \(kv_lora_rank, qk_rope_head_dim\) in .*got \(96, 32\)"),
        ({"block_size": 40}, r"takes a block_size that 16 divides, got 40"),
        ({"kv_cache_strides": (20480, 1, 160, 64)}, r"needs the last stride of kv_cache to be 1, got 64"),
        ({"device_type": "xpu"}, r"got xpu"),
        ({"dtype": "float64"}, r"got float64"),
    ],
)
def test_triton_refusals(changes: dict[str, object], reason: str) -> None:
    assert triton_backend.decode_refusals(decode_call()) == []
    assert triton_backend.append_refusals(append_call()) == []
    (only,) = triton_backend.decode_refusals(decode_call(**changes))
    assert re.search(reason, only)
    if changes.get("dtype") is None:
        assert re.search(reason, triton_backend.append_refusals(append_call(**changes))[0])


def test_triton_off_and_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_backend, "INTERPRETED", False)
    (reason,) = triton_backend.decode_refusals(decode_call(device_type="cpu"))
    assert re.search(r"needs a GPU \(on a CPU: TRITON_INTERPRET=1.*\), got cpu", reason)
    for dtype in ("bfloat16", "float16"):
        assert triton_backend.decode_refusals(decode_call(device_type="cuda", dtype=dtype)) == []
    (reason,) = triton_backend.decode_refusals(decode_call(device_type="cuda", dtype="float32"))
    assert reason == "takes bfloat16 and float16, got float32"
    # Moving rows needs no arithmetic.
    assert triton_backend.append_refusals(append_call(device_type="cuda", dtype="float32")) == []


def test_the_interpreter_refuses_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_backend, "INTERPRETED", True)
    (reason,) = triton_backend.decode_refusals(decode_call(device_type="cpu", dtype="bfloat16"))
    assert reason == "the interpreter computes in float16 and float32 only, got bfloat16"


def test_triton_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_backend, "kernels", None)
    assert triton_backend.decode_refusals(decode_call()) == ["triton is not installed"]
    assert triton_backend.append_refusals(append_call()) == ["triton is not installed"]


def test_torch_refuses_nothing() -> None:
    odd = {"kv_lora_rank": 7, "block_size": 3, "dtype": "float64", "device_type": "meta"}
    assert torch_backend.decode_refusals(decode_call(**odd)) == []
    assert torch_backend.append_refusals(append_call(**odd)) == []


# --- schedules on plain integers --------------------------------------------------------------------------------------

DEVICES = {
    "H200": triton_backend.Device(132, 232448, True),
    "B200": triton_backend.Device(148, 232448, False),
    "A100": triton_backend.Device(108, 166912, False),
    "RTX 4090, L4": triton_backend.Device(128, 101376, False),
    "MI300X": triton_backend.Device(304, 65536, False),
}


@pytest.mark.parametrize("device", DEVICES.values(), ids=DEVICES.keys())
@pytest.mark.parametrize(("kv_lora_rank", "qk_rope_head_dim"), LATENT_SHAPES)
def test_tiles_fit_into_shared_memory(device: triton_backend.Device, kv_lora_rank: int, qk_rope_head_dim: int) -> None:
    d_qk = kv_lora_rank + qk_rope_head_dim
    for rows in (1, 16, 17, 20, 32, 33, 64, 128, 512):
        schedule = triton_backend.choose_schedule(rows, d_qk, device)
        buffers = schedule.num_stages - (schedule.form == triton_backend.FORM_PLAIN)
        tiles = (schedule.block_m + buffers * schedule.block_n) * d_qk * 2
        exchange = schedule.block_m * schedule.block_n * 2
        assert tiles + exchange <= device.shared_memory
        assert schedule.form == triton_backend.FORM_PLAIN or device.has_wgmma
        # A tile of mma.sync holds at most 32 rows of accumulators; wgmma's swapped form is for few rows.
        assert schedule.block_m <= (64 if schedule.form == triton_backend.FORM_ROWS else 32)


@pytest.mark.parametrize(
    ("num_heads", "seqlen_q", "slots"),
    [
        (16, 1, 132),  # one row tile: a slot for every SM
        (128, 1, 66),  # two row tiles each
        (128, 2, 33),
        (128, 200, 1),  # more tiles than SMs
    ],
)
def test_number_of_slots_on_an_h200(num_heads: int, seqlen_q: int, slots: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_backend, "device_of", lambda *_: DEVICES["H200"])
    for batch in (1, 1024):
        call = decode_call(batch=batch, num_heads=num_heads, seqlen_q=seqlen_q, kv_lora_rank=512, qk_rope_head_dim=64)
        assert triton_backend.num_slots(call) == slots


def test_every_backend_and_dtype_of_the_tests_is_accepted_here() -> None:
    for backend, dtype in BACKENDS:
        reasons = ops.BACKENDS[backend].decode_refusals(decode_call(dtype=str(dtype).removeprefix("torch.")))
        assert reasons == []
