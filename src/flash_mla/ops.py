"""`torch.ops.flash_mla.*`: schemas, fakes and the choice of a backend.

The public functions check the call (`contract.py`), take the first backend that accepts it or the one that was asked
for, and launch it directly: a plain Python call costs about 1.5 µs where the dispatcher costs 6. Under `torch.compile`
they go through `torch.ops`, so that a graph holds one opaque node per call. (Over 400 lines because schemas and fakes
stand beside the functions that they mirror.)
"""

from __future__ import annotations

import functools
import logging
import threading
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING

import torch

from . import debug
from .backends import torch as torch_backend
from .backends.equal_lengths import nothing_kept
from .contract import (
    AppendCall,
    DecodeCall,
    UnsupportedError,
    check_append,
    check_decode,
    check_plan,
    check_sparse,
    describe,
    fixed_slots,
    no_backend_message,
)

if TYPE_CHECKING:
    from .backends.cuda.step import Results, StepLaunches

__all__ = [
    "CheckedStep",
    "SplitPlan",
    "append",
    "backend_counts",
    "check_step",
    "decode",
    "next_slots",
    "plan_splits",
    "plan_splits_for",
    "sparse_decode",
]

logger = logging.getLogger(__name__)


def _load_backends() -> dict[str, ModuleType]:
    from .backends import cuda as cuda_backend
    from .backends import triton as triton_backend

    if triton_backend.INTERPRETED:  # a test tool: right and slow, so for those that ask for it by name
        return {"cuda": cuda_backend, "torch": torch_backend, "triton": triton_backend}
    return {"cuda": cuda_backend, "triton": triton_backend, "torch": torch_backend}


BACKENDS = _load_backends()

# How often each backend was launched in this process, by (op, backend). Never touched inside a compiled graph's trace.
_launches: dict[tuple[str, str], int] = {}
_lock = threading.Lock()


def _count_launch(op: str, backend: str) -> None:
    with _lock:
        _launches[op, backend] = _launches.get((op, backend), 0) + 1


def backend_counts() -> dict[tuple[str, str], int]:
    """Launches so far in this process by (op, backend), e.g. `{("decode", "triton"): 61}`."""
    return dict(_launches)


def _reasons(call: DecodeCall | AppendCall) -> dict[str, list[str]]:
    if isinstance(call, DecodeCall):
        return {name: module.decode_refusals(call) for name, module in BACKENDS.items()}
    return {name: module.append_refusals(call) for name, module in BACKENDS.items()}


@functools.lru_cache(maxsize=64)
def _announce(function: str, chosen: str, dtype: str, device: str, refused: str) -> None:
    logger.info("%s runs on backend %r for %s on %s%s", function, chosen, dtype, device, refused)


def _choose_anew(function: str, call: DecodeCall | AppendCall, backend: str | None) -> str:
    """Name of the backend that runs `call`; obeys `backend` or raises with the reasons against it."""
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"flash_mla.{function}: backend must be one of {[*BACKENDS]} or None, got {backend!r}")
    reasons = _reasons(call)
    if backend is not None:
        if reasons[backend]:
            raise UnsupportedError(no_backend_message(function, {backend: reasons[backend]}))
        return backend
    for name, why in reasons.items():
        if not why:
            if torch.compiler.is_compiling():
                return name  # a log line would break the graph; decode itself says it when it runs
            refused = {other: text for other, text in reasons.items() if text}
            # One line per backend, dtype and set of reasons, not per shape.
            note = "".join(f"; not {other}: {'; '.join(text)}" for other, text in refused.items())
            _announce(function, name, f"{call.dtype}{' with FP8 rows' if call.fp8 else ''}", call.device_type, note)
            return name
    raise UnsupportedError(no_backend_message(function, reasons))


_choose = functools.lru_cache(maxsize=4096)(_choose_anew)


