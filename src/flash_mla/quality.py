"""What a cache costs in accuracy: one text fed through it token by token, beside native attention.

The text is given, not generated, so that every run decodes the same tokens on the same context and logits compare
position by position.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache

from .cache import SPARSE_IS_LATENT, PagedLatentCache
from .hf.models import require_mla
from .hf.paths import path_counts
from .ops import backend_counts

__all__ = [
    "Difference",
    "Run",
    "Verification",
    "compare",
    "forced_logits",
    "require_paged",
    "token_bytes",
    "verify",
]

Progress = Callable[[str, int, int], None]
REFERENCE, PAGED, FP8 = "reference", "paged", "paged fp8"


@dataclass(frozen=True)
class Run:
    """One pass over the text.

    Attributes:
        name: "reference", "paged" (rows in the model's dtype) or "paged fp8".
        attn: attention implementation.
        cache: class of the cache.
        bytes_per_token: of one position over all layers with latents, an indexer's keys included; read off the cache's
            tensors, padding and unused pages apart.
        nats_per_token: mean negative log-likelihood of the text; perplexity is its exponential.
        nonfinite: decoded positions with a NaN or an infinite logit.
        paths: attention calls by "model_type path"; none of a native attention.
        backends: launches by "op backend".
    """

    name: str
    attn: str
    cache: str
    bytes_per_token: int
    nats_per_token: float
    perplexity: float
    nonfinite: int
    paths: dict[str, int]
    backends: dict[str, int]


@dataclass(frozen=True)
class Difference:
    """How the logits of one run differ from those of another, over all decoded positions.

    Attributes:
        run, against: names of the two.
        max_abs, mean_abs: of logits, over positions and vocabulary.
        spread: standard deviation over the vocabulary of the logits of `against`, mean over positions.
        max_relative, mean_relative: `max_abs` and `mean_abs` over `spread`.
        agreement: share of positions with the same most likely token.
        kl: KL(against || run) of the next token in nats, mean over positions.
        perplexity_change: perplexity of `run` over that of `against`, minus 1.
    """

    run: str
    against: str
    max_abs: float
    mean_abs: float
    spread: float
    max_relative: float
    mean_relative: float
    agreement: float
    kl: float
    perplexity_change: float


@dataclass(frozen=True)
class Verification:
    """Runs, the reference first, and differences: each run against the reference, FP8 against "paged" as well."""

    prompt_tokens: int
    positions: int
    runs: list[Run]
    differences: list[Difference]


def require_paged(config: Any) -> None:
    """Raise ValueError if models of this config keep Transformers' own cache under "flash_mla"."""
    text_config = config.get_text_config(decoder=True)
    family = require_mla(text_config)
    if family.cache == "own" or (family.cache == "sparse" and not SPARSE_IS_LATENT):
        why = "" if family.cache == "own" else "; its latents are in the cache from Transformers 5.18 on"
        raise ValueError(
            f"flash_mla: {text_config.model_type} keeps Transformers' own cache and the dense attention path{why}: "
            "there is no paged cache to compare"
        )


def forced_logits(
    model: Any, input_ids: torch.Tensor, prompt_tokens: int, cache: Any, progress: Callable[[int], None] | None = None
) -> torch.Tensor:
    """Logits of given tokens, decoded one by one through a cache.

    Args:
        model: a causal language model.
        input_ids: int64 `[1, tokens]`.
        prompt_tokens: how many go in one forward first, at least 1; of the others all but the last are decoded.
        cache: an empty cache, filled in place.
        progress: called with the number of decoded tokens.
    Returns: `[tokens - prompt_tokens - 1, vocab_size]` on the CPU, at least fp32: row i says what follows token
        `prompt_tokens + i`.
    Raises: ValueError: too few tokens, or not one row of them.
    """
    if input_ids.ndim != 2 or input_ids.shape[0] != 1 or not 1 <= prompt_tokens <= input_ids.shape[1] - 2:
        raise ValueError(
            f"flash_mla.quality: input_ids must be [1, tokens >= {prompt_tokens + 2}] for a prompt of "
            f"{prompt_tokens} >= 1 tokens, got {tuple(input_ids.shape)}"
        )
    options = {"past_key_values": cache, "use_cache": True, "logits_to_keep": 1}
    rows = []
    with torch.no_grad():
        model(input_ids=input_ids[:, :prompt_tokens], **options)
        for position in range(prompt_tokens, input_ids.shape[1] - 1):
            logits = model(input_ids=input_ids[:, position : position + 1], **options).logits[0, -1]
            rows.append(logits.to("cpu", torch.promote_types(logits.dtype, torch.float32)))
            if progress is not None:
                progress(len(rows))
    return torch.stack(rows)


def _nats_per_token(logits: torch.Tensor, targets: torch.Tensor) -> float:
    nats = [-row.double().log_softmax(-1)[target].item() for row, target in zip(logits, targets, strict=True)]
    return math.fsum(nats) / len(nats)


def _exp(value: float) -> float:
    return math.inf if value > 700 else math.exp(value)  # of NaN: NaN


def compare(run: str, logits: torch.Tensor, against: str, reference: torch.Tensor, targets: torch.Tensor) -> Difference:
    """How two runs over the same text differ, in fp64.

    Args:
        run, against: names for the result.
        logits, reference: `[positions, vocab_size]`.
        targets: int64 `[positions]`, the tokens of the text that follow.
    Positions with a NaN never agree, and make every figure but `agreement` NaN.
    """
    max_abs = total_abs = spread = kl = 0.0
    agreed = 0
    # By position: both at once would be 2 GiB in fp64 at 1,024 positions and a vocabulary of 128k.
    for ours, theirs in zip(logits.double(), reference.double(), strict=True):
        difference = (ours - theirs).abs()
        max_abs = _max(max_abs, difference.max().item())
        total_abs += difference.mean().item()
        spread += theirs.std().item()
        log_p = theirs.log_softmax(-1)
        kl += (log_p.exp() * (log_p - ours.log_softmax(-1))).sum().item()
        finite = bool(ours.isfinite().all() and theirs.isfinite().all())
        agreed += finite and int(ours.argmax()) == int(theirs.argmax())
    count = len(targets)
    mean_abs, spread = total_abs / count, spread / count
    change = _exp(_nats_per_token(logits, targets) - _nats_per_token(reference, targets)) - 1
    return Difference(
        run=run,
        against=against,
        max_abs=max_abs,
        mean_abs=mean_abs,
        spread=spread,
        max_relative=max_abs / spread if spread else math.nan,
        mean_relative=mean_abs / spread if spread else math.nan,
        agreement=agreed / count,
        kl=kl / count,
        perplexity_change=change,
    )


def _max(one: float, other: float) -> float:
    return math.nan if math.isnan(one) or math.isnan(other) else max(one, other)


def token_bytes(cache: Any, layers: list[int]) -> int:
    """Bytes of one position in the given layers, from the tensors that hold it, the keys of an indexer included.

    Args:
        cache: a `PagedLatentCache` or one of Transformers'; of a batch of any size, with at least one position.
        layers: their numbers; those without tensors (which read another layer's) count nothing.
    """
    total = 0
    for index in layers:
        layer = cache.layers[index]
        pool = getattr(layer, "kv_cache", None)
        if pool is not None:
            total += pool.shape[-1] * pool.element_size()
        tensors = () if pool is not None else (getattr(layer, "keys", None), getattr(layer, "values", None))
        for tensor in (*tensors, getattr(layer, "indexer_keys", None)):
            if tensor is not None and tensor.numel():
                # keys and values [batch, heads, positions, columns], an indexer's keys [batch, positions, columns]
                total += tensor.numel() // (tensor.shape[0] * tensor.shape[-2]) * tensor.element_size()
    return total


def _counted_since(before: dict[tuple[str, str], int], now: dict[tuple[str, str], int]) -> dict[str, int]:
    grown = {" ".join(key): count - before.get(key, 0) for key, count in now.items()}
    return {key: count for key, count in grown.items() if count}


def _attention_of(config: Any) -> str | dict[str, str]:
    """What `set_attn_implementation` takes to put a model's attention back: by sub-config where it has some."""
    parts = {name: getattr(config, name, None) for name in getattr(config, "sub_configs", None) or ()}
    found = {name: part._attn_implementation for name, part in parts.items() if part is not None}
    own: str = config._attn_implementation
    return {"": own, **found} if found else own


def verify(
    model: Any,
    input_ids: torch.Tensor,
    prompt_tokens: int,
    *,
    cache: str = "fp8",
    reference: str = "eager",
    progress: Progress | None = None,
) -> Verification:
    """Decode one text by native attention and by "flash_mla" on pages, on the same weights.

    Args:
        model: a causal language model with MLA. Its attention implementation is switched, and put back at the end.
        input_ids: int64 `[1, tokens]`; `tokens - prompt_tokens - 1` positions are compared.
        prompt_tokens: the first tokens, in one forward; the others are decoded one by one through the cache.
        cache: "fp8": FP8 rows, and rows in the model's dtype beside them, so that the cost of FP8 is told apart from
            that of the absorbed form; "model": the latter alone.
        reference: native attention, "eager" or "sdpa", with Transformers' DynamicCache.
        progress: called with the name of the run, positions done and positions in all.
    Raises: ValueError: no such cache, too few tokens, a model without MLA or one that keeps Transformers' own cache.
    """
    if cache not in ("fp8", "model"):
        raise ValueError(f"flash_mla.quality.verify: cache must be 'fp8' or 'model', got {cache!r}")
    require_paged(model.config)
    text_config = model.config.get_text_config(decoder=True)
    plans: list[tuple[str, str, Callable[[], Any]]] = [
        (REFERENCE, reference, lambda: DynamicCache(config=text_config)),
        (PAGED, "flash_mla", lambda: PagedLatentCache(model.config)),
    ]
    if cache == "fp8":
        plans.append((FP8, "flash_mla", lambda: PagedLatentCache(model.config, dtype="fp8")))
        plans[-1][2]()  # refused here, before minutes are spent
    with_latents = [layer.index for layer in PagedLatentCache(model.config).paged_layers]
    targets = input_ids[0, prompt_tokens + 1 :].cpu()
    positions, before = len(targets), _attention_of(model.config)
    runs, logits = [], {}
    try:
        for name, attn, make in plans:
            model.set_attn_implementation(attn)
            paths, backends, kept = path_counts(), backend_counts(), make()

            def step(done: int, name: str = name) -> None:
                if progress is not None:
                    progress(name, done, positions)

            found = logits[name] = forced_logits(model, input_ids, prompt_tokens, kept, step)
            nats = _nats_per_token(found, targets)
            runs.append(
                Run(
                    name=name,
                    attn=attn,
                    cache=type(kept).__name__,
                    bytes_per_token=token_bytes(kept, with_latents),
                    nats_per_token=nats,
                    perplexity=_exp(nats),
                    nonfinite=int((~found.isfinite()).any(-1).sum()),
                    paths=_counted_since(paths, path_counts()),
                    backends=_counted_since(backends, backend_counts()),
                )
            )
    finally:
        model.set_attn_implementation(before)
    pairs = [(run.name, REFERENCE) for run in runs[1:]] + [(FP8, PAGED)] * (cache == "fp8")
    differences = [compare(run, logits[run], against, logits[against], targets) for run, against in pairs]
    return Verification(prompt_tokens, positions, runs, differences)
