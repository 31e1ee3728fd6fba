"""How long `generate()` takes, step by step: several batches, prompts and attentions in one process, on one model.

A figure is wall clock with the device waited for at every token: a run's `decode_ms` is the median of the second half
of its steps, a row's the median over its rounds, and its spread max - min over them. Under a growing cache nothing is
compiled, and the attentions take turns, round by round. Under "static" the rounds of one attention follow each other,
and torch.compile starts afresh before each attention, batch and capacity. In turns (`in_turns=True`) no graph would be
compiled twice either, since guards tell the attentions apart. But the graphs of the one would lie in memory while the
other is measured, and a dimension in which the two differ, the mask's, may be compiled as dynamic for the second.
"""

from __future__ import annotations

import gc
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from .clock import StepClock, synchronize
from .context import way_of
from .device_time import PROFILED_STEPS, StepProfiler, absorb_gemms
from .memory import cache_bytes, held_bytes, peak_bytes, reset_peak

__all__ = ["GenerateResult", "Setting", "StepClock", "cache_bytes", "measure", "schedule", "time_generate"]

WARMUP_TOKENS = 6  # the first step compiles, the second records a CUDA graph, the third replays it
INTERRUPTED = "interrupted"
MIN_PROFILED_TOKENS = 1 + 5 + PROFILED_STEPS  # the first token, as many steps as a warm-up has, and those recorded


@dataclass(frozen=True)
class Setting:
    """What one row measures.

    Attributes:
        model: what the row is called.
        attn: "flash_mla", "sdpa" or "eager".
        cache: "dynamic", or "static" (fixed capacity; compiled on a GPU by Transformers itself).
        batch, prompt, new_tokens: rows, tokens per row, tokens to generate.
        prefill_chunk_size: tokens of the prompt per forward; None: all at once.
        seed: of the token ids.
        cache_dtype: "fp8" (rows of our pages), or None: as the model computes.
    """

    model: str
    attn: str
    cache: str
    batch: int
    prompt: int
    new_tokens: int
    prefill_chunk_size: int | None = None
    seed: int = 0
    cache_dtype: str | None = None

    @property
    def way(self) -> str:
        """Attention and rows of the pages, in words."""
        return way_of(self.attn, self.cache_dtype)


@dataclass
class _Round:
    """One measured call; units as in `GenerateResult`."""

    ttft_s: float
    decode_ms: float
    tokens_per_s: float
    peak: int | None
    decode_peak: int | None
    cache_bytes: int
    paths: dict[str, int]
    backends: dict[str, int]
    step_ms: list[float]
    experts: dict[str, str] | None


@dataclass
class GenerateResult:
    """The rounds of one setting; times are wall clock with the device waited for at each token.

    Attributes:
        ttft_s: seconds to the first token, median of the rounds.
        decode_ms: milliseconds per token for the whole batch: of each round the median of the second half of its steps,
            of these the median.
        decode_spread_ms: max - min over the rounds; 0 for one round.
        round_ms: each round's figure.
        tokens_per_s: new tokens of all rows / the whole time, prefill included; median.
        peak_GiB: device memory beyond what was held before the call, largest of the rounds; None off CUDA.
        decode_peak_GiB: the same from the first token on.
        cache_bytes, pages_GiB: held by the cache at the end (pages for ours, keys and values for native attention).
        experts_implementation: what ran in "prefill" and in "decode" (`generate()` switches); None: no experts.
        paths: calls of the attention function by path in the first round; traced ones count once.
        backends: launches by "op backend" in the first round; replays of a CUDA graph are not seen.
        step_ms: every decode step of every round.
        identical_rows: rows whose tokens are those of the first attention; None for that one.
        cache_dtype: of the pages: "fp8"; None: as the model computes.
        device_time: of `bench.device_time`, per step; None where not profiled.
    """

    model: str
    attn: str
    cache: str
    batch: int
    prompt: int
    new_tokens: int
    prefill_chunk_size: int | None
    dtype: str
    experts_implementation: dict[str, str] | None
    rounds: int
    ttft_s: float
    decode_ms: float
    decode_spread_ms: float
    round_ms: list[float]
    tokens_per_s: float
    peak_GiB: float | None
    decode_peak_GiB: float | None
    cache_bytes: int
    pages_GiB: float
    paths: dict[str, int]
    backends: dict[str, int]
    step_ms: list[list[float]] = field(default_factory=list)
    identical_rows: int | None = None
    device_time: dict[str, Any] | None = None
    cache_dtype: str | None = None

    def to_json(self) -> dict[str, Any]:
        """As a row of a report."""
        return asdict(self)