@dataclass(frozen=True)
class SplitPlan:
    """How the requests of one forward are dealt out to slots: what each slot works through, one item after the other.

    A slot is a thread block that stays, or a group of them that share the query rows. An item is a part of a request,
    named by two fractions of it and never by tokens: a kernel derives the tokens from the live lengths, so an old plan
    costs balance and never a token.

    Attributes:
        items: int32 `[num_slots + batch, 4]`: request (-1 = unused row), begin, end (fractions of the request in units
            of 2^-30), row of the slot's next item (-1 = last). Row s < num_slots is what slot s begins with; a request
            that begins later in a slot is in row num_slots + request.
        splits: int32 `[batch, 2]`: slot of the request's first part, number of its parts. Part p >= 1 is what slot
            `first + p` begins with.
        batch, seqlen_q, num_heads, h_kv: the shape that it was made for.
        deterministic: whether the parts of a request depend on its own length alone.
    """

    items: torch.Tensor
    splits: torch.Tensor
    batch: int
    seqlen_q: int
    num_heads: int
    h_kv: int
    deterministic: bool = False

    @property
    def num_slots(self) -> int:
        """Slots that the plan deals out to; kernels keep 2 * num_slots partial results."""
        return self.items.shape[0] - self.batch

    def check(self, call: DecodeCall, function: str = "decode") -> None:
        """Raise ValueError if `call` has another batch or head shape than this plan was made for."""
        made_for = (self.batch, self.seqlen_q, self.num_heads, self.h_kv)
        came = (call.batch, call.seqlen_q, call.num_heads, call.h_kv)
        if made_for != came:
            raise ValueError(
                f"flash_mla.{function}: plan was made for (batch, seqlen_q, num_heads, h_kv) = {made_for}, got {came}"
            )


def plan_splits(
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    cache_seqlens: torch.Tensor,
    *,
    kv_lora_rank: int,
    causal: bool = True,
    deterministic: bool = False,
    backend: str | None = None,
) -> SplitPlan:
    """Plan the split of a decode call, once per forward for all its layers.

    Args: as in `decode`; of the tensors only `cache_seqlens` is read.
        deterministic: cut each request by its own length alone, so that its result does not depend, bit by bit, on the
            requests beside it. Costs balance: a part is 2048 tokens or an eighth of the request, whichever is more.
    Returns: a plan of a size that depends on the shapes and the device alone, so it can be captured in a graph.
    Raises: ValueError and UnsupportedError as `decode`.
    Reads device memory only; no host sync.
    """
    call = check_decode(q, kv_cache, block_table, cache_seqlens, kv_lora_rank, causal, "plan_splits")
    return _plan(call, cache_seqlens, backend, deterministic)


def plan_splits_for(
    cache_seqlens: torch.Tensor,
    *,
    seqlen_q: int,
    num_heads: int,
    h_kv: int,
    kv_lora_rank: int = 512,
    qk_rope_head_dim: int = 64,
    dtype: torch.dtype = torch.bfloat16,
    deterministic: bool = False,
    backend: str | None = None,
) -> SplitPlan:
    """Plan the split of a decode call that does not exist yet, from its lengths and plain integers.

    Args:
        cache_seqlens: int32 `[batch]`, as in `decode`.
        seqlen_q, num_heads, h_kv: the shape of the call to come; `h_kv` must divide `num_heads`.
        kv_lora_rank, qk_rope_head_dim, dtype: what decides which backend will run, and so the size of the plan.
        deterministic: as in `plan_splits`.
        backend: as in `decode`.
    Returns: a plan as from `plan_splits`.
    Raises: ValueError: lengths that are not int32 `[batch]`, or head counts that do not fit together.
        UnsupportedError: no backend accepts.
    Reads device memory only; no host sync.
    """
    if not isinstance(cache_seqlens, torch.Tensor) or cache_seqlens.dtype != torch.int32 or cache_seqlens.ndim != 1:
        raise ValueError(
            f"flash_mla.plan_splits_for: cache_seqlens must be int32 [batch], got {describe(cache_seqlens)}"
        )
    if min(seqlen_q, num_heads, h_kv) < 1 or num_heads % h_kv:
        raise ValueError(
            "flash_mla.plan_splits_for: seqlen_q, num_heads and h_kv must be >= 1 and h_kv divide num_heads, "
            f"got {seqlen_q}, {num_heads}, {h_kv}"
        )
    call = call_to_come(
        cache_seqlens.device,
        batch=cache_seqlens.shape[0],
        seqlen_q=seqlen_q,
        num_heads=num_heads,
        h_kv=h_kv,
        kv_lora_rank=kv_lora_rank,
        qk_rope_head_dim=qk_rope_head_dim,
        dtype=dtype,
    )
    return _plan(call, cache_seqlens, backend, deterministic)


