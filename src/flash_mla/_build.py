"""Compiles `kernels/*.cu` to one sm_90a cubin each, with what may not be in a kernel counted as an error.

    python src/flash_mla/_build.py [--compiler nvrtc|nvcc] [--out DIR] [-D NAME=VALUE ...] [--lax] [NAME ...]
    python src/flash_mla/_build.py --check

(`python -m flash_mla._build` is the same and imports torch first.) The build hook loads this file by its path, where
neither this package nor torch is installed: the standard library only, and one file, hence its 440 lines. The default
compiler is NVRTC out of its wheel, a library that needs no nvcc and no host compiler; nvcc is for comparison.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

__all__ = ["CUBINS", "KERNELS", "REQUIREMENTS", "BuildError", "build", "is_wanted", "manifest", "remove", "stale"]

ARCH = "sm_90a"
# A cubin of CUDA 12.x runs on drivers from 525 on, one of 13.x on drivers from 580 on.
REQUIREMENTS = ("nvidia-cuda-nvrtc-cu12==12.9.86", "nvidia-cuda-runtime-cu12==12.9.79")
KERNELS = Path(__file__).resolve().parents[2] / "kernels"
CUBINS = Path(__file__).resolve().parent / "cubins"
MANIFEST = "build.json"
OPTIONS = ("-std=c++17", "-lineinfo")

INCLUDE = re.compile(r'^\s*#\s*include\s*["<]([^">]+)[">]', re.MULTILINE)
ENTRY = re.compile(r"Compiling entry function '(\S+)'")
PROPERTIES_OF = re.compile(r"Function properties for (\S+)")
PROPERTIES = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
REGISTERS = re.compile(r"Used (\d+) registers")
IN_FUNCTION = re.compile(r"function '(\S+)'")
AROUND_LINE = re.compile(r"around line (\d+)")
PTX_FILE = re.compile(r'^\s*\.file\s+(\d+)\s+"([^"]*)"', re.MULTILINE)
PTX_LOC = re.compile(r"^\s*\.loc\s+(\d+)\s+(\d+)(?:.*inlined_at\s+(\d+)\s+(\d+))?")
RELEASE = re.compile(r"Cuda compilation tools, release [\d.]+, V([\d.]+)")


class BuildError(RuntimeError):
    """A kernel that does not compile, compiles to what is not allowed, or a compiler that is not there."""


@dataclass(frozen=True)
class Function:
    """What ptxas reported of one function; bytes per thread, `registers` is None for one that is not a kernel."""

    name: str
    registers: int | None
    stack: int
    spill_stores: int
    spill_loads: int


@dataclass(frozen=True)
class Compiled:
    """What a compiler returned: the cubin, the PTX that it went through (with line numbers), its log, its version."""

    cubin: bytes
    ptx: str
    log: str
    compiler: str


def is_wanted(environ: Mapping[str, str] | None = None, platform: str = sys.platform) -> bool:
    """Whether a wheel is to hold compiled kernels: on Linux, unless FLASH_MLA_KERNEL=0."""
    value = (os.environ if environ is None else environ).get("FLASH_MLA_KERNEL", "")
    if value not in ("", "0", "1"):
        raise BuildError(f"FLASH_MLA_KERNEL must be 0 (no compiled kernel) or 1 (the default), got {value!r}")
    return platform == "linux" and value != "0"


def remove(out: Path = CUBINS) -> None:
    """Delete what an earlier build left in `out`."""
    for file in (*out.glob("*.cubin"), out / MANIFEST):
        file.unlink(missing_ok=True)


def manifest(out: Path = CUBINS) -> dict[str, Any]:
    """What `build` noted beside its cubins, by kernel file; empty where nothing was built."""
    try:
        kernels: dict[str, Any] = json.loads((out / MANIFEST).read_text())["kernels"]
    except FileNotFoundError:
        return {}
    return kernels


def stale(out: Path = CUBINS, kernels: Path = KERNELS) -> list[str]:
    """Each way in which `out` is not what `kernels` would compile to now, one line each; empty = up to date."""
    noted, problems = manifest(out), []
    names = [source.stem for source in sorted(kernels.glob("*.cu"))]
    for name in names:
        if name not in noted or not (out / f"{name}.cubin").is_file():
            problems.append(f"{name}.cubin is missing")
        elif noted[name]["source"] != _digest(kernels / f"{name}.cu"):
            problems.append(f"{name}.cubin is older than its source")
        elif noted[name]["defines"]:
            problems.append(f"{name}.cubin was built with -D {' -D '.join(noted[name]['defines'])}")
    orphans = sorted(file.stem for file in out.glob("*.cubin") if file.stem not in names)
    return problems + [f"{name}.cubin has no source" for name in orphans]


# --- sources ----------------------------------------------------------------------------------------------------------


def _headers(source: str, folders: Sequence[Path]) -> dict[str, str]:
    """Text of every header that `source` includes, directly or not, by the name that it is included under.

    Headers are found whether or not a condition hides their #include. One that is in no folder is left for the
    compiler to miss: the CUDA headers name some that only a host compiler has.
    """
    found: dict[str, str] = {}
    pending = [source]
    while pending:
        for name in INCLUDE.findall(pending.pop()):
            file = next((folder / name for folder in folders if (folder / name).is_file()), None)
            if name not in found and file is not None:
                found[name] = file.read_text(encoding="utf-8")
                pending.append(found[name])
    return found


def _digest(source: Path) -> str:
    """Hash of a kernel file, the headers beside it that it includes, and the options that they are compiled with."""
    text = source.read_text(encoding="utf-8")
    headers = _headers(text, [source.parent])
    parts = [ARCH, *OPTIONS, text, *(part for name in sorted(headers) for part in (name, headers[name]))]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


# --- compilers --------------------------------------------------------------------------------------------------------


def _in_wheel(*parts: str) -> Path:
    """A file or folder of NVIDIA's wheels, which share the namespace package `nvidia`."""
    spec = importlib.util.find_spec("nvidia")
    for folder in (spec.submodule_search_locations if spec else None) or ():
        if (path := Path(folder, *parts)).exists():
            return path
    raise BuildError(f"nvidia/{'/'.join(parts)} is not installed: pip install {' '.join(REQUIREMENTS)}")


