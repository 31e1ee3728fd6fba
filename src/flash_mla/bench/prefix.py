"""How long the first token of a prompt takes, cold and with the prompt's beginning loaded from a `PrefixStore`.

Cold computes the whole prompt. Warm loads the stored prefix and computes the question behind it; looking the prefix up,
reading its file, comparing its digest and copying it into pages all count. Wall clock, the device waited for at every
token; both ways take turns, round by round, after one unmeasured round of each. The file has just been written, so on
a local disk it comes from the page cache: a first read after a reboot, or from an object store, takes longer (give the
bench its URI).
"""

from __future__ import annotations

import gc
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from .clock import StepClock, synchronize
from .generate import difference

__all__ = ["PrefixResult", "measure", "prompt_of", "time_answer"]


@dataclass
class PrefixResult:
    """One prefix length; seconds are medians over the rounds, spreads max - min.

    Attributes:
        prefix, question, new_tokens: tokens that are stored, that come behind them, that are generated; one row.
        loaded: tokens that the warm rounds took from the store.
        file_bytes: of the stored prefix.
        save_s: seconds to write it, once; without the forward that computed it.
        cold_s, warm_s: seconds to the first token.
        load_s: the part of `warm_s` in which the prefix is looked up, read, checked and copied into pages.
        ratio: warm_s / cold_s; below 1 the store is faster.
        identical_tokens: leading new tokens in which the last warm round agrees with the last cold one.
        cold_paths, warm_paths: calls of the attention function by path in a round.
    """

    model: str
    dtype: str
    prefix: int
    question: int
    new_tokens: int
    rounds: int
    loaded: int
    file_bytes: int
    save_s: float
    cold_s: float
    cold_spread_s: float
    cold_round_s: list[float]
    warm_s: float
    warm_spread_s: float
    warm_round_s: list[float]
    load_s: float
    ratio: float
    identical_tokens: int
    cold_paths: dict[str, int]
    warm_paths: dict[str, int]

    def to_json(self) -> dict[str, Any]:
        """As a row of a report."""
        return asdict(self)


@dataclass
class _Answer:
    """One `generate()`; seconds from before the look-up."""

    ttft_s: float
    load_s: float
    loaded: int
    tokens: list[int]
    paths: dict[str, int]


def prompt_of(model: Any, prefix: int, question: int, seed: int = 0) -> torch.Tensor:
    """Random token ids, int64 `[1, prefix + question]`; other lengths of prefix begin with other tokens."""
    vocab_size = model.config.get_text_config(decoder=True).vocab_size
    generator = torch.Generator().manual_seed(seed + prefix)
    ids = torch.randint(min(16, vocab_size - 1), vocab_size, (1, prefix + question), generator=generator)
    return ids.to(model.device)


def time_answer(model: Any, input_ids: torch.Tensor, store: Any, new_tokens: int) -> _Answer:
    """One greedy `generate()`, with what `store` has of the prompt, or cold where it is None."""
    from transformers import StoppingCriteriaList

    import flash_mla

    gc.collect()
    before = flash_mla.path_counts()
    clock = StepClock(model.device)
    clock.start()
    cache = store.load(input_ids) if store is not None else None
    synchronize(model.device)
    loaded_at = time.perf_counter()
    loaded = int(cache.get_seq_length()) if cache is not None else 0
    output = model.generate(
        input_ids,
        attention_mask=torch.ones_like(input_ids),
        past_key_values=cache,
        max_new_tokens=new_tokens,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        stopping_criteria=StoppingCriteriaList([clock]),
    )
    return _Answer(
        ttft_s=clock.ttft_s,
        load_s=loaded_at - clock.stamps[0],
        loaded=loaded,
        tokens=output[0, input_ids.shape[1] :].tolist(),
        paths=difference(flash_mla.path_counts(), before),
    )


