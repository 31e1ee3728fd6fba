"""Compiling the device code: what fails a build, what a wheel and an sdist hold, and with which tools."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from flash_mla import _build

ROOT = Path(__file__).resolve().parents[1]
# nvcc where there is one, with the host compiler that it needs; nothing of the package depends on it.
COMPILERS = ["nvrtc", *(["nvcc"] if shutil.which("nvcc") and shutil.which("gcc") else [])]
BY_COMPILER = pytest.mark.parametrize("compiler", COMPILERS)

GOOD = """
#ifndef VALUE
#define VALUE 1
#endif
extern "C" __global__ void good(float* p) { p[threadIdx.x] = VALUE; }
"""
COMPILE_ERROR = """
extern "C" __global__ void broken(float* p) {
  p[0] = no_such_name;
}
"""
# 80 live floats in 64 registers: 1,024 threads share 65,536.
SPILL = """
__device__ __noinline__ float helper(float x) { return x * x + __sinf(x); }

extern "C" __global__ void __launch_bounds__(1024)
spilling(float* p) {
  float a[80];
#pragma unroll
  for (int i = 0; i < 80; ++i) a[i] = p[i * 1024 + threadIdx.x];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 80; ++i) p[i * 1024 + threadIdx.x * 7] = a[79 - i] * helper(a[(i * 7) % 80]);
}
"""
# No launch bounds, so ptxas does not know how many registers there are to begin with.
SETMAXNREG = """
extern "C" __global__ void innocent(float* p) { p[0] = 1; }

extern "C" __global__ void unbounded(float* p) {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 240;");
  p[threadIdx.x] = 1;
}
"""
# An accumulator is touched between two wgmma of one group.
SERIALISED = """
#define MMA                                                                                       \\
  asm volatile("wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%0,%1,%2,%3}, %4, %4, 1,1,1,0,0;" \\
               : "+f"(a), "+f"(b), "+f"(c), "+f"(d) : "l"(tile))

