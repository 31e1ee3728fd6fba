"""What a decode call must do: shapes, their names and classes, bytes, FLOP and the floor that these make.

Plain arithmetic: nothing here touches a device. Times are milliseconds; bytes and FLOP are what the definition needs,
each latent read once (by sparse calls: each row once for every query that names it).
"""

from __future__ import annotations

import math
import random
from dataclasses import asdict, dataclass
from typing import Any

from ..codec import row_layout

__all__ = [
    "CLASSES",
    "FLOOR_BYTES_PER_S",
    "FLOOR_FLOP_PER_S",
    "FP8_SHAPES",
    "SHAPES",
    "SPARSE_SEQLEN_K",
    "DecodeShape",
    "Work",
    "class_of",
    "name_of",
    "sparse_shapes",
    "work_of",
]

# What the floor divides by unless told otherwise: an H200's copy bandwidth and matrix rate, as the anchors' floors do.
FLOOR_BYTES_PER_S = 4.3e12
FLOOR_FLOP_PER_S = 790e12

# Bytes of an index that a sparse call reads: int32.
INDEX_BYTES = 4
# Tokens per request of sparse shapes for which nothing else is said: what is read does not depend on it.
SPARSE_SEQLEN_K = 32768


def name_of(row: dict[str, Any]) -> str:
    """Short name of a shape from its fields, unique among the shapes of one table; reports of earlier versions have
    neither `fp8` nor `topk`."""
    topk = f" top{row['topk']}" if row.get("topk") is not None else ""
    suffix = " varlen" * row["varlen"] + " fp8" * row.get("fp8", False)
    return f"b{row['batch']} q{row['seqlen_q']} k{row['seqlen_k']}{topk} h{row['num_heads']}{suffix}"


