"""The instructions that a kernel is compiled to: what must be there for its speed, and what must not."""

from __future__ import annotations

import functools
from collections import Counter
from pathlib import Path

from device_code import operations, sass

from flash_mla import _build

# Per kernel file: the operations that its kernels are built around. A file without a row fails.
BUILT_AROUND: dict[str, set[str]] = {
    "append": {"LDG", "STG"},
    "combine": {"LDG", "STG"},
    "dense_decode": {"HGMMA", "UTMALDG"},
    "dense_decode_few": {"HGMMA", "UTMALDG"},
    "dense_decode_fp8": {"QGMMA", "HGMMA", "LDSM"},
    "dense_decode_fp8_pair": {"HGMMA", "STAS", "UTMALDG"},
    "dense_decode_fp8_wide": {"HGMMA", "UBLKCP", "UTMALDG"},
    "plan": {"LDG", "STG"},
    "sparse_decode": {"HGMMA", "LDGSTS", "UTMALDG"},
    "slots": {"LDG", "STG"},
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


def test_decode_issues_the_matrix_instructions_of_its_arithmetic_and_no_more() -> None:
    """Per unit: a step of S for every 16 columns; four of O, as wide as half the values, in each value warpgroup.

    Unrolled otherwise, or with S or O in two loops, a kernel has other numbers. Q's fragments are loaded once.
    """
    for file, kernel, instructions in shipped():
        if file != "dense_decode":
            continue
        dtype, rank, rope = kernel.split("_")[-3:]
        steps, suffix = (int(rank) + int(rope)) // 16, ".BF16" if dtype == "bf16" else ""
        wanted = Counter({f"HGMMA.64x64x16.F32{suffix}": steps})
        wanted[f"HGMMA.64x{int(rank) // 2}x16.F32{suffix}"] += 2 * 4
        assert Counter(name for name in instructions if name.startswith("HGMMA")) == wanted, kernel
        count = Counter(instructions)
        assert count["LDSM.16.M88.4"] == min(steps, 31), kernel
        assert count["STSM.16.M88.4"] == 4, kernel
        assert_roles(kernel, instructions, takers=1, givers=2)


def test_decode_of_few_rows_issues_the_matrix_instructions_of_its_arithmetic_and_no_more() -> None:
    """Both consumers run the same code. Per unit: a step of S for every 16 of 576 columns; four of O for every 64 of
    512, each 64 wide and as narrow as the rows. P is stored transposed, 16 rows at a time, in two places: with the
    reference that there was, and again where that had to rise."""
    found = 0
    for file, kernel, instructions in shipped():
        if file != "dense_decode_few":
            continue
        form, dtype, rank, rope = kernel.split("_")[-4:]
        rows, suffix = int(form.removeprefix("few")), ".BF16" if dtype == "bf16" else ""
        steps = (int(rank) + int(rope)) // 16 + int(rank) // 64 * 4
        wanted = {f"HGMMA.64x{rows}x16.F32{suffix}": steps}
        assert Counter(name for name in instructions if name.startswith("HGMMA")) == wanted, kernel
        stores = Counter(name for name in instructions if name.startswith("STSM"))
        assert stores == {"STSM.16.MT88.4": 2 * rows // 16}, kernel
        assert_roles(kernel, instructions, takers=1, givers=1)
        found += 1
    assert found == 4


def test_decode_of_fp8_rows_issues_the_matrix_instructions_of_its_arithmetic_and_no_more() -> None:
    """Per unit 16 steps of S over 32 codes, high and low parts of the rows at once, and four of the rotated columns; of
    O two steps for the high and two for the low parts of every 64 columns. Codes of values are read once. Rows by index
    come with one copy, and their keys through registers: 20 steps of 32 bytes."""
    found = 0
    for file, kernel, instructions in shipped():
        if file != "dense_decode_fp8":
            continue
        rows = int(kernel.split("_")[-4].removeprefix("few"))
        count = Counter(instructions)
        assert {name: n for name, n in count.items() if name.startswith(("HGMMA", "QGMMA"))} == {
            f"QGMMA.64x{2 * rows}x32.F32.E4M3.E4M3": 16,
            f"HGMMA.64x{rows}x16.F32.BF16": 4,
            f"QGMMA.64x{rows}x32.F32.E4M3.E4M3": 32,
        }, kernel
        is_sparse = "_sparse_" in kernel
        reads = {"LDSM.16.MT88.4": 2 * 8}  # per 64 columns of values
        if is_sparse:
            reads["LDSM.16.M88.4"] = 20
        assert {name: n for name, n in count.items() if name.startswith("LDSM")} == reads, kernel
        assert {name: n for name, n in count.items() if name.startswith("STSM")} == {"STSM.16.MT88.4": rows // 4}
        copies = ("LDGSTS", "UBLKCP", "UTMALDG")
        assert {name.split(".")[0]: n for name, n in count.items() if name.startswith(copies)} == (
            {"UBLKCP": 1} if is_sparse else {"UTMALDG": 3 + 3}
        ), kernel
        assert_roles(kernel, instructions, takers=1, givers=1)
        found += 1
    assert found == 4


def test_decode_of_fp8_rows_as_fp16_issues_the_matrix_instructions_of_its_arithmetic_and_no_more() -> None:
    """Per unit 32 steps of S in fp16 and four of the rotated columns in bf16; of O four for each quarter of the
    columns, two quarters in each value warpgroup. Copies of rows are no loop over lanes. Of a pair a warp converts 8
    rows instead of 16, out of registers, and stores in the other CTA too; nothing of that waits for global memory."""
    found = 0
    for file, kernel, instructions in shipped():
        if file not in ("dense_decode_fp8_wide", "dense_decode_fp8_pair"):
            continue
        is_pair = file == "dense_decode_fp8_pair"
        count = Counter(instructions)
        assert {name: n for name, n in count.items() if name.startswith(("HGMMA", "QGMMA"))} == {
            "HGMMA.64x64x16.F32": 32,
            "HGMMA.64x64x16.F32.BF16": 4,
            "HGMMA.64x128x16.F32": 2 * 2 * 4,
        }, kernel
        assert {name: n for name, n in count.items() if name.startswith(("LDSM", "STSM"))} == {"STSM.16.M88.4": 4}
        unpacks = sum(n for name, n in count.items() if "E4M3.UNPACK" in name)
        assert unpacks == (8 if is_pair else 16) * 512 // 2 // 32, kernel  # of a warp's rows, two codes per lane
        copies = sum(n for name, n in count.items() if name.startswith("UBLKCP"))
        stores = {name: n for name, n in count.items() if name.startswith("STAS")}
        # Before what the tensor cores or copies find: the barriers' beginnings, units, Q, P; and the other CTA's units.
        fences = sum(n for name, n in count.items() if name.startswith("FENCE.VIEW.ASYNC"))
        if is_pair:
            # Rows, rotated keys, what a pair of tokens is counted in; and which rows are named.
            assert (copies, stores, fences) == (0, {"STAS.128": 2 * 8 + 2 + 1, "STAS": 1}, 5), kernel
            assert not {name for name in count if name.startswith(("MEMBAR.ALL.GPU", "MEMBAR.SC"))}, kernel
            # CTAs meet once, at the beginning, and only there L1 is emptied.
            assert [count[name] for name in ("UCGABAR_ARV", "UCGABAR_WAIT", "CCTL.IVALL")] == [1, 1, 1], kernel
        else:
            # Of the ring's two first units, by who converts, and of the others in either value warpgroup.
            assert (copies, stores, fences) == (2 * 2 * 8 + 2 * 8, {}, 4), kernel
        assert_roles(kernel, instructions, takers=2, givers=2)
        found += 1
    assert found == 4


def test_sparse_decode_issues_the_matrix_instructions_of_its_arithmetic_and_no_more() -> None:
    """Per unit 36 steps of S; of O four for each quarter of the columns, two quarters in each value warpgroup. A lane
    copies 16 bytes of each tile of four rows."""
    found = 0
    for file, kernel, instructions in shipped():
        if file != "sparse_decode":
            continue
        suffix = ".BF16" if "_bf16_" in kernel else ""
        count = Counter(instructions)
        assert {name: n for name, n in count.items() if name.startswith("HGMMA")} == {
            f"HGMMA.64x64x16.F32{suffix}": 36,
            f"HGMMA.64x128x16.F32{suffix}": 2 * 2 * 4,
        }, kernel
        assert count["STSM.16.M88.4"] == 4, kernel
        assert sum(n for name, n in count.items() if name.startswith("LDGSTS")) == 4 * 9, kernel
        # The barriers' beginnings, units, P.
        assert sum(n for name, n in count.items() if name.startswith("FENCE.VIEW.ASYNC")) == 3, kernel
        assert_roles(kernel, instructions, takers=2, givers=2)
        found += 1
    assert found == 2


def assert_roles(kernel: str, instructions: list[str], takers: int, givers: int) -> None:
    """Registers change hands, and nothing is read before the launches ahead have ended."""
    count = Counter(instructions)
    changes = (count["USETMAXREG.TRY_ALLOC.CTAPOOL"], count["USETMAXREG.DEALLOC.CTAPOOL"])
    assert changes == (takers, givers), kernel
    reads = [i for i, name in enumerate(instructions) if name.startswith(("LDG", "UTMALDG"))]
    assert count["ACQBULK"] == 1, kernel
    assert instructions.index("ACQBULK") < min(reads), kernel


def test_merges_wait_for_decode_before_they_read_its_results() -> None:
    """Before that they read the plan, two integers at a time; the results are fp32, singly or by four."""
    for file, kernel, instructions in shipped():
        if file == "combine":
            assert instructions.count("ACQBULK") == 1, kernel
            wait = instructions.index("ACQBULK")
            assert {name for name in instructions[:wait] if name.startswith("LDG")} == {"LDG.E.64"}, kernel
            assert "PREEXIT" in instructions[:wait], kernel


def test_append_moves_units_as_wide_as_its_name_says(append_cubin: Path) -> None:
    modifier = {2: ".U16", 4: "", 8: ".64", 16: ".128"}
    for kernel, instructions in sass(append_cubin).items():
        if "fp8" in kernel:
            continue
        width = modifier[int(kernel.removeprefix("append_rows_"))]
        assert f"STG.E{width}" in instructions
        assert {i for i in instructions if i.startswith("STG")} == {f"STG.E{width}"}


def test_append_loads_before_it_knows_the_slot(append_cubin: Path) -> None:
    """A row's first loads are under way when the slot is divided: the division follows them, the first store it."""
    for kernel, instructions in sass(append_cubin).items():
        # The queries' part comes first and ends with its only store.
        placed, store = [i for i, name in enumerate(instructions) if name.startswith("STG")][:2]
        division = max(i for i, name in enumerate(instructions[:store]) if name.startswith("I2F"))
        assert placed < division, kernel
        loads = [name for name in instructions[placed:division] if name.startswith("LDG")]
        assert len(loads) >= 2, kernel


def test_append_encodes_in_hardware_and_stores_16_codes_at_once(append_cubin: Path) -> None:
    """Per pass over a row, of which there are two: eight conversions of two columns, as many units of 16 bytes as a
    column has bytes; and no division per column, whose check is FCHK. Queries are one unit more."""
    found = {kernel: instructions for kernel, instructions in sass(append_cubin).items() if "fp8" in kernel}
    assert set(found) == {"append_fp8_bf16", "append_fp8_fp16", "append_fp8_fp32"}
    for kernel, instructions in found.items():
        count = Counter(instructions)
        encoded = [name for name in instructions if name.startswith("F2FP.SATFINITE.E4M3")]
        assert len(encoded) == 2 * 8, kernel
        assert count["STG.E.128"] == 2 + 1, kernel
        assert count["LDG.E.128"] == 2 * (4 if kernel.endswith("fp32") else 2) + 1, kernel
        assert count["FCHK"] <= 2, kernel