def call_to_come(
    device: torch.device,
    *,
    batch: int,
    seqlen_q: int,
    num_heads: int,
    h_kv: int,
    kv_lora_rank: int,
    qk_rope_head_dim: int,
    dtype: torch.dtype,
) -> DecodeCall:
    """A decode call whose pool and table are not known yet: contiguous, one page of 64 tokens, a wide table."""
    d_qk, block_size, max_blocks = kv_lora_rank + qk_rope_head_dim, 64, 2**15
    return DecodeCall(
        device_type=device.type,
        device_index=device.index or 0,
        capability=torch.cuda.get_device_capability(device) if device.type == "cuda" else None,
        dtype=str(dtype).removeprefix("torch."),
        batch=batch,
        seqlen_q=seqlen_q,
        num_heads=num_heads,
        h_kv=h_kv,
        kv_lora_rank=kv_lora_rank,
        qk_rope_head_dim=qk_rope_head_dim,
        num_blocks=1,
        block_size=block_size,
        max_blocks=max_blocks,
        q_strides=(seqlen_q * num_heads * d_qk, num_heads * d_qk, d_qk, 1),
        kv_cache_strides=(block_size * h_kv * d_qk, h_kv * d_qk, d_qk, 1),
        block_table_strides=(max_blocks, 1),
        causal=True,
    )


def backend_reasons(call: DecodeCall | AppendCall) -> dict[str, list[str]]:
    """Each backend in order of preference with its reasons against `call`; none = it accepts, the first such runs."""
    return _reasons(call)


def _plan(call: DecodeCall, cache_seqlens: torch.Tensor, backend: str | None, deterministic: bool = False) -> SplitPlan:
    # A trace looks through a cache, and warns of it.
    choose = _choose_anew if torch.compiler.is_compiling() else _choose
    module = BACKENDS[choose("plan_splits", call, backend)]
    num_slots = fixed_slots(call.batch) if deterministic else module.num_slots(call)
    if torch.compiler.is_compiling():
        items, splits = torch.ops.flash_mla.plan.default(cache_seqlens, num_slots, deterministic)
    else:
        items, splits = module.plan(cache_seqlens, num_slots, deterministic)
    return SplitPlan(items, splits, call.batch, call.seqlen_q, call.num_heads, call.h_kv, deterministic)


