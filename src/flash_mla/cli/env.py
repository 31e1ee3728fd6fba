"""What `flash-mla env` knows: versions, compiled kernels, devices with their backend, and what shadows this package."""

from __future__ import annotations

import os
import platform
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape

from .. import _build
from ..backends.cuda import driver
from ..bench.report import PACKAGES, driver_version, version_of
from ..contract import LATENT_SHAPES
from ..ops import backend_reasons, call_to_come

__all__ = ["compiled_kernels", "environment", "others_named_flash_mla", "problems", "show"]

DISTRIBUTION = "transformers-flash-mla"

# Exit codes for scripts; 1 and 2 are those of any failure and of wrong options.
IN_THE_WAY, NOT_REGISTERED, KERNELS, REQUIRED, NO_BACKEND = 3, 4, 5, 6, 7


def others_named_flash_mla(own: Path | None = None, path: list[str] | None = None) -> list[str]:
    """What else on this Python's path calls itself `flash_mla`: files that may be imported in our place.

    Args:
        own: folder of the package that is running; default: this one.
        path: folders to look in; default `sys.path`.
    Returns: one line each; empty = nothing in the way.
    """
    own = (own or Path(__file__).parent.parent).resolve()
    folders = [Path(entry or ".") for entry in (sys.path if path is None else path)]
    found = []
    for folder in dict.fromkeys(folder.resolve() for folder in folders):
        if not folder.is_dir():
            continue
        candidate = folder / "flash_mla"
        if candidate.is_dir() and candidate.resolve() != own:
            found.append(f"another package flash_mla: {candidate}")
        found += [f"a module of that name: {file}" for file in sorted(folder.glob("flash_mla.*")) if file.is_file()]
    for distribution in metadata.distributions(path=[str(folder) for folder in folders]):
        name = distribution.metadata["Name"] or ""
        if name.lower().replace("_", "-") == DISTRIBUTION:
            continue
        files = [file for file in distribution.files or [] if file.parts and file.parts[0] == "flash_mla"]
        if files or name.lower().replace("_", "-") == "flash-mla":
            found.append(
                f"distribution {name} {distribution.version} installs into flash_mla/: pip uninstall {name}, then "
                f"reinstall {DISTRIBUTION}"
            )
    return list(dict.fromkeys(found))


