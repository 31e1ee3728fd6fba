"""The instructions that a kernel is compiled to: what must be there for its speed, and what must not."""

from __future__ import annotations

import functools
from pathlib import Path

from device_code import operations, sass

from flash_mla import _build

# Per kernel file: the operations that its kernels are built around. A file without a row fails.
BUILT_AROUND: dict[str, set[str]] = {
    "append": {"LDG", "STG"},
    "combine": {"LDG", "STG"},
    "dense_decode": {"HGMMA", "UTMALDG"},
    "plan": {"LDG", "STG"},
}


@functools.cache
def shipped() -> list[tuple[str, str, list[str]]]:
    """(file, kernel, instructions) of the package's own cubins; `test_build.py` has them be those of the sources."""
    return [
        (cubin.stem, kernel, instructions)
        for cubin in sorted(_build.CUBINS.glob("*.cubin"))
        for kernel, instructions in sass(cubin).items()
    ]


def test_every_kernel_is_built_around_what_it_should_be() -> None:
    for file, kernel, instructions in shipped():
        assert BUILT_AROUND[file] <= operations(instructions), kernel
    assert {file for file, _, _ in shipped()} == {source.stem for source in _build.KERNELS.glob("*.cu")}


def test_no_kernel_uses_local_memory() -> None:
    """LDL and STL: spilled registers, or an array that is indexed at run time. Either is memory traffic per thread."""
    for _, kernel, instructions in shipped():
        assert not operations(instructions) & {"LDL", "STL"}, kernel


def test_append_moves_units_as_wide_as_its_name_says(append_cubin: Path) -> None:
    modifier = {2: ".U16", 4: "", 8: ".64", 16: ".128"}
    for kernel, instructions in sass(append_cubin).items():
        width = modifier[int(kernel.removeprefix("append_rows_"))]
        assert f"STG.E{width}" in instructions
        assert {i for i in instructions if i.startswith("STG")} == {f"STG.E{width}"}


def test_append_loads_before_it_knows_the_slot(append_cubin: Path) -> None:
    """A row's first loads are under way when the slot is divided: the division follows them, the first store it."""
    for kernel, instructions in sass(append_cubin).items():
        store = next(i for i, name in enumerate(instructions) if name.startswith("STG"))
        division = max(i for i, name in enumerate(instructions[:store]) if name.startswith("I2F"))
        loads = [name for name in instructions[:division] if name.startswith("LDG")]
        assert len(loads) >= 2, kernel