@dataclass(frozen=True)
class DecodeShape:
    """One decode call: `batch` requests of about `seqlen_k` cached tokens, causal when `seqlen_q` > 1.

    Attributes:
        fp8: the cache holds FP8 rows (`flash_mla.codec`); queries and outputs are of the dtype as ever.
        topk: each query names so many rows of its request and reads no other; None: it reads all that it may see.

    Raises: ValueError: FP8 rows that the latent cannot have, or a sparse shape that is ragged or names more rows than
        a request has.
    """

    batch: int
    seqlen_q: int
    seqlen_k: int
    num_heads: int
    varlen: bool = False
    kv_lora_rank: int = 512
    qk_rope_head_dim: int = 64
    block_size: int = 64
    fp8: bool = False
    topk: int | None = None

    def __post_init__(self) -> None:
        if self.fp8:
            row_layout(self.kv_lora_rank, self.qk_rope_head_dim)
        if self.topk is None:
            return
        if self.varlen:
            raise ValueError(
                f"flash_mla.bench: topk must come without varlen (topk rows are read whatever the length), got topk="
                f"{self.topk} and varlen"
            )
        if not 1 <= self.topk <= self.seqlen_k:
            raise ValueError(f"flash_mla.bench: topk must be in 1..seqlen_k={self.seqlen_k}, got {self.topk}")

    @property
    def name(self) -> str:
        """Short and unique among the shapes of one table."""
        return name_of(asdict(self))

    def row_bytes(self, itemsize: int = 2) -> int:
        """Bytes of a row of the cache; `itemsize` is that of the dtype, in bytes."""
        if self.fp8:
            return row_layout(self.kv_lora_rank, self.qk_rope_head_dim).row_bytes
        return self.d_qk * itemsize

    @property
    def d_qk(self) -> int:
        """Columns of a latent row."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def softmax_scale(self) -> float:
        """That of a model whose `qk_nope_head_dim` is a quarter of the latent, as in DeepSeek-V2 and V3."""
        return 1 / math.sqrt(self.kv_lora_rank // 4 + self.qk_rope_head_dim)

    def lengths(self) -> list[int]:
        """Tokens per request; varlen: normal around `seqlen_k`, half of it as deviation, seeded by shape."""
        if not self.varlen:
            return [self.seqlen_k] * self.batch
        draw = random.Random(self.batch * 131 + self.seqlen_q * 17 + self.seqlen_k + self.num_heads)
        return [
            int(max(draw.normalvariate(self.seqlen_k, self.seqlen_k / 2), self.seqlen_q)) for _ in range(self.batch)
        ]


# From one short request (latency) to what fills the device for milliseconds: bound by memory, and by the tensor cores.
SHAPES = (
    DecodeShape(1, 1, 4096, 16),
    DecodeShape(1, 1, 65536, 16),
    DecodeShape(1, 1, 65536, 128),
    DecodeShape(4, 1, 16384, 128),
    DecodeShape(16, 1, 4096, 16),
    DecodeShape(32, 1, 8192, 32),
    DecodeShape(64, 1, 32768, 16),
    DecodeShape(128, 1, 1024, 128),
    DecodeShape(128, 1, 4096, 128, varlen=True),
    DecodeShape(128, 1, 32768, 128),
    DecodeShape(128, 2, 4096, 128, varlen=True),
    DecodeShape(132, 1, 4096, 64),
    DecodeShape(132, 1, 16384, 128),
    DecodeShape(256, 1, 4096, 32),
)

# Few query rows, where FP8 rows pay: one request, and batches with contexts of 1,024 to 32,768 tokens.
FP8_SHAPES = tuple(
    DecodeShape(batch, 1, seqlen_k, num_heads, fp8=True)
    for batch, seqlen_k in ((1, 4096), (1, 65536), (16, 4096), (64, 4096), (64, 32768), (256, 1024))
    for num_heads in (16, 32)
)


def sparse_shapes(topk: int, fp8: bool = False) -> tuple[DecodeShape, ...]:
    """From one request to a full device at 128 heads, two queries per request, and few heads.

    Raises: ValueError: topk is not in 1..SPARSE_SEQLEN_K.
    """
    return tuple(
        DecodeShape(batch, seqlen_q, SPARSE_SEQLEN_K, num_heads, fp8=fp8, topk=topk)
        for batch, seqlen_q, num_heads in ((1, 1, 128), (32, 1, 128), (128, 1, 128), (128, 2, 128), (128, 1, 16))
    )


CLASSES = ("batch <= 4", "memory-bound, 16-64 rows", "compute-bound, >= 128 rows", "other", "sparse")


def class_of(batch: int, seqlen_q: int, num_heads: int, topk: int | None = None) -> str:
    """Which of `CLASSES` a shape belongs to, by its requests and its query rows per request."""
    if topk is not None:
        return CLASSES[4]
    rows = seqlen_q * num_heads
    if batch <= 4:
        return CLASSES[0]
    if 16 <= rows <= 64:
        return CLASSES[1]
    return CLASSES[2] if rows >= 128 else CLASSES[3]


@dataclass(frozen=True)
class Work:
    """What one call must move and compute.

    Attributes:
        bytes: latents, queries and outputs once each; of sparse calls the named rows and their indices.
        flop: 2 per multiply-add of the attended (query, key) pairs, d_qk for the score and kv_lora_rank for the value.
        floor_ms: the longer of the two at the speed of the device.
    """

    bytes: int
    flop: int
    floor_ms: float

    @property
    def bound(self) -> str:
        """Which of the two the floor is made of."""
        return "mem" if math.isclose(self.floor_ms, self.bytes / FLOOR_BYTES_PER_S * 1e3) else "flop"


def work_of(
    shape: DecodeShape,
    itemsize: int = 2,
    bytes_per_s: float = FLOOR_BYTES_PER_S,
    flop_per_s: float = FLOOR_FLOP_PER_S,
) -> Work:
    """Bytes, FLOP and floor of one call; `itemsize` is that of the dtype, in bytes.

    FP8 rows are multiplied as `dtype`: they have fewer bytes and the same FLOP at the same rate.
    """
    queries = shape.batch * shape.seqlen_q
    in_and_out = queries * shape.num_heads * (shape.d_qk + shape.kv_lora_rank) * itemsize
    if shape.topk is not None:
        pairs = queries * shape.topk
        num_bytes = in_and_out + pairs * (shape.row_bytes(itemsize) + INDEX_BYTES)
    else:
        lengths = shape.lengths()
        num_bytes = in_and_out + sum(lengths) * shape.row_bytes(itemsize)
        # Query j of seqlen_q sees `length - (seqlen_q - 1 - j)` keys.
        pairs = sum(max(length - late, 0) for length in lengths for late in range(shape.seqlen_q))
    flop = pairs * shape.num_heads * 2 * (shape.d_qk + shape.kv_lora_rank)
    return Work(num_bytes, flop, max(num_bytes / bytes_per_s, flop / flop_per_s) * 1e3)