def _backends(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Which backend takes a decode call on `device` at each published latent shape, which could, and why others not."""
    chosen: dict[str, list[str]] = {}
    could: dict[str, list[str]] = {}
    refused: dict[str, list[str]] = {}
    for kv_lora_rank, qk_rope_head_dim in LATENT_SHAPES:
        call = call_to_come(
            device,
            batch=1,
            seqlen_q=1,
            num_heads=16,
            h_kv=1,
            kv_lora_rank=kv_lora_rank,
            qk_rope_head_dim=qk_rope_head_dim,
            dtype=dtype,
        )
        shape = f"{kv_lora_rank}+{qk_rope_head_dim}"
        reasons = backend_reasons(call)
        name = next((name for name, why in reasons.items() if not why), None)
        chosen.setdefault(str(name), []).append(shape)
        for other, why in reasons.items():
            if not why:
                could.setdefault(other, []).append(shape)
            for reason in why:
                if reason not in refused.setdefault(other, []):
                    refused[other].append(reason)
    return {"runs": chosen, "accepts": could, "refused": {name: why for name, why in refused.items() if why}}


def compiled_kernels() -> dict[str, Any]:
    """What is known of the package's cubins: files, how they were compiled, and why the host cannot run them.

    Returns: `cubins` (bytes, arch, compiler and defines by file), `stale` (in a checkout: what is not what the sources
        would compile to) and `unavailable` (a reason, or None).
    """
    noted = _build.manifest(_build.CUBINS)
    cubins = {
        file.name: {"bytes": file.stat().st_size}
        | {key: noted.get(file.stem, {}).get(key) for key in ("arch", "compiler", "defines")}
        for file in sorted(_build.CUBINS.glob("*.cubin"))
    }
    stale = _build.stale(_build.CUBINS, _build.KERNELS) if cubins and _build.KERNELS.is_dir() else []
    return {"cubins": cubins, "stale": stale, "unavailable": driver.unavailable()}


def environment() -> dict[str, Any]:
    """Everything `flash-mla env` prints, as plain values."""
    devices = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        devices.append(
            {
                "name": properties.name,
                "device": f"cuda:{index}",
                "capability": f"{properties.major}.{properties.minor}",
                "memory_GiB": round(properties.total_memory / 2**30, 1),
                "sms": properties.multi_processor_count,
                **_backends(torch.device("cuda", index), torch.bfloat16),
            }
        )
    devices.append(
        {
            "name": platform.processor() or platform.machine(),
            "device": "cpu",
            "threads": torch.get_num_threads(),
            **_backends(torch.device("cpu"), torch.float32),
        }
    )
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": {package: version_of(package) for package in PACKAGES},
        "package": str(Path(__file__).parent.parent),
        "torch_built_for": torch.version.cuda or torch.version.hip or "cpu",
        "driver": driver_version(),
        "triton_interpret": os.environ.get("TRITON_INTERPRET") == "1",
        "compiled_kernels": compiled_kernels(),
        "transformers": _registered(),
        "devices": devices,
        "in_the_way": others_named_flash_mla(),
    }


def _registered() -> str:
    """Whether this Transformers knows "flash_mla", in words."""
    try:
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
    except ImportError as error:
        return f"cannot be imported: {error}"
    if "flash_mla" in ALL_ATTENTION_FUNCTIONS:
        return 'attn_implementation="flash_mla" is registered'
    return 'attn_implementation="flash_mla" is NOT registered'


def problems(report: dict[str, Any], required: str | None = None) -> list[dict[str, Any]]:
    """What is wrong with this machine's set-up.

    Args:
        report: of `environment`.
        required: a backend that has to take decode calls on some device, be it that another one comes first there.
    Returns: `exit_code` and `what` of each, in the order of the codes; empty: nothing. No GPU is nothing wrong.
    """
    found = [(IN_THE_WAY, line) for line in report["in_the_way"]]
    if not report["transformers"].endswith(" is registered"):
        found.append((NOT_REGISTERED, f"Transformers: {report['transformers']}"))
    kernels, devices = report["compiled_kernels"], report["devices"]
    found += [(KERNELS, f"{problem}: python -m flash_mla._build") for problem in kernels["stale"]]
    hopper = [device["device"] for device in devices if device.get("capability") == "9.0"]
    if hopper and not kernels["cubins"]:
        found.append((KERNELS, f"no compiled kernels for {', '.join(hopper)}: {kernels['unavailable']}"))
    if required is not None and not any(required in device["accepts"] for device in devices):
        reasons = [
            f"{device['device']}: {reason}" for device in devices for reason in device["refused"].get(required, [])
        ]
        if report["driver"] is not None and len(devices) == 1:
            reasons.append(
                f"NVIDIA driver {report['driver']} is there, but torch {report['versions']['torch']}, built for "
                f"{report['torch_built_for']}, sees no GPU"
            )
        found.append((REQUIRED, f"backend {required} does not run here: {'; '.join(reasons)}"))
    found += [
        (NO_BACKEND, f"no backend takes latent+rope {', '.join(device['runs']['None'])} on {device['device']}")
        for device in devices
        if "None" in device["runs"]
    ]
    return [{"exit_code": code, "what": what} for code, what in found]


def show(report: dict[str, Any], console: Console) -> None:
    """Print what `environment` returned."""

    def line(name: str, value: object) -> None:
        console.print(f"[bold]{name:<18}[/bold] {escape(str(value))}", highlight=False, soft_wrap=True)

    line("python", f"{report['python']} on {report['platform']}")
    for package, version in report["versions"].items():
        line(package, version or "not installed")
    line("package", report["package"])
    line("torch built for", report["torch_built_for"])
    line("NVIDIA driver", report["driver"] or "none found")
    kernels = report["compiled_kernels"]
    for made in sorted({(cubin["arch"], cubin["compiler"]) for cubin in kernels["cubins"].values()}, key=str):
        cubins = {
            name.removesuffix(".cubin"): cubin["bytes"]
            for name, cubin in kernels["cubins"].items()
            if (cubin["arch"], cubin["compiler"]) == made
        }
        words = f"{', '.join(cubins)} ({made[0]}, {made[1]}, {sum(cubins.values()) / 1024:.0f} KiB)"
        line("compiled kernels", words)
    if not kernels["cubins"]:
        line("compiled kernels", "none")
    for problem in kernels["stale"]:
        line("  OUT OF DATE", f"{problem}: python -m flash_mla._build")
    if kernels["unavailable"]:
        line("  cannot run", kernels["unavailable"])
    else:
        line("  can run", "on devices of compute capability 9.0")
    line("transformers", report["transformers"])
    if report["triton_interpret"]:
        line("TRITON_INTERPRET", "1: Triton kernels run in the interpreter, slowly")
    for device in report["devices"]:
        details = ", ".join(
            f"{key} {device[key]}" for key in ("capability", "memory_GiB", "sms", "threads") if key in device
        )
        line(device["device"], f"{device['name']} ({details})")
        for name, shapes in device["runs"].items():
            line("  decode runs on", f"{name} (latent+rope {', '.join(shapes)})")
        for name, reasons in device["refused"].items():
            line(f"  not {name}", "; ".join(reasons))
    for problem in report["in_the_way"]:
        line("IN THE WAY", problem)
    if not report["in_the_way"]:
        line("in the way", "nothing else named flash_mla on this Python's path")