def decode(
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    cache_seqlens: torch.Tensor,
    *,
    kv_lora_rank: int,
    softmax_scale: float,
    causal: bool = True,
    plan: SplitPlan | None = None,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of a few new queries over a paged latent cache (MLA, absorbed form).

    Args:
        q: `[batch, seqlen_q, num_heads, d_qk]`, bf16/fp16 (torch backend: fp32/fp64 too). Already multiplied by W_UK,
            rotated part last. Outer strides free.
        kv_cache: `[num_blocks, block_size, h_kv, d_qk]`, dtype of `q`; each row is `[latent | rotated key]`. V is the
            first `kv_lora_rank` columns. `h_kv` must divide `num_heads`. Outer strides free. Or FP8 rows, uint8
            `[num_blocks, block_size, h_kv, row_bytes]`: 656 bytes for (512, 64) columns (`flash_mla.codec`).
        block_table: int32 `[batch, max_blocks]`, pages of each request in order; entries past the length are not read.
        cache_seqlens: int32 `[batch]`, tokens in the cache including the new ones; 0 is allowed.
        kv_lora_rank: columns of the latent, in elements.
        softmax_scale: multiplier of the scores before softmax. There is no default: `d_qk**-0.5` is wrong for a model.
        causal: query j sees keys before `len - (seqlen_q - 1 - j)` (bottom-right aligned). No effect at seqlen_q = 1.
        plan: from `plan_splits` for the same shapes, or None to plan inside. It may be older than the lengths.
        backend: "cuda", "triton" or "torch", obeyed or refused; None takes the first that accepts, and says so at INFO.
    Returns: out `[batch, seqlen_q, num_heads, kv_lora_rank]`, dtype of `q`, 0 where nothing is visible; lse
        `[batch, num_heads, seqlen_q]`, fp32 (fp64 for fp64), natural log, +inf where nothing is visible.
    Raises: ValueError: wrong shapes, dtypes or devices, or a plan of another shape. UnsupportedError: no backend
        accepts; lists each with its reasons.
    Lengths and table entries in use are not checked (that would make the host wait). Reads device memory only; no host
    sync; capturable in a CUDA graph. Source: DeepSeek-V2, arXiv 2405.04434, section 2.1.
    """
    items = splits = None
    fixed = plan is not None and plan.deterministic
    if torch.compiler.is_compiling():
        if plan is not None:
            items, splits = plan.items, plan.splits
        return torch.ops.flash_mla.decode.default(  # type: ignore[no-any-return]
            q, kv_cache, block_table, cache_seqlens, items, splits, kv_lora_rank, softmax_scale, causal, backend, fixed
        )
    call = check_decode(q, kv_cache, block_table, cache_seqlens, kv_lora_rank, causal, deterministic=fixed)
    if plan is not None:
        plan.check(call)
        items, splits = plan.items, plan.splits
    return _decode(call, q, kv_cache, block_table, cache_seqlens, items, splits, softmax_scale, backend)


def _decode(
    call: DecodeCall,
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    cache_seqlens: torch.Tensor,
    items: torch.Tensor | None,
    splits: torch.Tensor | None,
    softmax_scale: float,
    backend: str | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    if (items is None) != (splits is None):
        raise ValueError("flash_mla.decode: a plan is items and splits together, got only one of them")
    if items is not None and splits is not None:
        check_plan(call, items, splits)
    if debug.is_on():
        debug.check_decode("decode", call, kv_cache, block_table, cache_seqlens)
    name = _choose("decode", call, backend)
    _count_launch("decode", name)
    result: tuple[torch.Tensor, torch.Tensor] = BACKENDS[name].decode(
        call, q, kv_cache, block_table, cache_seqlens, softmax_scale, items, splits
    )
    return result


def sparse_decode(
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    indices: torch.Tensor,
    *,
    kv_lora_rank: int,
    softmax_scale: float,
    attn_sink: torch.Tensor | None = None,
    topk_length: torch.Tensor | None = None,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of each query to the rows of a paged latent cache that it names (MLA, absorbed form, sparse).

    Args:
        q: `[batch, seqlen_q, num_heads, d_qk]`, as in `decode`.
        kv_cache: as in `decode`, with h_kv = 1; FP8 rows too.
        indices: int32 `[batch, seqlen_q, topk]`, block * block_size + offset of each row. Negative, or outside the
            pool: no token (`FLASH_MLA_DEBUG=1` refuses the latter). A row named twice counts twice. Any topk.
        kv_lora_rank: columns of the latent, in elements.
        softmax_scale: multiplier of the scores before softmax.
        attn_sink: fp32 `[num_heads]`, natural log: one more entry in the softmax of each head, without a value: `out`
            is multiplied by exp(lse) / (exp(lse) + exp(sink)), `lse` is without it. None: none.
        topk_length: int32 `[batch]`, how many of the first indices count; None: all.
        backend: "cuda", "triton" or "torch", obeyed or refused; None takes the first that accepts.
    Returns: out `[batch, seqlen_q, num_heads, kv_lora_rank]`, dtype of `q`, 0 where nothing is visible; lse
        `[batch, num_heads, seqlen_q]`, fp32 (fp64 for fp64), natural log, +inf where nothing is visible.
    Raises: ValueError: wrong shapes, dtypes or devices. UnsupportedError: no backend accepts.
    Reads device memory only; no host sync; capturable in a CUDA graph. Source: DeepSeek-V3.2, section 2 (DSA).
    """
    if torch.compiler.is_compiling():
        return torch.ops.flash_mla.sparse_decode.default(  # type: ignore[no-any-return]
            q, kv_cache, indices, attn_sink, topk_length, kv_lora_rank, softmax_scale, backend
        )
    out, lse, _ = _sparse(
        "sparse_decode", q, kv_cache, indices, attn_sink, topk_length, kv_lora_rank, softmax_scale, backend, False
    )
    return out, lse


def _sparse(
    function: str,
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    indices: torch.Tensor,
    attn_sink: torch.Tensor | None,
    topk_length: torch.Tensor | None,
    kv_lora_rank: int,
    softmax_scale: float,
    backend: str | None,
    wants_max: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """`sparse_decode`, and if wanted the largest scaled score, fp32 `[batch, num_heads, seqlen_q]`, natural log, -inf
    where nothing is visible."""
    call = check_sparse(q, kv_cache, indices, kv_lora_rank, attn_sink, topk_length, function, wants_max)
    if debug.is_on():
        debug.check_sparse(function, call, kv_cache, indices, topk_length)
    name = _choose(function, call, backend)
    _count_launch("sparse_decode", name)
    batch, seqlen_q, num_heads, d_qk = q.shape
    lengths = None if topk_length is None else topk_length.repeat_interleave(seqlen_q)
    out: torch.Tensor
    lse: torch.Tensor
    out, lse, largest = BACKENDS[name].sparse_decode(
        call,
        q.reshape(batch * seqlen_q, 1, num_heads, d_qk),
        kv_cache,
        indices.reshape(batch * seqlen_q, indices.shape[2]),
        lengths,
        softmax_scale,
        attn_sink,
        wants_max,
    )

    def by_request(values: torch.Tensor) -> torch.Tensor:
        return values.view(batch, seqlen_q, num_heads).transpose(1, 2).contiguous()

    out = out.view(batch, seqlen_q, num_heads, kv_lora_rank)
    return out, by_request(lse), None if largest is None else by_request(largest)


def append(
    kv_cache: torch.Tensor,
    latent: torch.Tensor,
    k_rope: torch.Tensor,
    slots: torch.Tensor,
    *,
    q: torch.Tensor | None = None,
    q_rope: torch.Tensor | None = None,
    backend: str | None = None,
) -> None:
    """Write new tokens into their pages: row `slots[b, j]` of the pool becomes `[latent[b, j] | k_rope[b, j]]`.

    Args:
        kv_cache: `[num_blocks, block_size, h_kv, d_qk]`, written in place. Of FP8 rows, uint8 `[num_blocks, block_size,
            h_kv, row_bytes]`, tokens are encoded as they are written (`flash_mla.codec.encode_rows`).
        latent: `[batch, seqlen_q, h_kv, kv_lora_rank]`, normalised, dtype of `kv_cache` (any for FP8 rows); strides
            free.
        k_rope: `[batch, seqlen_q, h_kv, qk_rope_head_dim]`, already rotated; strides free.
        slots: int64 `[batch, seqlen_q]`, block * block_size + offset. Must lie inside the pool (not checked here).
            Tokens that nobody may read go to a page that no table names; otherwise
            two tokens of one call share a slot only if their rows are equal.
        q: `[batch, seqlen_q, num_heads, d_qk]`, dtype of `latent`; its last columns become `q_rope`, in the same
            launch (the first `kv_lora_rank` are left as they are: the absorbed query). Or None.
        q_rope: `[batch, seqlen_q, num_heads, qk_rope_head_dim]`, rotated; strides free. Given exactly with `q`.
        backend: "cuda", "triton" or "torch", obeyed or refused; None takes the first that accepts.
    Raises: ValueError: wrong shapes, dtypes or devices. UnsupportedError: no backend accepts.
    No host sync; capturable in a CUDA graph.
    """
    if torch.compiler.is_compiling():
        if q is not None and q_rope is not None:
            q[..., latent.shape[-1] :] = q_rope  # the graph fuses it with its neighbours
        torch.ops.flash_mla.append.default(kv_cache, latent, k_rope, slots, backend)
        return
    _append(kv_cache, latent, k_rope, slots, backend, q, q_rope)


def _append(
    kv_cache: torch.Tensor,
    latent: torch.Tensor,
    k_rope: torch.Tensor,
    slots: torch.Tensor,
    backend: str | None,
    q: torch.Tensor | None = None,
    q_rope: torch.Tensor | None = None,
) -> None:
    call = check_append(kv_cache, latent, k_rope, slots, q, q_rope)
    if debug.is_on():
        debug.check_append("append", call, slots)
    name = _choose("append", call, backend)
    _count_launch("append", name)
    BACKENDS[name].append(call, kv_cache, latent, k_rope, slots, q, q_rope)


@dataclass(frozen=True)
class CheckedStep:
    """An append and a decode call that were checked, with the backends that took them: what a layer's next decode step
    over tensors of the same shapes, dtypes and strides need not find out again (two thirds of the host's time of both).
    """

    append_call: AppendCall
    append_backend: str
    decode_call: DecodeCall
    decode_backend: str

    def append(
        self,
        kv_cache: torch.Tensor,
        latent: torch.Tensor,
        k_rope: torch.Tensor,
        slots: torch.Tensor,
        q: torch.Tensor,
        q_rope: torch.Tensor,
    ) -> None:
        """`ops.append`, its arguments like those that were checked."""
        BACKENDS[self.append_backend].append(self.append_call, kv_cache, latent, k_rope, slots, q, q_rope)

    def decode(
        self,
        q: torch.Tensor,
        kv_cache: torch.Tensor,
        block_table: torch.Tensor,
        cache_seqlens: torch.Tensor,
        plan: SplitPlan | None,
        softmax_scale: float,
    ) -> torch.Tensor:
        """`ops.decode` without its log-sums, its arguments like those that were checked."""
        items, splits = (None, None) if plan is None else (plan.items, plan.splits)
        out: torch.Tensor
        out, _ = BACKENDS[self.decode_backend].decode(
            self.decode_call, q, kv_cache, block_table, cache_seqlens, softmax_scale, items, splits
        )
        return out

    def count(self) -> None:
        """Count both launches; after them, when the device has something to do meanwhile."""
        with _lock:
            for key in (("append", self.append_backend), ("decode", self.decode_backend)):
                _launches[key] = _launches.get(key, 0) + 1

    def ready(
        self,
        kv_cache: torch.Tensor,
        latent: torch.Tensor,
        k_rope: torch.Tensor,
        slots: torch.Tensor,
        q: torch.Tensor,
        q_rope: torch.Tensor,
        cache_seqlens: torch.Tensor,
        plan: SplitPlan,
        softmax_scale: float,
        results: Results | None,
    ) -> StepLaunches | None:
        """Both as launches whose parameters are written down (`backends.cuda.step`); None on other backends, and where
        the general way has more to do than to launch.
        """
        if (self.append_backend, self.decode_backend) != ("cuda", "cuda"):
            return None
        tensors = (kv_cache, latent, k_rope, slots, q, q_rope, cache_seqlens)
        found: StepLaunches | None = BACKENDS["cuda"].ready_step(
            self.append_call, self.decode_call, *tensors, plan.num_slots, softmax_scale, results
        )
        return found


def check_step(
    q: torch.Tensor,
    q_rope: torch.Tensor,
    kv_cache: torch.Tensor,
    latent: torch.Tensor,
    k_rope: torch.Tensor,
    slots: torch.Tensor,
    block_table: torch.Tensor,
    cache_seqlens: torch.Tensor,
    *,
    kv_lora_rank: int,
    causal: bool,
    backend: str | None,
) -> CheckedStep:
    """Check an append and the decode after it; arguments and errors as of `append` and `decode`."""
    append_call = check_append(kv_cache, latent, k_rope, slots, q, q_rope)
    decode_call = check_decode(q, kv_cache, block_table, cache_seqlens, kv_lora_rank, causal)
    return CheckedStep(
        append_call, _choose("append", append_call, backend), decode_call, _choose("decode", decode_call, backend)
    )


def next_slots(
    block_table: torch.Tensor,
    cache_seqlens: torch.Tensor,
    seqlen_q: int,
    block_size: int,
    valid: torch.Tensor | None = None,
    capacity: int | None = None,
    *,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Where the new tokens of a forward go; arguments and results as of `backends.torch.next_slots`.

    One launch on Hopper, unless another backend than "cuda" is asked for. Elsewhere, and in a graph, whose compiler
    fuses them, the dozen operations of the definition.
    Reads device memory only; no host sync; capturable in a CUDA graph.
    """
    module: ModuleType = torch_backend
    if block_table.is_cuda and not torch.compiler.is_compiling():
        if backend in (None, "cuda") and BACKENDS["cuda"].runs_on(block_table.get_device()):
            module = BACKENDS["cuda"]
        _count_launch("slots", "torch" if module is torch_backend else "cuda")
    result: tuple[torch.Tensor, torch.Tensor] = module.next_slots(
        block_table, cache_seqlens, seqlen_q, block_size, valid, capacity
    )
    return result


# --- torch.library: the same functions as graph nodes -----------------------------------------------------------------

_library = torch.library.Library("flash_mla", "FRAGMENT")
_library.define(
    "decode(Tensor q, Tensor kv_cache, Tensor block_table, Tensor cache_seqlens, Tensor? items, Tensor? splits,"
    " int kv_lora_rank, float softmax_scale, bool causal, str? backend, bool deterministic=False)"
    " -> (Tensor out, Tensor lse)"
)
_library.define(
    "append(Tensor(a!) kv_cache, Tensor latent, Tensor k_rope, Tensor slots, str? backend) -> ()",
)
_library.define(
    "sparse_decode(Tensor q, Tensor kv_cache, Tensor indices, Tensor? attn_sink, Tensor? topk_length,"
    " int kv_lora_rank, float softmax_scale, str? backend) -> (Tensor out, Tensor lse)"
)
_library.define("plan(Tensor cache_seqlens, int num_slots, bool deterministic) -> (Tensor items, Tensor splits)")


def _decode_op(
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    cache_seqlens: torch.Tensor,
    items: torch.Tensor | None,
    splits: torch.Tensor | None,
    kv_lora_rank: int,
    softmax_scale: float,
    causal: bool,
    backend: str | None,
    deterministic: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    call = check_decode(q, kv_cache, block_table, cache_seqlens, kv_lora_rank, causal, deterministic=deterministic)
    return _decode(call, q, kv_cache, block_table, cache_seqlens, items, splits, softmax_scale, backend)


def _plan_op(cache_seqlens: torch.Tensor, num_slots: int, deterministic: bool) -> tuple[torch.Tensor, torch.Tensor]:
    # The backends for GPUs make the same integers, so any of them serves whichever runs decode.
    if cache_seqlens.device.type != "cuda":
        module: ModuleType = torch_backend
    else:
        module = BACKENDS["cuda" if BACKENDS["cuda"].runs_on(cache_seqlens.get_device()) else "triton"]
    result: tuple[torch.Tensor, torch.Tensor] = module.plan(cache_seqlens, num_slots, deterministic)
    return result


def _decode_fake(
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    cache_seqlens: torch.Tensor,
    items: torch.Tensor | None,
    splits: torch.Tensor | None,
    kv_lora_rank: int,
    softmax_scale: float,
    causal: bool,
    backend: str | None,
    deterministic: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    batch, seqlen_q, num_heads, _ = q.shape
    accumulate = torch.float64 if q.dtype == torch.float64 else torch.float32
    out = q.new_empty((batch, seqlen_q, num_heads, kv_lora_rank))
    return out, q.new_empty((batch, num_heads, seqlen_q), dtype=accumulate)


def _sparse_decode_op(
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    indices: torch.Tensor,
    attn_sink: torch.Tensor | None,
    topk_length: torch.Tensor | None,
    kv_lora_rank: int,
    softmax_scale: float,
    backend: str | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    with nothing_kept():
        out, lse, _ = _sparse(
            "sparse_decode", q, kv_cache, indices, attn_sink, topk_length, kv_lora_rank, softmax_scale, backend, False
        )
    return out, lse


def _sparse_decode_fake(
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    indices: torch.Tensor,
    attn_sink: torch.Tensor | None,
    topk_length: torch.Tensor | None,
    kv_lora_rank: int,
    softmax_scale: float,
    backend: str | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    return _decode_fake(
        q, kv_cache, indices, indices, None, None, kv_lora_rank, softmax_scale, causal=False, backend=backend
    )


def _append_op(
    kv_cache: torch.Tensor, latent: torch.Tensor, k_rope: torch.Tensor, slots: torch.Tensor, backend: str | None
) -> None:
    _append(kv_cache, latent, k_rope, slots, backend)


def _append_fake(
    kv_cache: torch.Tensor, latent: torch.Tensor, k_rope: torch.Tensor, slots: torch.Tensor, backend: str | None
) -> None:
    return None


def _plan_fake(cache_seqlens: torch.Tensor, num_slots: int, deterministic: bool) -> tuple[torch.Tensor, torch.Tensor]:
    batch = cache_seqlens.shape[0]
    items = cache_seqlens.new_empty((num_slots + batch, 4), dtype=torch.int32)
    return items, cache_seqlens.new_empty((batch, 2), dtype=torch.int32)


# CompositeExplicitAutograd: one implementation for every device; there is no gradient (decode is inference).
_library.impl("decode", _decode_op, "CompositeExplicitAutograd")
_library.impl("sparse_decode", _sparse_decode_op, "CompositeExplicitAutograd")
_library.impl("append", _append_op, "CompositeExplicitAutograd")
_library.impl("plan", _plan_op, "CompositeExplicitAutograd")
torch.library.register_fake("flash_mla::decode", _decode_fake, lib=_library)
torch.library.register_fake("flash_mla::sparse_decode", _sparse_decode_fake, lib=_library)
torch.library.register_fake("flash_mla::append", _append_fake, lib=_library)
torch.library.register_fake("flash_mla::plan", _plan_fake, lib=_library)