@contextlib.contextmanager
def _working_in(folder: str) -> Iterator[None]:
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def _nvrtc(source: Path, defines: Sequence[str]) -> Compiled:
    library = ctypes.CDLL(str(_in_wheel("cuda_nvrtc", "lib", "libnvrtc.so.12")))
    library.nvrtcGetErrorString.restype = ctypes.c_char_p

    def call(function: str, *arguments: Any) -> None:
        if result := getattr(library, function)(*arguments):
            raise BuildError(f"{source.name}: {function} failed: {library.nvrtcGetErrorString(result).decode()}")

    def text(what: str) -> bytes:
        size = ctypes.c_size_t()
        call(f"nvrtcGet{what}Size", program, ctypes.byref(size))
        buffer = ctypes.create_string_buffer(size.value)
        call(f"nvrtcGet{what}", program, buffer)
        return buffer.raw

    code = source.read_text(encoding="utf-8")
    headers = _headers(code, [source.parent, _in_wheel("cuda_runtime", "include")])
    options = [f"-arch={ARCH}", *OPTIONS, "--ptxas-options=-v", *(f"-D{define}" for define in defines)]
    program = ctypes.c_void_p()
    # Headers go in as text and the compilation runs in "/": line information names each file by its full path, and this
    # way it is "/append.cu" in every build, where it would be a folder of this machine, another in each isolated build.
    call(
        "nvrtcCreateProgram",
        ctypes.byref(program),
        code.encode(),
        source.name.encode(),
        len(headers),
        (ctypes.c_char_p * len(headers))(*(header.encode() for header in headers.values())),
        (ctypes.c_char_p * len(headers))(*(name.encode() for name in headers)),
    )
    try:
        with _working_in("/"):
            pointers = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
            failed = library.nvrtcCompileProgram(program, len(options), pointers)
        log = text("ProgramLog").rstrip(b"\0").decode()
        if failed:
            raise BuildError(f"{source.name} does not compile with NVRTC:\n{log}")
        ptx, cubin = text("PTX").rstrip(b"\0").decode(), text("CUBIN")
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))
    release = RELEASE.search(ptx)
    return Compiled(cubin, ptx, log, f"NVRTC {release.group(1) if release else 'of unknown version'}")


