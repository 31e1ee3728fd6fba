"""The compiled Hopper kernels (`kernels/*.cu`), launched through the NVIDIA driver: no C++ of torch, no compiler."""

from .append import append, append_refusals
from .decode import decode, decode_refusals, num_slots, runs_on
from .plan import plan
from .slots import next_slots
from .sparse import sparse_decode
from .step import ready_step

__all__ = [
    "append",
    "append_refusals",
    "decode",
    "decode_refusals",
    "next_slots",
    "num_slots",
    "plan",
    "ready_step",
    "runs_on",
    "sparse_decode",
]
