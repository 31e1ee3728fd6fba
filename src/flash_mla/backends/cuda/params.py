"""The parameter structs of `kernels/params.cuh`, byte for byte, and how they are packed."""

from __future__ import annotations

import struct

__all__ = [
    "COMBINE",
    "COMBINE_ADDRESSES",
    "COMBINE_FIELDS",
    "DECODE",
    "DECODE_ADDRESSES",
    "DECODE_FIELDS",
    "FP8_DECODE",
    "FP8_DECODE_FIELDS",
    "GATHER",
    "GATHER_FIELDS",
    "TENSOR_MAP_BYTES",
]

TENSOR_MAP_BYTES = 128

# (name, struct code) in the order of the C++ fields, after the two tensor maps of DecodeParams.
DECODE_FIELDS = (
    ("out", "Q"),
    ("lse", "Q"),
    ("o_partial", "Q"),
    ("partial_sums", "Q"),
    ("items", "Q"),
    ("splits", "Q"),
    ("block_table", "Q"),
    ("cache_seqlens", "Q"),
    ("table_stride_request", "q"),
    ("table_stride_page", "q"),
    ("seqlens_stride", "q"),
    ("softmax_scale_log2", "f"),
    ("batch", "i"),
    ("max_blocks", "i"),
    ("seqlen_q", "i"),
    ("num_heads", "i"),
    ("group", "i"),
    ("row_tiles", "i"),
    ("tiles", "i"),
    ("num_slots", "i"),
    ("block_size", "i"),
    ("box_rows", "i"),
    ("is_causal", "i"),
)
COMBINE_FIELDS = (
    ("out", "Q"),
    ("lse", "Q"),
    ("o_partial", "Q"),
    ("partial_sums", "Q"),
    ("items", "Q"),
    ("splits", "Q"),
    ("by_slot", "i"),
    ("first_request", "i"),
    ("first_slot", "i"),
    ("seqlen_q", "i"),
    ("num_heads", "i"),
    ("num_slots", "i"),
)
# Tensor maps are aligned to 64 bytes, and so is the struct that holds them.
_fields = "".join(code for _, code in DECODE_FIELDS)
_used = struct.calcsize(f"={2 * TENSOR_MAP_BYTES}s{_fields}")
DECODE = struct.Struct(f"={TENSOR_MAP_BYTES}s{TENSOR_MAP_BYTES}s{_fields}{-_used % 64}x")
# Fp8DecodeParams: DecodeParams, the map of the scales, and these.
FP8_DECODE_FIELDS = (("q", "Q"), ("q_stride_request", "q"), ("q_stride_row", "q"), ("q_stride_head", "q"))
_fields = "".join(code for _, code in FP8_DECODE_FIELDS)
_used = struct.calcsize(f"={DECODE.size}s{TENSOR_MAP_BYTES}s{_fields}")
FP8_DECODE = struct.Struct(f"={DECODE.size}s{TENSOR_MAP_BYTES}s{_fields}{-_used % 64}x")
# GatherParams: DecodeParams, of whose maps at most that of the queries is used, and these.
GATHER_FIELDS = (
    ("q", "Q"),
    ("q_stride_request", "q"),
    ("q_stride_row", "q"),
    ("q_stride_head", "q"),
    ("pool", "Q"),
    ("row_stride", "I"),
    ("num_places", "i"),
    ("page_stride", "I"),
    ("head_stride", "I"),
)
_fields = "".join(code for _, code in GATHER_FIELDS)
_used = struct.calcsize(f"={DECODE.size}s{_fields}")
GATHER = struct.Struct(f"={DECODE.size}s{_fields}{-_used % 64}x")
_fields = "".join(code for _, code in COMBINE_FIELDS)
COMBINE = struct.Struct(f"={_fields}{-struct.calcsize(f'={_fields}') % 8}x")
# The addresses alone, which differ from call to call: behind the tensor maps, and at the beginning.
DECODE_ADDRESSES = struct.Struct("=8Q")
COMBINE_ADDRESSES = struct.Struct("=6Q")
