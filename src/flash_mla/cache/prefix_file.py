"""What a file of a stored prefix is: a safetensors file, its header, its digest, and the hashes that name it.

Tensors, one row per token, position 0 first:

| name | shape | dtype |
|---|---|---|
| `layers.<n>.rows` | `[num_tokens, kv_lora_rank + qk_rope_head_dim]`, latent then rotated key | that of the latents |
| the same, FP8 | `[num_tokens, row_bytes]`, see `flash_mla.codec` | uint8 |
| `layers.<n>.indexer_keys` | `[num_tokens, index_head_dim]`, models with an indexer | as computed |

The header is JSON under `flash_mla_prefix` in the file's metadata: `format_version`, `key`, `num_tokens`, `chain`,
`identity` (of the model), `layers` (kv_lora_rank, qk_rope_head_dim and dtype of each), `written_by` (versions; not
compared), and `sha256`. That finds accidents; it is no signature. It is taken over the rest of the header, and then for
each tensor, in the order of names, over `name dtype shape;` and the SHA-256 (32 bytes) of every 4 MiB of it, the last
part being what is left. The parts are hashed on all cores: one core with SHA instructions takes 0.58 s for the 972 MiB
of 32,768 tokens of DeepSeek-V2-Lite, which an H200 computes in 0.8 s.

Version 1 had the tensors themselves in the place of their parts' digests. Its files are refused: their names are hashes
of the version too, so that no prompt finds one, and a prefix is computed again sooner than a second format is kept.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from .identity import hash_of

__all__ = ["FORMAT_VERSION", "LINK_TOKENS", "TokenChain", "read", "read_header", "write"]

FORMAT_VERSION = 2
LINK_TOKENS = 64  # between two links of a chain: what a prefix that is longer than what fits is cut to
METADATA_KEY = "flash_mla_prefix"
LARGEST_HEADER = 100_000_000  # bytes; safetensors' own limit
PART_BYTES = 4 << 20  # of the format: another size is another version
MOST_THREADS = 16  # each hashes 1 to 2 GB/s: more would wait for memory


class TokenChain:
    """Hashes of the beginnings of a row of tokens, each made from the one before it and the tokens since.

    The first is made from the format version and the model's identity, so equal hashes mean equal model and tokens.

    Args:
        identity: of the model.
        tokens: int64 `[num_tokens]`, on the CPU.

    Attributes:
        links: after 64, 128, ... tokens; 64 hex digits each.
    """

    def __init__(self, identity: dict[str, Any], tokens: torch.Tensor) -> None:
        self.folder = hash_of([FORMAT_VERSION, identity])
        self.links: list[str] = []
        self._bytes: bytes = tokens.numpy().astype("<i8").tobytes()
        for begin in range(0, len(tokens) - LINK_TOKENS + 1, LINK_TOKENS):
            self.links.append(self._next(begin, begin + LINK_TOKENS))

    def _next(self, begin: int, end: int) -> str:
        before = self.links[begin // LINK_TOKENS - 1] if begin else self.folder
        return hashlib.sha256(bytes.fromhex(before) + self._bytes[8 * begin : 8 * end]).hexdigest()

    def key(self, num_tokens: int) -> str:
        """Hash of the first `num_tokens` tokens, at least 1 and at most as many as there are."""
        full = num_tokens // LINK_TOKENS
        return self.links[full - 1] if num_tokens == full * LINK_TOKENS else self._next(full * LINK_TOKENS, num_tokens)

    def common(self, header: dict[str, Any]) -> int:
        """Tokens that a stored prefix has in common with these: all that it has, or as many links as are equal."""
        num_tokens = header["num_tokens"]
        if num_tokens * 8 <= len(self._bytes) and self.key(num_tokens) == header["key"]:
            return int(num_tokens)
        equal = [one == other for one, other in zip(self.links, header["chain"], strict=False)]
        return LINK_TOKENS * (equal.index(False) if False in equal else len(equal))


def _digest(header: dict[str, Any], tensors: dict[str, torch.Tensor]) -> str:
    rest = {name: value for name, value in header.items() if name != "sha256"}
    digest = hashlib.sha256(json.dumps(rest, sort_keys=True).encode())
    # Parts of all tensors at once; digests come back in order. hashlib lets go of the GIL, and what is mapped from
    # a file is read from the disk by the thread that hashes it.
    with ThreadPoolExecutor(_num_threads()) as pool:
        found = {name: pool.map(_digest_of_part, _parts(tensors[name])) for name in sorted(tensors)}
        for name, parts in found.items():
            tensor = tensors[name]
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
            for part in parts:
                digest.update(part)
    return digest.hexdigest()


def _num_threads() -> int:
    """Cores that this process may use, up to 16."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, MOST_THREADS)


def _parts(tensor: torch.Tensor) -> list[memoryview]:
    """The bytes of a tensor in pieces of `PART_BYTES`, the last one shorter; none of an empty one."""
    rows = tensor.contiguous().view(-1).view(torch.uint8).numpy().data
    return [rows[begin : begin + PART_BYTES] for begin in range(0, len(rows), PART_BYTES)]


def _digest_of_part(part: memoryview) -> bytes:
    return hashlib.sha256(part).digest()


def write(path: Path, header: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    """Write a whole file and wait until it is on the disk.

    Args:
        path: of the file; not yet the name under which it is found.
        header: without version and digest, which are added.
        tensors: on the CPU.
    """
    header = {**header, "format_version": FORMAT_VERSION}
    header["sha256"] = _digest(header, tensors)
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    # safetensors makes files that nobody else may read: a shared folder is for those whom the umask lets in.
    path.touch()
    mode = path.stat().st_mode
    save_file(tensors, path, metadata={METADATA_KEY: json.dumps(header, sort_keys=True)})
    path.chmod(mode)
    # Without this a power failure after the rename may leave the name with no bytes behind it.
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def read_header(file: BinaryIO, name: str) -> dict[str, Any]:
    """The header alone, a few KiB; the tensors are not looked at.

    Args:
        file: open at its beginning.
        name: for messages.
    Raises: ValueError: no such file, cut off, or of another version.
    """
    start = file.read(8)
    size = struct.unpack("<Q", start)[0] if len(start) == 8 else LARGEST_HEADER + 1
    text = file.read(size) if size <= LARGEST_HEADER else b""
    if size > LARGEST_HEADER or len(text) < size:
        raise ValueError(
            f"{name}: must begin with the header of a safetensors file, got {len(start + text)} bytes of it"
        )
    try:
        header = json.loads(json.loads(text)["__metadata__"][METADATA_KEY])
        version = header["format_version"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{name}: must have a JSON header under {METADATA_KEY!r} in its metadata, got {error!r}"
        ) from error
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{name}: format version must be {FORMAT_VERSION}, got {version!r}: delete it, and save the prefix again"
        )
    checked: dict[str, Any] = header
    return checked


def read(path: Path, name: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Header and tensors of a file, on the CPU, after its digest was found right.

    Args:
        path: of the file or of a local copy.
        name: for messages.
    Raises: ValueError: no file of this format and version, cut off or changed. FileNotFoundError: no file.
    """
    with path.open("rb") as file:
        header = read_header(file, name)
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError(
            f"{name}: must be a whole safetensors file, got {path.stat().st_size} bytes ({error})"
        ) from error
    found = _digest(header, tensors)
    if found != header.get("sha256"):
        raise ValueError(
            f"{name}: header and tensors must have SHA-256 {header.get('sha256')}, got {found}: changed since written"
        )
    return header, tensors
