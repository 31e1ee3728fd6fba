"""The Triton kernels for real GPUs, compiled where there is none: the interpreter accepts what the compiler refuses
(a variable that has another shape in each branch, for one)."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

COMPILE = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from flash_mla.backends import triton_kernels

kernel = triton_kernels.append_kernel
pointers = dict.fromkeys(("kv_cache", "latent", "k_rope", "q", "q_rope"), "*bf16") | {"slots": "*i64"}
constants = {"KV_LORA_RANK": 512, "QK_ROPE_HEAD_DIM": 64, "BLOCK_ROWS": int(sys.argv[2]), "PLACED_ROWS": 16}
signature = {name: pointers.get(name, "constexpr" if name in constants else "i32") for name in kernel.arg_names}
source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
compiled = triton.compile(source, target=GPUTarget("cuda", int(sys.argv[1]), 32))
assert "st.global" in compiled.asm["ptx"]
print("compiled", compiled.metadata.name)
"""


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("block_rows", [1, 8])
def test_append(capability: int, block_rows: int) -> None:
    """In a process of its own: here the kernels may be the interpreter's."""
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    command = [sys.executable, "-c", COMPILE, str(capability), str(block_rows)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, check=False)
    assert done.stdout == "compiled append_kernel\n", done.stderr[-2000:]