def _nvcc(source: Path, defines: Sequence[str]) -> Compiled:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        raise BuildError("nvcc is not on PATH")
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder, f"{source.stem}.cubin")
        command = [nvcc, "-cubin", f"-gencode=arch=compute_{ARCH[3:]},code={ARCH}", *OPTIONS, "-Xptxas=-v"]
        # --keep: the PTX is wanted too.
        command += [*(f"-D{define}" for define in defines), "-I", str(source.parent), "--keep", "--keep-dir", folder]
        done = subprocess.run([*command, "-o", str(output), str(source)], capture_output=True, text=True)
        log = done.stdout + done.stderr
        if done.returncode:
            raise BuildError(f"{source.name} does not compile with nvcc (exit status {done.returncode}):\n{log}")
        ptx = "".join(file.read_text() for file in Path(folder).glob("*.ptx"))
        version = RELEASE.search(subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout)
        return Compiled(output.read_bytes(), ptx, log, f"nvcc {version.group(1) if version else 'of unknown version'}")


COMPILERS = {"nvrtc": _nvrtc, "nvcc": _nvcc}


# --- what ptxas reports -----------------------------------------------------------------------------------------------


def _functions(log: str) -> list[Function]:
    """The functions of a ptxas report (-v), in its order."""
    found: list[Function] = []
    name = ""
    for line in log.splitlines():
        if match := PROPERTIES_OF.search(line):
            name = match.group(1)
        elif match := PROPERTIES.search(line):
            stack, stores, loads = map(int, match.groups())
            found.append(Function(name, None, stack, stores, loads))
        elif (match := REGISTERS.search(line)) and found:
            last = found[-1]
            found[-1] = Function(last.name, int(match.group(1)), last.stack, last.spill_stores, last.spill_loads)
    return found


def _location(ptx: str, line: int) -> str:
    """`file:line` of the source that line `line` (from 1) of the PTX was made from; empty if nothing says so."""
    files = {number: Path(path).name for number, path in PTX_FILE.findall(ptx)}
    for text in reversed(ptx.splitlines()[:line]):
        if match := PTX_LOC.match(text):
            file, row, caller, caller_row = match.groups()
            inlined = f" (inlined at {files[caller]}:{caller_row})" if caller in files else ""
            return f"{files.get(file, '?')}:{row}{inlined}"
    return ""


def _start(ptx: str, function: str) -> str:
    """`file:line` of the first statement of `function`."""
    is_head = re.compile(rf"\.(entry|func)\b.*\b{re.escape(function)}\s*\(")
    inside = False
    for number, text in enumerate(ptx.splitlines(), 1):
        inside = inside or bool(is_head.search(text))
        if inside and PTX_LOC.match(text):
            return _location(ptx, number)
    return ""


def _faults(source: Path, compiled: Compiled) -> list[str]:
    """What may not be in a kernel, each with the place and ptxas' own words.

    Spills; and every "Potential Performance Loss": C7507 and C7508 (setmaxnreg ignored, so a warpgroup runs with
    registers that it was not given), C7510 to C7512 (wgmma serialised, about half the speed).
    """
    functions = _functions(compiled.log)
    if not functions:
        raise BuildError(f"{source.name}: the compiler's log holds no report of ptxas:\n{compiled.log}")
    faults = []
    for function in functions:
        if function.spill_stores or function.spill_loads:
            place = _start(compiled.ptx, function.name) or source.name
            words = f"{function.spill_stores} bytes spill stores, {function.spill_loads} bytes spill loads"
            faults.append(f"{place}: {function.name}: {words}")
    for line in compiled.log.splitlines():
        if "Potential Performance Loss" in line:
            # C7508 does not say which function it means.
            match = IN_FUNCTION.search(line)
            names = [match.group(1)] if match else ENTRY.findall(compiled.log)
            place = _start(compiled.ptx, names[0]) if len(names) == 1 else ""
            if around := AROUND_LINE.search(line):
                place = _location(compiled.ptx, int(around.group(1)))
            faults.append(f"{place or source.name}: {' or '.join(names)}: {line.split(':', 1)[1].strip()}")
    return faults


def _remarks(compiled: Compiled) -> list[str]:
    """Coded remarks of ptxas that are no fault, with the source line in place of the line of the PTX."""
    remarks = []
    for line in compiled.log.splitlines():
        if re.search(r"\(C\d+\)|warning", line) and "Potential Performance Loss" not in line:
            around = AROUND_LINE.search(line)
            place = _location(compiled.ptx, int(around.group(1))) if around else ""
            remarks.append(f"{place}: {line}" if place else line)
    return remarks


# --- build ------------------------------------------------------------------------------------------------------------


def _write(file: Path, content: bytes) -> None:
    """Whole or not at all: a process may be loading the old one."""
    with tempfile.NamedTemporaryFile(dir=file.parent, delete=False) as temporary:
        temporary.write(content)
    os.chmod(temporary.name, 0o644)
    os.replace(temporary.name, file)