def _counts() -> tuple[dict[Any, int], dict[Any, int]]:
    import flash_mla

    return flash_mla.path_counts(), flash_mla.backend_counts()


def difference(after: dict[Any, int], before: dict[Any, int]) -> dict[str, int]:
    """What was counted between two readings, by the words of the key."""
    grown = {key: count - before.get(key, 0) for key, count in after.items()}
    return {" ".join(key): count for key, count in grown.items() if count}


def _gib(num_bytes: int | None) -> float | None:
    return None if num_bytes is None else round(num_bytes / 2**30, 3)


def _experts(model: Any) -> str | None:
    """The implementation of the experts that a forward would use now; None for a model without any."""
    if not model._can_set_experts_implementation():
        return None
    return str(model.config.get_text_config(decoder=True)._experts_implementation)


def run(model: Any, setting: Setting, clock: StepClock) -> Any:
    """One `generate()` from random token ids, greedy, under the setting's attention, which the model is switched to."""
    from transformers import StoppingCriteriaList

    model.set_attn_implementation(setting.attn)
    # Transformers gives every later static cache at least the capacity of the largest before it: a prompt of 64 after
    # one of 32k would decode over 32k positions (seen on an H200: 192 ms per token for 36).
    if hasattr(model, "_previous_max_cache_length"):
        del model._previous_max_cache_length
    generator = torch.Generator().manual_seed(setting.seed)
    vocab_size = model.config.get_text_config(decoder=True).vocab_size
    shape = (setting.batch, setting.prompt)
    input_ids = torch.randint(min(16, vocab_size - 1), vocab_size, shape, generator=generator).to(model.device)
    options: dict[str, Any] = {
        "attention_mask": torch.ones_like(input_ids),
        "max_new_tokens": setting.new_tokens,
        "do_sample": False,
        "eos_token_id": None,
        "pad_token_id": 0,
        "return_dict_in_generate": True,
    }
    if setting.cache == "static":
        options["cache_implementation"] = "static"
    if setting.prefill_chunk_size is not None:
        options["prefill_chunk_size"] = setting.prefill_chunk_size
    if setting.cache_dtype is not None:
        options["cache_config"] = {"dtype": setting.cache_dtype}
    clock.start()
    return model.generate(input_ids, stopping_criteria=StoppingCriteriaList([clock]), **options)


def warm_up(model: Any, setting: Setting) -> None:
    """A few tokens of the same shape and capacity, so that nothing is compiled in the measured run."""
    run(model, setting, StepClock(model.device, stop_after=min(setting.new_tokens, WARMUP_TOKENS)))


