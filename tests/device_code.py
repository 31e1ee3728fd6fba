"""What the compiled device code holds: its instructions, and where the fields of its structs are."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

from flash_mla import _build

SECTION = re.compile(r"^\s*\.section\s+\.text\.([^,\s]+)")
# "/*0a30*/  @!P0 LDG.E.128 R4, desc[UR4][R30.64] ;": a predicate, then the instruction.
INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)")


def sass(cubin: Path) -> dict[str, list[str]]:
    """Instructions of each kernel of a cubin in their order, with modifiers ("LDG.E.128") and without operands."""
    nvdisasm = _build._in_wheel("cu13", "bin", "nvdisasm")
    done = subprocess.run([nvdisasm, "-c", cubin], capture_output=True, text=True, check=True)
    found: dict[str, list[str]] = {}
    kernel = ""
    for line in done.stdout.splitlines():
        if match := SECTION.match(line):
            kernel = match.group(1)
            found[kernel] = []
        elif match := INSTRUCTION.match(line):
            found[kernel].append(match.group(1))
    return found


def operations(instructions: list[str]) -> set[str]:
    """The instructions without their modifiers: "LDG.E.128" is an "LDG"."""
    return {instruction.split(".")[0] for instruction in instructions}


def assert_mirrors(folder: Path, source: str, struct: str, offsets: Mapping[str, int], size: int) -> None:
    """Have the device code's compiler compare a struct of `kernels/<source>` with offsets and size in bytes.

    `folder` is an empty one to work in. A difference raises BuildError with the line of the static_assert.
    """
    for file in _build.KERNELS.glob("*.cu*"):
        shutil.copy(file, folder)
    asserts = [f"static_assert(sizeof({struct}) == {size});"]
    # NVRTC has no offsetof; __INTADDR__ is what its front end makes one of.
    asserts += [f"static_assert(__INTADDR__(&(({struct}*)0)->{name}) == {at});" for name, at in offsets.items()]
    text = [f'#include "{source}"', *asserts, 'extern "C" __global__ void probe() {}']
    (folder / "probe.cu").write_text("\n".join(text))
    _build.build(["probe"], kernels=folder, out=folder / "out", lax=True)
