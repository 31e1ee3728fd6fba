"""Which model a stored prefix is of: name, shape, positions, and a fingerprint of the weights that act."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any

import torch

from ..contract import UnsupportedError

__all__ = ["check_text_only", "differences", "fingerprint", "hash_of", "identity_of", "longest_stable"]

# Elements read of each tensor, evenly spaced. A fine-tuned or merged model differs nearly everywhere; what differs in
# fewer than one element of 64 of one tensor may pass for the same.
SAMPLES = 64
NOT_TEXT = ("image_token_id", "image_token_index", "video_token_id", "audio_token_id")


def identity_of(model: Any, model_id: str | None, is_fp8: bool) -> dict[str, Any]:
    """All that latents depend on besides the tokens, as plain JSON values.

    Args:
        model: the loaded model.
        model_id: in place of the name or path that it was loaded from; None: that one.
        is_fp8: whether rows are FP8 rows.
    Raises: UnsupportedError: weights are offloaded, so that it cannot be told which they are.
    """
    model = getattr(model, "_orig_mod", model)  # torch.compile's wrapper
    config = model.config.get_text_config(decoder=True)
    per_layer = getattr(config, "per_layer_config", None) or [config]
    dims = {(getattr(one, "kv_lora_rank", None), getattr(one, "qk_rope_head_dim", None)) for one in per_layer}
    made = {
        "model_id": model_id or model.config._name_or_path,
        "revision": getattr(model.config, "_commit_hash", None),
        "architecture": type(model).__name__,
        "model_type": config.model_type,
        "dtype": str(model.dtype),
        "rows": "fp8" if is_fp8 else "as computed",
        "num_layers": config.num_hidden_layers,
        "kv_lora_rank, qk_rope_head_dim": sorted(dims, key=str),
        "rope_parameters": getattr(config, "rope_parameters", None),
        "weights": fingerprint(model),
    }
    # As it comes back from a file: tuples as lists, numbers as keys as text.
    back: dict[str, Any] = json.loads(json.dumps(made, default=str))
    return back


def hash_of(value: Any) -> str:
    """SHA-256 of a JSON value, in hex."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def differences(stored: dict[str, Any], own: dict[str, Any]) -> str:
    """What two identities differ in, as text; empty if in nothing."""
    names = [name for name in {**own, **stored} if stored.get(name) != own.get(name)]
    return "; ".join(f"{name} must be {own.get(name)!r}, the file has {stored.get(name)!r}" for name in names)


def fingerprint(model: torch.nn.Module) -> str:
    """SHA-256 over name, shape, dtype and 64 elements of each weight, and over which adapters act; in hex.

    Taken anew each time, since weights may be changed in ways that leave no trace (`weight.data`): the elements are
    views that are put together and copied to the host once per device and dtype.
    Raises: UnsupportedError: a weight is on the meta device (offloaded).
    """
    digest = hashlib.sha256()
    groups: dict[tuple[torch.device, torch.dtype], list[torch.Tensor]] = {}
    order = []
    for name, tensor in _weights(model):
        if tensor.device.type == "meta":
            raise UnsupportedError(
                f"flash_mla.PrefixStore: needs weights that can be read to tell models apart, {name} is offloaded"
            )
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype};".encode())
        flat = tensor.detach().reshape(-1)
        flat = flat.view(torch.uint8) if flat.dtype.itemsize == 1 else flat
        part = flat[:: max(1, flat.numel() // SAMPLES)][:SAMPLES]
        members = groups.setdefault((flat.device, flat.dtype), [])
        order.append((flat.device, flat.dtype, len(members)))
        members.append(part)
    for module in model.modules():
        if isinstance(getattr(type(module), "active_adapters", None), property):  # a layer of PEFT
            state = [getattr(module, what, None) for what in ("active_adapters", "disable_adapters", "merged_adapters")]
            digest.update(f"{state} {sorted(getattr(module, 'scaling', {}).items())};".encode())
    on_host = {
        group: torch.cat(members).cpu().split([len(part) for part in members]) for group, members in groups.items()
    }
    for device, dtype, index in order:
        digest.update(on_host[device, dtype][index].contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _weights(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and persistent buffers (quantised weights often are buffers), subclasses as what they consist of."""
    for path, module in model.named_modules():
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and name not in module._non_persistent_buffers_set:
                yield from _plain(f"{path}.{name}", tensor)


def _plain(name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    if not hasattr(tensor, "__tensor_flatten__"):
        yield name, tensor
        return
    for inner in tensor.__tensor_flatten__()[0]:
        yield from _plain(f"{name}.{inner}", getattr(tensor, inner))


def longest_stable(config: Any) -> int | None:
    """Positions up to which rotated keys do not depend on how long the sequence is; None: they never do.

    "longrope" and "dynamic" take other frequencies for the whole prompt once it is longer than the original length.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    lengths = []
    for part in [rope] if "rope_type" in rope else [one for one in rope.values() if isinstance(one, dict)]:
        kind = part.get("rope_type", "default")
        original = part.get("original_max_position_embeddings")
        has_two = kind == "longrope" and part.get("short_factor") != part.get("long_factor")
        if has_two or "dynamic" in kind:
            lengths.append(original or config.max_position_embeddings)
    return min(lengths, default=None)


def check_text_only(config: Any, tokens: torch.Tensor) -> None:
    """Raise UnsupportedError if `tokens` (int64 `[num_tokens]`) hold the place of an image, a video or audio."""
    for name in NOT_TEXT:
        token = getattr(config, name, None)
        if token is not None and bool((tokens == token).any()):
            raise UnsupportedError(
                f"flash_mla.PrefixStore.save: input_ids must be text, got {name}={token}: "
                "the same tokens stand for any image, so they cannot name its latents"
            )