def time_round(model: Any, setting: Setting) -> tuple[_Round, torch.Tensor]:
    """One measured call: the measurement, and int64 `[batch, new_tokens]`, what was generated."""
    device = model.device
    experts: dict[str, str] = {}
    prefill_peak: list[int | None] = []

    def at_token(number: int) -> None:
        if number == 1:
            prefill_peak.append(peak_bytes(device))
            reset_peak(device)
            # generate() has its own choice for decoding and takes it back at the end: read it meanwhile.
            during = _experts(model)
            if during is not None:
                experts["decode"] = during

    before_experts = _experts(model)
    if before_experts is not None:
        experts["prefill"] = before_experts
    gc.collect()
    synchronize(device)
    reset_peak(device)
    held = held_bytes(device)
    paths, backends = _counts()
    clock = StepClock(device, at_token=at_token)
    output = run(model, setting, clock)
    decode_peak, peak = peak_bytes(device), prefill_peak[0]
    if decode_peak is not None and peak is not None:
        peak, decode_peak = max(peak, decode_peak) - held, decode_peak - held
    paths_after, backends_after = _counts()
    steps = len(clock.stamps) - 1
    result = _Round(
        ttft_s=clock.ttft_s,
        decode_ms=clock.late_ms,
        tokens_per_s=setting.batch * steps / (clock.stamps[-1] - clock.stamps[0]),
        peak=peak,
        decode_peak=decode_peak,
        cache_bytes=cache_bytes(output.past_key_values),
        paths=difference(paths_after, paths),
        backends=difference(backends_after, backends),
        step_ms=[round(step, 3) for step in clock.step_ms],
        experts=experts or None,
    )
    return result, output.sequences[:, setting.prompt :]


def _row(model: Any, setting: Setting, rounds: Sequence[_Round]) -> GenerateResult:
    first = rounds[0]
    round_ms = [one.decode_ms for one in rounds]
    peaks = [one.peak for one in rounds if one.peak is not None]
    decode_peaks = [one.decode_peak for one in rounds if one.decode_peak is not None]
    return GenerateResult(
        model=setting.model,
        attn=setting.attn,
        cache=setting.cache,
        batch=setting.batch,
        prompt=setting.prompt,
        new_tokens=setting.new_tokens,
        prefill_chunk_size=setting.prefill_chunk_size,
        dtype=str(model.dtype).removeprefix("torch."),
        experts_implementation=first.experts,
        rounds=len(rounds),
        ttft_s=round(statistics.median(one.ttft_s for one in rounds), 4),
        decode_ms=round(statistics.median(round_ms), 3),
        decode_spread_ms=round(max(round_ms) - min(round_ms), 3),
        round_ms=[round(ms, 3) for ms in round_ms],
        tokens_per_s=round(statistics.median(one.tokens_per_s for one in rounds), 2),
        peak_GiB=_gib(max(peaks, default=None)),
        decode_peak_GiB=_gib(max(decode_peaks, default=None)),
        cache_bytes=first.cache_bytes,
        pages_GiB=round(first.cache_bytes / 2**30, 6),
        paths=first.paths,
        backends=first.backends,
        step_ms=[one.step_ms for one in rounds],
        cache_dtype=setting.cache_dtype,
    )


def time_generate(model: Any, setting: Setting, *, warmup: bool = True) -> tuple[GenerateResult, torch.Tensor]:
    """One setting, one round.

    Args:
        model: a loaded model on one device.
        warmup: generate a few tokens of the same shape first.
    Returns: the measurement, and int64 `[batch, new_tokens]`, what was generated.
    """
    if warmup:
        warm_up(model, setting)
    one, tokens = time_round(model, setting)
    return _row(model, setting, [one]), tokens


def schedule(attns: Sequence[str], rounds: int, in_turns: bool) -> list[tuple[str, bool]]:
    """The order of the runs of one prompt: (attention, whether torch.compile starts afresh before it).

    Args:
        attns: names.
        rounds: runs of each.
        in_turns: a, b, a, b, starting afresh once; else a, a, b, b, starting afresh before each attention.
    """
    if in_turns:
        return [(attn, not number and attn == attns[0]) for number in range(rounds) for attn in attns]
    return [(attn, not number) for attn in attns for number in range(rounds)]