def _save(model: Any, store: Any, document: torch.Tensor) -> tuple[str, float]:
    """Compute a document's latents and store them: the key, and the seconds that storing took."""
    from ..cache import PagedLatentCache

    cache = PagedLatentCache(model.config)
    with torch.no_grad():
        model(input_ids=document, past_key_values=cache, logits_to_keep=1)
    synchronize(model.device)
    begin = time.perf_counter()
    key = store.save(cache, document)
    return key, time.perf_counter() - begin


def _time_prefix(
    name: str, model: Any, store: Any, prefix: int, question: int, new_tokens: int, rounds: int, seed: int
) -> PrefixResult:
    prompt = prompt_of(model, prefix, question, seed)
    document = prompt[:, :prefix]
    found = {entry.key for entry in store.entries()}
    key, save_s = _save(model, store, document)
    try:
        (file_bytes,) = (entry.num_bytes for entry in store.entries() if entry.key == key)
        answers: dict[str, list[_Answer]] = {"cold": [], "warm": []}
        for _ in range(1 + rounds):
            for kind, done in answers.items():
                done.append(time_answer(model, prompt, store if kind == "warm" else None, new_tokens))
    finally:
        if key not in found:
            store.delete(key)
    cold, warm = answers["cold"][1:], answers["warm"][1:]
    cold_s, warm_s = [one.ttft_s for one in cold], [one.ttft_s for one in warm]
    same = [ours == theirs for ours, theirs in zip(warm[-1].tokens, cold[-1].tokens, strict=True)]
    return PrefixResult(
        model=name,
        dtype=str(model.dtype).removeprefix("torch."),
        prefix=prefix,
        question=question,
        new_tokens=new_tokens,
        rounds=rounds,
        loaded=warm[-1].loaded,
        file_bytes=file_bytes,
        save_s=round(save_s, 4),
        cold_s=round(statistics.median(cold_s), 5),
        cold_spread_s=round(max(cold_s) - min(cold_s), 5),
        cold_round_s=[round(one, 5) for one in cold_s],
        warm_s=round(statistics.median(warm_s), 5),
        warm_spread_s=round(max(warm_s) - min(warm_s), 5),
        warm_round_s=[round(one, 5) for one in warm_s],
        load_s=round(statistics.median(one.load_s for one in warm), 5),
        ratio=round(statistics.median(warm_s) / statistics.median(cold_s), 4),
        identical_tokens=[*same, False].index(False),
        cold_paths=cold[-1].paths,
        warm_paths=warm[-1].paths,
    )


def measure(
    name: str,
    model: Any,
    store: Any,
    prefixes: Sequence[int],
    *,
    question: int = 64,
    new_tokens: int = 8,
    rounds: int = 5,
    seed: int = 0,
    report: Callable[[str], None] = lambda line: print(line, file=sys.stderr),
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[list[PrefixResult], dict[str, str]]:
    """Prefix length by prefix length, on one model and one store.

    Args:
        name: what the rows call the model.
        model: loaded with attn_implementation="flash_mla", on one device.
        store: a `PrefixStore` of this model. What is stored here is deleted again; what was there stays.
        prefixes: tokens to store, one row of the report each.
        question: tokens behind the prefix, at least 1.
        report: takes a line as each length is done.
        progress: takes the lengths that are over and all of them, before the first and after each; never during one.
    Returns: a row per length, in their order; and by name why a length has none: memory did not suffice.
    """
    rows, failed = [], dict[str, str]()
    for number, prefix in enumerate(prefixes):
        progress(number, len(prefixes))
        try:
            row = _time_prefix(name, model, store, prefix, question, new_tokens, rounds, seed)
        except torch.OutOfMemoryError as error:
            failed[f"prefix {prefix}"] = str(error)
            continue
        rows.append(row)
        report(f"prefix {prefix}: {row.cold_s * 1e3:.1f} ms cold, {row.warm_s * 1e3:.1f} ms warm")
    progress(len(prefixes), len(prefixes))
    return rows, failed
