"""Portable GPU kernels in Triton: decode with split KV, append, plan."""

from __future__ import annotations

import torch

from ..contract import AppendCall, DecodeCall


def decode_refusals(call: DecodeCall) -> list[str]:
    return ["not built yet"]


def append_refusals(call: AppendCall) -> list[str]:
    return ["not built yet"]


def num_items(call: DecodeCall) -> int:
    return call.batch


def plan(cache_seqlens: torch.Tensor, num_items: int) -> tuple[torch.Tensor, torch.Tensor]:
    raise NotImplementedError