extern "C" __global__ void __launch_bounds__(128) serialised(float* p, unsigned long long tile) {
  float a = 0, b = 0, c = 0, d = 0;
  asm volatile("wgmma.fence.sync.aligned;");
  MMA;
  a += 1;
  MMA;
  asm volatile("wgmma.commit_group.sync.aligned;");
  asm volatile("wgmma.wait_group.sync.aligned 0;");
  p[threadIdx.x] = a + b;
}
"""


@pytest.fixture
def kernels(tmp_path: Path) -> Path:
    folder = tmp_path / "kernels"
    folder.mkdir()
    return folder


def build(kernels: Path, source: str, compiler: str = "nvrtc", **settings: object) -> Path:
    """Compile `source` as one.cu; returns the folder of the cubin."""
    (kernels / "one.cu").write_text(source)
    out = kernels.parent / "out"
    _build.build(kernels=kernels, out=out, compiler=compiler, **settings)
    return out


def failure(kernels: Path, source: str, compiler: str = "nvrtc") -> list[str]:
    """Lines of the error of a build that must fail, and must not leave the cubin of an earlier one."""
    out = build(kernels, GOOD, compiler)
    assert (out / "one.cubin").is_file()
    with pytest.raises(_build.BuildError) as error:
        build(kernels, source, compiler)
    assert not list(out.glob("*.cubin"))
    assert _build.manifest(out) == {}
    return str(error.value).splitlines()


# --- the package's own kernels ----------------------------------------------------------------------------------------


def test_the_package_holds_the_cubins_of_these_sources() -> None:
    """Otherwise: python -m flash_mla._build. (A build with FLASH_MLA_KERNEL=0 holds none.)"""
    assert _build.stale() == []
    for name, noted in _build.manifest().items():
        cubin = (_build.CUBINS / f"{name}.cubin").read_bytes()
        assert cubin[:4] == b"\x7fELF"
        assert (noted["arch"], noted["bytes"]) == ("sm_90a", len(cubin))
        assert noted["functions"]


@BY_COMPILER
def test_append_compiles(compiler: str, tmp_path: Path) -> None:
    noted = _build.build(["append"], out=tmp_path, compiler=compiler)
    registers = {function["name"]: function["registers"] for function in noted["append"]["functions"]}
    assert sorted(registers) == [
        "append_fp8_bf16",
        "append_fp8_fp16",
        "append_fp8_fp32",
        "append_rows_16",
        "append_rows_2",
        "append_rows_4",
        "append_rows_8",
    ]
    assert noted["append"]["compiler"].lower().startswith(compiler)
    assert noted["append"]["compiler"].count(".") == 2  # a whole version, "NVRTC 12.9.86"
    # 8 warps per CTA and 48 per SM (FP8 rows: 40): the header of append.cu counts on no more than 40 (48) registers.
    for name, count in registers.items():
        assert count <= (48 if "fp8" in name else 40), name


def test_the_place_of_a_build_leaves_no_trace(tmp_path: Path) -> None:
    """The same bytes from every folder, so a wheel built twice is the same wheel and names no folder of the builder."""
    made = []
    for folder in (tmp_path / "a", tmp_path / "elsewhere" / "b"):
        shutil.copytree(ROOT / "kernels", folder)
        _build.build(["append"], kernels=folder, out=folder / "out")
        made.append((folder / "out" / "append.cubin").read_bytes())
    assert made[0] == made[1]
    assert str(tmp_path).encode() not in made[0]
    assert b"/append.cu" in made[0]


# --- what fails a build -----------------------------------------------------------------------------------------------


@BY_COMPILER
def test_compile_error(compiler: str, kernels: Path) -> None:
    lines = failure(kernels, COMPILE_ERROR, compiler)
    assert lines[0].startswith("one.cu does not compile with ")
    assert any("one.cu(3): error" in line and "no_such_name" in line for line in lines)


@BY_COMPILER
def test_spill(compiler: str, kernels: Path) -> None:
    heading, line = failure(kernels, SPILL, compiler)[:2]
    assert heading == "one.cu compiles to what a kernel may not hold:"
    place, kernel, words = line.split(": ")
    assert (place, kernel) in {("one.cu:4", "spilling"), ("one.cu:5", "spilling")}
    assert words.endswith("bytes spill loads")
    assert not words.startswith("0 bytes")


@BY_COMPILER
def test_setmaxnreg_ignored(compiler: str, kernels: Path) -> None:
    (line,) = failure(kernels, SETMAXNREG, compiler)[1:]
    assert line.startswith("one.cu: ")
    assert "unbounded" in line
    assert "'setmaxnreg' ignored" in line
    assert "C7508" in line


@BY_COMPILER
def test_wgmma_serialised(compiler: str, kernels: Path) -> None:
    fault, *remarks = failure(kernels, SERIALISED, compiler)[1:]
    assert fault.startswith("one.cu:6: serialised: (C75")
    assert "wgmma.mma_async instructions are serialized" in fault
    # ptxas counts lines of the PTX; the remark leads with the line of the source: a += 1 reads what is in flight.
    assert any(remark.startswith(("one.cu:9", "one.cu:10")) and "(C7517)" in remark for remark in remarks)


def test_a_compiler_that_does_not_report_is_not_trusted(kernels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    silent = _build.Compiled(b"\x7fELF", "", "", "silent 1.0")
    monkeypatch.setitem(_build.COMPILERS, "nvrtc", lambda *_: silent)
    with pytest.raises(_build.BuildError, match="holds no report of ptxas"):
        build(kernels, GOOD)


@BY_COMPILER
def test_lax_prints_the_fault_and_keeps_the_cubin(
    compiler: str, kernels: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = build(kernels, SPILL, compiler, lax=True)
    assert "spilling: " in capsys.readouterr().err
    assert (out / "one.cubin").is_file()


def test_a_fault_in_an_inlined_function_names_both_lines() -> None:
    ptx = ".visible .entry k(\n\t.loc\t1 7 0\n\t.loc\t2 3 18, function_name $L1, inlined_at 1 9 28\n\tmov\n"
    ptx += '\t.file\t1 "/one.cu"\n\t.file\t2 "/ptx.cuh"\n'
    assert _build._location(ptx, 4) == "ptx.cuh:3 (inlined at one.cu:9)"
    assert _build._start(ptx, "k") == "one.cu:7"
    assert _build._location(ptx, 1) == ""


# --- what a build does ------------------------------------------------------------------------------------------------


@BY_COMPILER
def test_defines_and_headers_reach_the_compiler(compiler: str, kernels: Path) -> None:
    (kernels / "one.cuh").write_text('#pragma once\n#include "two.cuh"\n')
    (kernels / "two.cuh").write_text(
        '#pragma once\n#include "one.cuh"\n#include <cuda_bf16.h>\n#define TYPE __nv_bfloat16\n'
    )
    source = (
        '#include "one.cuh"\nstatic_assert(VALUE == 7);\nextern "C" __global__ void typed(TYPE* p) { p[0] = TYPE(); }'
    )
    out = build(kernels, source, compiler, defines=["VALUE=7"])
    assert _build.manifest(out)["one"]["defines"] == ["VALUE=7"]


def test_a_missing_header_is_the_compilers_to_report(kernels: Path) -> None:
    assert any("none.cuh" in line for line in failure(kernels, '#include "none.cuh"\n' + GOOD))


def test_stale(kernels: Path) -> None:
    (kernels / "one.cuh").write_text("#define VALUE 1\n")
    source = '#include "one.cuh"\n' + GOOD
    out = build(kernels, source)
    assert _build.stale(out, kernels) == []
    (kernels / "one.cuh").write_text("#define VALUE 2\n")
    assert _build.stale(out, kernels) == ["one.cubin is older than its source"]
    build(kernels, source, defines=["A=1", "B=2"])
    assert _build.stale(out, kernels) == ["one.cubin was built with -D A=1 -D B=2"]
    (kernels / "two.cu").write_text(GOOD)
    (kernels / "one.cu").rename(kernels / "three.cu")
    assert _build.stale(out, kernels) == ["three.cubin is missing", "two.cubin is missing", "one.cubin has no source"]
    _build.build(kernels=kernels, out=out)
    assert _build.stale(out, kernels) == []
    assert sorted(_build.manifest(out)) == ["three", "two"]
    _build.remove(out)
    assert list(out.iterdir()) == []


def test_a_name_compiles_that_kernel_alone(kernels: Path) -> None:
    out = build(kernels, GOOD)
    (kernels / "two.cu").write_text(GOOD)
    before = (out / "one.cubin").stat().st_mtime_ns
    _build.build(["two"], kernels=kernels, out=out)
    assert sorted(_build.manifest(out)) == ["one", "two"]
    assert (out / "one.cubin").stat().st_mtime_ns == before
    with pytest.raises(_build.BuildError, match=r"kernels must be among \['one', 'two'\], got \['too'\]"):
        _build.build(["too"], kernels=kernels, out=out)


def test_without_sources_it_says_what_is_needed(tmp_path: Path) -> None:
    with pytest.raises(_build.BuildError, match="needs a source checkout or the sdist"):
        _build.build(kernels=tmp_path, out=tmp_path / "out")


def test_without_a_compiler_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        _build.BuildError, match=r"nvidia/cuda_nvrtc/lib/libnvrtc\.so\.7 is not installed: pip install "
    ):
        _build._in_wheel("cuda_nvrtc", "lib", "libnvrtc.so.7")
    monkeypatch.setattr(_build.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        _build.BuildError, match=r"pip install nvidia-cuda-nvrtc-cu12==12\.9\.86 nvidia-cuda-runtime-cu12"
    ):
        _build.build(["append"], out=tmp_path)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(_build.BuildError, match="nvcc is not on PATH"):
        _build.build(["append"], out=tmp_path, compiler="nvcc")


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ["--out", str(tmp_path)]
    assert _build.main([*out, "append"]) == 0
    said = capsys.readouterr().out
    assert "append.cubin: NVRTC " in said
    assert "append_rows_16: 40 registers" in said
    assert _build.main([*out, "append", "-D", "UNROLL=x y"]) == 1  # constexpr int x y = 4
    assert "error: append.cu does not compile" in capsys.readouterr().err
    assert _build.main([*out, "--check"]) == 1
    assert "append.cubin is missing" in capsys.readouterr().out


# --- whether it is wanted ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "platform", "wanted"),
    [(None, "linux", True), ("1", "linux", True), ("", "linux", True), ("0", "linux", False), (None, "darwin", False)],
)
def test_is_wanted(value: str | None, platform: str, wanted: bool) -> None:
    environ = {} if value is None else {"FLASH_MLA_KERNEL": value}
    assert _build.is_wanted(environ, platform) is wanted


def test_is_wanted_takes_no_other_word() -> None:
    with pytest.raises(_build.BuildError, match=r"FLASH_MLA_KERNEL must be 0 .* or 1 .*, got 'nvcc'"):
        _build.is_wanted({"FLASH_MLA_KERNEL": "nvcc"}, "linux")


# --- wheel and sdist --------------------------------------------------------------------------------------------------


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of what a build reads, with one kernel, and a cubin of an earlier build lying in it."""
    tree = tmp_path / "tree"
    (tree / "kernels").mkdir(parents=True)
    for name in ("pyproject.toml", "hatch_build.py", ".gitignore", "README.md", "LICENSE", "CHANGELOG.md"):
        shutil.copy(ROOT / name, tree)
    shutil.copy(ROOT / "kernels" / "append.cu", tree / "kernels")
    ignored = shutil.ignore_patterns("cubins", "__pycache__")
    shutil.copytree(ROOT / "src", tree / "src", ignore=ignored)
    cubins = tree / "src" / "flash_mla" / "cubins"
    cubins.mkdir()
    (cubins / "old.cubin").write_bytes(b"an earlier build's")
    return tree