def measure(
    model: Any,
    settings: Sequence[Setting],
    *,
    rounds: int = 1,
    in_turns: bool | None = None,
    warmup: bool = True,
    profile: bool = False,
    report: Callable[[str], None] = lambda line: print(line, file=sys.stderr),
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[list[GenerateResult], dict[str, str]]:
    """All settings on one model: one batch and prompt after the other, of each all attentions, in the module's order.

    Args:
        model: a loaded model on one device.
        settings: equal but for batch, prompt, attention and cache_dtype; those of one batch and prompt are measured
            together.
        rounds: runs of each setting.
        in_turns: whether the attentions take turns; None: under a growing cache.
        warmup: generate a few tokens of the same shape before the first round of each.
        profile: once all is measured, run each setting again and record `PROFILED_STEPS` late steps of the device.
        report: takes a line as each setting is done.
        progress: takes the runs that are over and all of them, before the first and after each; never during one.
    Returns: a row per setting, in their order; and by name of the setting why it has none: memory did not suffice,
        or SIGINT (Ctrl-C) came before its last round was over.
    """
    rows: dict[Setting, GenerateResult] = {}
    failed: dict[str, str] = {}
    num_runs, total, interrupted = 0, len(settings) * rounds, False
    progress(num_runs, total)
    for work in dict.fromkeys((setting.batch, setting.prompt) for setting in settings):
        by_way = {setting.way: setting for setting in settings if (setting.batch, setting.prompt) == work}
        turns = settings[0].cache == "dynamic" if in_turns is None else in_turns
        done: dict[str, list[_Round]] = {way: [] for way in by_way}
        tokens: dict[str, torch.Tensor] = {}
        for way, afresh in schedule(list(by_way), rounds, turns):
            setting = by_way[way]
            num_runs += 1
            if _name(setting) in failed:
                continue
            if interrupted:
                failed[_name(setting)] = INTERRUPTED
                continue
            try:
                if afresh:
                    start_afresh(model)
                if warmup and not done[way]:
                    warm_up(model, setting)
                one, tokens[way] = time_round(model, setting)
                done[way].append(one)
            except torch.OutOfMemoryError as error:
                failed[_name(setting)] = str(error)
            except KeyboardInterrupt:  # minutes have been spent: what has all its rounds is reported
                failed[_name(setting)], interrupted = INTERRUPTED, True
            progress(num_runs, total)
        for way, setting in by_way.items():
            if _name(setting) in failed:
                continue
            row = rows[setting] = _row(model, setting, done[way])
            reference = next(iter(by_way))
            if way != reference and reference in tokens:
                row.identical_rows = int((tokens[way] == tokens[reference]).all(dim=1).sum())
            report(f"{_name(setting)}: {row.decode_ms:.3f} ms/token")
    # Afterwards: what the profiler leaves in the driver makes later launches dearer.
    if profile and not interrupted:
        for setting, row in rows.items():
            row.device_time = profile_generate(model, setting)
    return [rows[setting] for setting in settings if setting in rows], failed


def _name(setting: Setting) -> str:
    return f"{setting.way}, batch {setting.batch}, prompt {setting.prompt}"


def start_afresh(model: Any) -> None:
    """Forget compiled graphs and give unused memory back."""
    torch._dynamo.reset()
    gc.collect()
    if model.device.type == "cuda":
        torch.cuda.empty_cache()


def profile_generate(model: Any, setting: Setting) -> dict[str, Any]:
    """Device time per step of the last `PROFILED_STEPS` steps of one more call; see `bench.device_time`.

    Under "static" on a GPU the steps are replays of a CUDA graph: only groups known by kernel name are found.

    Raises: ValueError: too few new tokens for the first steps, which compile and record, to be over by then.
    """
    if setting.new_tokens < MIN_PROFILED_TOKENS:
        raise ValueError(
            f"flash-mla bench: a profile needs new_tokens >= {MIN_PROFILED_TOKENS}, got {setting.new_tokens}"
        )
    if setting.cache == "static":
        start_afresh(model)
    profiler = StepProfiler(absorb_gemms(model.config.get_text_config(decoder=True), setting.batch))
    found: dict[str, Any] = {}

    def at_token(number: int) -> None:
        if number == setting.new_tokens - PROFILED_STEPS:
            profiler.start()
        elif number == setting.new_tokens:
            found.update(profiler.stop())

    run(model, setting, StepClock(model.device, at_token=at_token))
    return found
