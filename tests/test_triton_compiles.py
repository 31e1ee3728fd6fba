"""The Triton kernels for real GPUs, compiled where there is none: the interpreter accepts what the compiler refuses
(a variable that has another shape in each branch, for one)."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

# Compiles one kernel for a capability and prints its name and its bytes of shared memory.
COMPILE = """
import json, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from flash_mla.backends import triton_kernels

capability, name, pointers, constants, options = json.loads(sys.argv[1])
kernel = getattr(triton_kernels, name)
kinds = pointers | dict.fromkeys(constants, "constexpr")
signature = {argument: kinds.get(argument, "i32") for argument in kernel.arg_names}
# torch's memory and the strides of its rows are multiples of 16.
aligned = [
    index for index, (argument, kind) in enumerate(signature.items()) if kind[0] == "*" or "_stride_" in argument
]
attributes = {(index,): [["tt.divisibility", 16]] for index in aligned}
source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
assert "st.global" in compiled.asm["ptx"]
print("compiled", compiled.metadata.name, compiled.metadata.shared)
"""


def compiled(capability: int, name: str, pointers: dict[str, str], constants: dict[str, object], **options: int) -> int:
    """Bytes of shared memory. In a process of its own: here the kernels may be the interpreter's."""
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    command = [sys.executable, "-c", COMPILE, json.dumps([capability, name, pointers, constants, options])]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, check=False)
    assert done.stdout.startswith(f"compiled {name} "), done.stderr[-2000:]
    return int(done.stdout.split()[2])


def pool_pointers(fp8: bool) -> dict[str, str]:
    if fp8:
        return {"kv_cache": "*u8", "kv_scales": "*fp32", "kv_rope": "*i16"}
    return dict.fromkeys(("kv_cache", "kv_scales", "kv_rope"), "*bf16")


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("block_rows", [1, 8])
@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "FP8"])
def test_append(capability: int, block_rows: int, fp8: bool) -> None:
    pointers = dict.fromkeys(("latent", "k_rope", "q", "q_rope"), "*bf16") | {"slots": "*i64"} | pool_pointers(fp8)
    constants = {"KV_LORA_RANK": 512, "QK_ROPE_HEAD_DIM": 64, "BLOCK_ROWS": block_rows, "PLACED_ROWS": 16, "FP8": fp8}
    compiled(capability, "append_kernel", pointers, constants, num_warps=1 if block_rows == 1 else 4)


# Bytes that one program may have: compute capability 8.0, 8.9 and 9.0.
SHARED_MEMORY = {80: 166912, 89: 101376, 90: 232448}


@pytest.mark.parametrize(
    ("capability", "fp8", "sparse", "num_heads"),
    [
        pytest.param(90, True, False, 16, id="Hopper, FP8"),
        pytest.param(90, True, False, 20, id="Hopper, FP8, tokens on the 64-row side"),
        pytest.param(90, True, False, 128, id="Hopper, FP8, 64-row tiles"),
        pytest.param(90, True, True, 128, id="Hopper, FP8, sparse"),
        pytest.param(90, False, True, 16, id="Hopper, sparse"),
        pytest.param(80, True, False, 128, id="A100, FP8"),
        pytest.param(89, True, False, 16, id="L4, FP8"),
        pytest.param(89, True, True, 20, id="L4, FP8, sparse, 20 heads"),
    ],
)
def test_decode_fits_its_device(capability: int, fp8: bool, sparse: bool, num_heads: int) -> None:
    from flash_mla.backends import triton as backend

    device = backend.Device(132, SHARED_MEMORY[capability], capability == 90)
    schedule = backend.choose_schedule(num_heads, 576, device, fp8)
    numbers = ("cache_seqlens", "block_table", "items", "splits")
    pointers = dict.fromkeys(numbers, "*i32") | dict.fromkeys(("q", "out"), "*bf16")
    pointers |= dict.fromkeys(("sinks", "largest", "lse", "o_partial", "lse_partial"), "*fp32")
    constants = {
        "KV_STRIDE_TOKEN": 656 if fp8 else 576,
        "CAUSAL": not sparse,
        "KV_LORA_RANK": 512,
        "QK_ROPE_HEAD_DIM": 64,
        "BLOCK_M": schedule.block_m,
        "BLOCK_N": schedule.block_n,
        "ONE_PAGE": not sparse,
        "UNIT": 64,
        "FORM": schedule.form,
        "FP8": fp8,
        "SPARSE": sparse,
        "HAS_SINKS": sparse,
        "WANTS_MAX": sparse,
    }
    pointers |= pool_pointers(fp8) | {"softmax_scale_log2": "fp32"}
    shared = compiled(
        capability,
        "decode_kernel",
        pointers,
        constants,
        num_warps=schedule.num_warps,
        num_stages=schedule.num_stages,
    )
    assert shared <= device.shared_memory