def make(tree: Path, what: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """Build `what` as pip does it, with no program on PATH and no torch to import. Returns the process."""
    code = (
        "import sys; sys.modules['torch'] = sys.modules['flash_mla'] = None\n"
        "import hatchling.build as backend\n"
        f"print('needs', *backend.get_requires_for_build_{what}())\n"
        f"print(backend.build_{what}('made'))"
    )
    (tree / "made").mkdir(exist_ok=True)
    inherited = {name: value for name, value in os.environ.items() if name != "FLASH_MLA_KERNEL"}
    environment = inherited | {"PATH": ""} | environ
    return subprocess.run([sys.executable, "-c", code], cwd=tree, env=environment, capture_output=True, text=True)


def in_wheel(tree: Path) -> dict[str, bytes]:
    (wheel,) = (tree / "made").glob("*-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def cubins_in(files: dict[str, bytes]) -> list[str]:
    return [name for name in files if "cubins" in name]


def test_wheel_holds_cubins_and_no_sources(tree: Path) -> None:
    done = make(tree, "wheel")
    assert done.returncode == 0, done.stderr
    for requirement in _build.REQUIREMENTS:
        assert requirement in done.stdout
    files = in_wheel(tree)
    assert cubins_in(files) == ["flash_mla/cubins/append.cubin", "flash_mla/cubins/build.json"]
    assert files["flash_mla/cubins/append.cubin"][:4] == b"\x7fELF"
    assert json.loads(files["flash_mla/cubins/build.json"])["kernels"]["append"]["compiler"].startswith("NVRTC 12.")
    assert not [name for name in files if name.endswith((".cu", ".cuh")) or "hatch_build" in name]


def test_wheel_without_the_kernel_holds_no_old_one(tree: Path) -> None:
    done = make(tree, "wheel", FLASH_MLA_KERNEL="0")
    assert done.returncode == 0, done.stderr
    assert "nvidia" not in done.stdout
    files = in_wheel(tree)
    assert cubins_in(files) == []
    assert "flash_mla/_build.py" in files


def test_editable_install_writes_cubins_into_the_tree(tree: Path) -> None:
    done = make(tree, "editable")
    assert done.returncode == 0, done.stderr
    cubins = tree / "src" / "flash_mla" / "cubins"
    assert sorted(file.name for file in cubins.iterdir()) == ["append.cubin", "build.json"]
    assert _build.stale(cubins, tree / "kernels") == []


def test_editable_install_without_the_kernel_leaves_no_old_one(tree: Path) -> None:
    done = make(tree, "editable", FLASH_MLA_KERNEL="0")
    assert done.returncode == 0, done.stderr
    assert list((tree / "src" / "flash_mla" / "cubins").iterdir()) == []


@pytest.mark.parametrize(("source", "words"), [(COMPILE_ERROR, "no_such_name"), (SPILL, "bytes spill stores")])
def test_a_bad_kernel_fails_the_wheel(source: str, words: str, tree: Path) -> None:
    (tree / "kernels" / "bad.cu").write_text(source)
    done = make(tree, "wheel")
    assert done.returncode != 0
    assert words in done.stderr
    assert "bad.cu" in done.stderr
    assert not list((tree / "made").iterdir())


def test_sdist_holds_sources_and_no_cubins_and_makes_the_same_wheel(tree: Path) -> None:
    assert make(tree, "wheel").returncode == 0
    wheel = in_wheel(tree)
    done = make(tree, "sdist")
    assert done.returncode == 0, done.stderr
    assert "nvidia" not in done.stdout
    (sdist,) = (tree / "made").glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = [name.partition("/")[2] for name in archive.getnames()]
        archive.extractall(tree / "unpacked", filter="data")
    assert {"hatch_build.py", "pyproject.toml", "kernels/append.cu", "src/flash_mla/_build.py"} <= set(names)
    assert not [name for name in names if "cubin" in name]
    (unpacked,) = (tree / "unpacked").iterdir()
    done = make(unpacked, "wheel")
    assert done.returncode == 0, done.stderr
    assert in_wheel(unpacked) == wheel
