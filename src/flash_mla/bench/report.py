"""What a benchmark leaves behind: one JSON file that says on what machine, when and by which command."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import platform
import re
import shlex
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

__all__ = ["cpu", "machine", "to_json", "write_report"]

PACKAGES = ("transformers-flash-mla", "torch", "transformers", "accelerate", "safetensors", "triton", "huggingface-hub")


def version_of(package: str) -> str | None:
    """Installed version of a distribution, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def driver_version() -> str | None:
    """Version of the NVIDIA kernel driver, from /proc; None where there is none."""
    try:
        first = Path("/proc/driver/nvidia/version").read_text().splitlines()[0]
    except (OSError, IndexError):
        return None
    found = re.search(r"\b(\d+\.\d+(?:\.\d+)?)\b", first)
    return found.group(1) if found else first


def cpu() -> dict[str, Any]:
    """Name and number of this machine's processors."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return {"cpu": line.partition(":")[2].strip(), "cores": os.cpu_count()}
    return {"cpu": None, "cores": os.cpu_count()}


def machine(device: torch.device) -> dict[str, Any]:
    """Device, driver, versions and date of a measurement, for the head of a report."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        name = properties.name
        details: dict[str, Any] = {
            "sms": properties.multi_processor_count,
            "memory_GiB": round(properties.total_memory / 2**30, 1),
            "capability": f"{properties.major}.{properties.minor}",
        }
    else:
        name, details = platform.processor() or platform.machine(), {"threads": torch.get_num_threads()}
    return {
        "device": name,
        **details,
        "driver": driver_version(),
        "cuda": torch.version.cuda or torch.version.hip,
        "python": platform.python_version(),
        "versions": {package: version_of(package) for package in PACKAGES},
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def to_json(report: dict[str, Any]) -> str:
    """`report` as JSON with the command line added."""
    return json.dumps({**report, "command": shlex.join(["flash-mla", *sys.argv[1:]])}, indent=1)


def write_report(out: Path, name: str, report: dict[str, Any]) -> Path:
    """Write `report` as JSON with the command line added; return the file.

    Args:
        out: a file ending in .json, or a folder, which is created.
        name: stem of the file inside a folder; the date (UTC, to the second) is added.
        report: starts with what `machine` returned.
    """
    if out.suffix != ".json":
        stamp = datetime.datetime.now(datetime.timezone.utc).strftime("%Y%m%dT%H%M%SZ")
        out = out / f"{re.sub(r'[^A-Za-z0-9_.-]+', '-', name)}-{stamp}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(to_json(report) + "\n")
    return out