def build(
    names: Sequence[str] = (),
    *,
    out: Path = CUBINS,
    kernels: Path = KERNELS,
    compiler: str = "nvrtc",
    defines: Sequence[str] = (),
    lax: bool = False,
    report: bool = False,
) -> dict[str, Any]:
    """Compile kernels to `out/NAME.cubin` and note how in `out/build.json`.

    Args:
        names: kernel files without ".cu"; none = all of them, and cubins in `out` that have no source are deleted.
        out, kernels: folders of the cubins and of the sources.
        compiler: "nvrtc" (from its wheel) or "nvcc" (from PATH).
        defines: `NAME=VALUE` for the preprocessor.
        lax: print faults (spills, wgmma serialised, setmaxnreg ignored) instead of raising.
        report: print registers and sizes per kernel, and ptxas' remarks.
    Returns: as `manifest`.
    Raises: BuildError: with the compiler's log, or the faults, one line each. The cubin of that kernel is then gone: an
        old one would run in place of what the source says.
    """
    sources = {source.stem: source for source in sorted(kernels.glob("*.cu"))}
    if not sources:
        raise BuildError(f"no kernels/*.cu in {kernels}: compiling needs a source checkout or the sdist")
    if unknown := [name for name in names if name not in sources]:
        raise BuildError(f"kernels must be among {sorted(sources)}, got {unknown}")
    out.mkdir(parents=True, exist_ok=True)
    for file in () if names else out.glob("*.cubin"):
        if file.stem not in sources:
            _forget(file.stem, out)
    for name in names or sources:
        begin = time.perf_counter()
        try:
            compiled = COMPILERS[compiler](sources[name], defines)
            faults = _faults(sources[name], compiled)
            if report:
                print(f"{name}.cubin: {compiled.compiler}, {time.perf_counter() - begin:.2f} s")
                _print_report(compiled)
            if faults:
                heading = f"{name}.cu compiles to what a kernel may not hold:"
                message = "\n".join([heading, *faults, *_remarks(compiled)])
                if not lax:
                    raise BuildError(message)
                print(message, file=sys.stderr)
        except BuildError:
            _forget(name, out)
            raise
        _write(out / f"{name}.cubin", compiled.cubin)
        _note(name, out, compiled, sources[name], defines)
    return manifest(out)


def _print_report(compiled: Compiled) -> None:
    print(f"  {len(compiled.cubin)} bytes")
    for function in _functions(compiled.log):
        kind = f"{function.registers} registers" if function.registers is not None else "not inlined"
        print(f"  {function.name}: {kind}, {function.stack} bytes of stack")
    for remark in _remarks(compiled):
        print(f"  {remark}")


def _note(name: str, out: Path, compiled: Compiled, source: Path, defines: Sequence[str]) -> None:
    _write_manifest(
        out,
        manifest(out)
        | {
            name: {
                "arch": ARCH,
                "compiler": compiled.compiler,
                "defines": list(defines),
                "bytes": len(compiled.cubin),
                "source": _digest(source),
                "functions": [asdict(function) for function in _functions(compiled.log)],
            }
        },
    )


def _forget(name: str, out: Path) -> None:
    (out / f"{name}.cubin").unlink(missing_ok=True)
    _write_manifest(out, {other: noted for other, noted in manifest(out).items() if other != name})


def _write_manifest(out: Path, kernels: dict[str, Any]) -> None:
    _write(out / MANIFEST, (json.dumps({"kernels": kernels}, indent=1, sort_keys=True) + "\n").encode())


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m flash_mla._build", description="Compile kernels/*.cu to cubins.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="kernel file without .cu; default: all")
    parser.add_argument("--compiler", choices=sorted(COMPILERS), default="nvrtc")
    parser.add_argument("--out", type=Path, default=CUBINS, help="default: where the package looks for them")
    parser.add_argument("-D", dest="defines", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--lax", action="store_true", help="print spills and serialised wgmma, do not fail on them")
    parser.add_argument("--check", action="store_true", help="compile nothing; fail if a cubin is not up to date")
    given = parser.parse_args(arguments)
    if given.check:
        problems = stale(given.out)
        print(*(problems or [f"{len(manifest(given.out))} cubins are up to date"]), sep="\n")
        return int(bool(problems))
    try:
        build(
            given.names,
            out=given.out,
            compiler=given.compiler,
            defines=given.defines,
            lax=given.lax,
            report=True,
        )
    except BuildError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
