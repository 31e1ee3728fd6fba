"""Where a step's device time goes: busy time and kernels per step, in all and of our own kernels, from torch.profiler.

Our kernels are known by their names. The products of absorption (q W_UK, out W_UV) are cuBLAS kernels with names that
say nothing: they are found by the aten::bmm that launched them and its shapes. In the replay of a CUDA graph no kernel
has such an operator, so only the groups known by name are there.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

__all__ = ["PROFILED_STEPS", "Kernel", "StepProfiler", "absorb_gemms", "busy_us", "device_time", "kernels_of"]

PROFILED_STEPS = 4

# (name, start in us, duration in us)
Kernel = tuple[str, float, float]
# Shapes of the two inputs of an aten::bmm -> what it is for.
Gemms = Mapping[tuple[tuple[int, ...], tuple[int, ...]], str]

# Beginnings of kernel names, of both backends with kernels. The last two are given by `kernels_of`.
GROUPS = {
    "plan": ("plan_",),
    "slots": ("next_slots",),
    "append": ("append_",),
    "decode": ("flash_fwd_splitkv", "flash_fwd_mla_combine", "decode_kernel", "merge_kernel"),
    "absorb": ("absorb:",),
    "un-absorb": ("un-absorb:",),
}
DEVICE_WORK = ("kernel", "gpu_memcpy", "gpu_memset")


def busy_us(kernels: Iterable[Kernel]) -> float:
    """Microseconds in which at least one of `kernels` ran.

    Not the sum of their durations: the merge of partial results is launched early (programmatic dependent launch) and
    waits on the device for the splits, so both are there at the same time.
    """
    total, end = 0.0, float("-inf")
    for _, start, duration in sorted(kernels, key=lambda kernel: kernel[1]):
        total += max(0.0, start + duration - max(start, end))
        end = max(end, start + duration)
    return total


def device_time(kernels: Sequence[Kernel], steps: int) -> dict[str, Any]:
    """Busy time and number of kernels per step.

    Args:
        kernels: of `steps` steps: (name, start in us, duration in us).
        steps: at least 1.
    Returns: `busy_us` and `kernels` per step; under `groups` the same for each group that was seen.
    """

    def per_step(some: Sequence[Kernel]) -> dict[str, float]:
        return {"busy_us": round(busy_us(some) / steps, 2), "kernels": round(len(some) / steps, 2)}

    members = {group: [kernel for kernel in kernels if kernel[0].startswith(names)] for group, names in GROUPS.items()}
    return {
        "steps": steps,
        **per_step(kernels),
        "groups": {group: per_step(own) for group, own in members.items() if own},
    }


def absorb_gemms(config: Any, batch: int) -> Gemms:
    """The batched products of one absorbed decode token per row: shapes of their inputs and which of the two it is.

    Args:
        config: a text config with the dims of MLA; one without has no such products.
        batch: rows.
    """
    names = ("num_attention_heads", "qk_nope_head_dim", "kv_lora_rank", "v_head_dim")
    dims = [getattr(config, name, None) for name in names]
    if not all(isinstance(dim, int) for dim in dims):
        return {}
    num_heads, nope, rank, v = (int(dim) for dim in dims if dim is not None)
    return {
        ((num_heads, batch, nope), (num_heads, nope, rank)): "absorb",
        ((num_heads, batch, rank), (num_heads, rank, v)): "un-absorb",
    }


def gemm_operators(events: Iterable[Mapping[str, Any]], gemms: Gemms) -> dict[int, str]:
    """External ids of the aten::bmm operators of a trace that are one of `gemms`, and which."""
    found = {}
    for event in events:
        if event.get("name") == "aten::bmm":
            arguments = event["args"]
            shapes = tuple(tuple(dims) for dims in arguments.get("Input Dims", ())[:2])
            if shapes in gemms:
                found[arguments["External id"]] = gemms[shapes]  # type: ignore[index]
    return found


def kernels_of(events: Sequence[Mapping[str, Any]], gemms: Gemms) -> list[Kernel]:
    """What ran on the device, from the events of a trace: kernels, copies and fills.

    Args:
        events: `traceEvents` of a file that torch.profiler wrote, recorded with shapes.
        gemms: from `absorb_gemms`; the name of their kernels gets "absorb: " or "un-absorb: " before it.
    """
    operators = gemm_operators(events, gemms)
    kernels = []
    for event in events:
        if event.get("cat") in DEVICE_WORK:
            group = operators.get(event.get("args", {}).get("External id"))
            name = f"{group}: {event['name']}" if group else event["name"]
            kernels.append((name, float(event["ts"]), float(event["dur"])))
    return kernels


class StepProfiler:
    """Records the device from `start` to `stop`; the caller waits for the device before both.

    Args:
        gemms: from `absorb_gemms`.
    """

    def __init__(self, gemms: Gemms) -> None:
        self.gemms = gemms
        activities = [torch.profiler.ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        self.profile = torch.profiler.profile(activities=activities, record_shapes=True)

    def start(self) -> None:
        """Begin to record."""
        self.profile.start()

    def events(self) -> list[dict[str, Any]]:
        """End the recording; return the events of its trace."""
        self.profile.stop()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "trace.json"
            self.profile.export_chrome_trace(str(path))
            events: list[dict[str, Any]] = json.loads(path.read_text())["traceEvents"]
        return events

    def stop(self, steps: int = PROFILED_STEPS) -> dict[str, Any]:
        """End the recording; return its `device_time` over so many steps."""
        return device_time(kernels_of(self.events(), self.gemms), steps)
