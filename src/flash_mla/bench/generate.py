"""How long `generate()` takes, step by step, and one attention layer's decode step: native attention beside ours."""

from __future__ import annotations

import gc
import statistics
import time
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from .shapes import layer_config

__all__ = ["GenerateResult", "LayerResult", "StepClock", "cache_bytes", "time_generate", "time_layer"]


WARMUP_STEPS = 5  # of time_layer


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class StepClock:
    """A stopping criterion that never stops before `stop_after` tokens and notes when each token was there.

    Args:
        device: waited for at every token, so a step's time holds its device work.
        stop_after: tokens after which generation ends, or None.
    """

    def __init__(self, device: torch.device, stop_after: int | None = None) -> None:
        self.device = device
        self.stop_after = stop_after
        self.stamps: list[float] = []

    def start(self) -> None:
        """Note the time at which generation begins."""
        synchronize(self.device)
        self.stamps = [time.perf_counter()]

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        synchronize(self.device)
        self.stamps.append(time.perf_counter())
        done = self.stop_after is not None and len(self.stamps) > self.stop_after
        return torch.full((input_ids.shape[0],), done, dtype=torch.bool, device=input_ids.device)

    @property
    def ttft_s(self) -> float:
        """Seconds to the first token: prefill."""
        return self.stamps[1] - self.stamps[0]

    @property
    def step_ms(self) -> list[float]:
        """Milliseconds of each decode step, the tokens after the first."""
        return [(b - a) * 1e3 for a, b in zip(self.stamps[1:], self.stamps[2:], strict=False)]

    @property
    def late_ms(self) -> float:
        """Median over the second half of the steps, when compilation and the first allocations are over."""
        steps = self.step_ms
        return statistics.median(steps[len(steps) // 2 :]) if steps else float("nan")


def cache_bytes(cache: Any) -> int:
    """Bytes that a Transformers cache holds on its device: the pools of a paged one, keys and values of the others."""
    if hasattr(cache, "memory_report"):
        return int(cache.memory_report().bytes_allocated)
    total = 0
    for layer in getattr(cache, "layers", []):
        for name in ("keys", "values"):
            tensor = getattr(layer, name, None)
            if isinstance(tensor, torch.Tensor):
                total += tensor.numel() * tensor.element_size()
    return total


@dataclass
class GenerateResult:
    """One measured `generate()`; times are wall clock with the device waited for at each token.

    Attributes:
        ttft_s: seconds to the first token.
        decode_ms: milliseconds per token for the whole batch, median of the second half of the steps.
        tokens_per_s: new tokens of all rows / the whole time.
        peak_GiB: device memory beyond what was held before the call; None off CUDA.
        cache_bytes: bytes held by the cache at the end.
        paths: calls of the attention function by path ("dense", "prefill", ...); traced ones count once.
        backends: launches by "op backend"; replays of a CUDA graph are not seen.
    """

    model: str
    attn: str
    cache: str
    batch: int
    prompt: int
    new_tokens: int
    dtype: str
    ttft_s: float
    decode_ms: float
    tokens_per_s: float
    peak_GiB: float | None
    cache_bytes: int
    paths: dict[str, int]
    backends: dict[str, int]
    step_ms: list[float] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """As a row of a report."""
        return asdict(self)


def _counts() -> tuple[dict[Any, int], dict[Any, int]]:
    import flash_mla

    return flash_mla.path_counts(), flash_mla.backend_counts()


def _difference(after: dict[Any, int], before: dict[Any, int]) -> dict[str, int]:
    grown = {key: count - before.get(key, 0) for key, count in after.items()}
    return {" ".join(key): count for key, count in grown.items() if count}


def time_generate(
    model: Any,
    *,
    name: str,
    attn: str,
    cache: str,
    batch: int,
    prompt: int,
    new_tokens: int,
    warmup: bool = True,
    seed: int = 0,
) -> tuple[GenerateResult, torch.Tensor]:
    """Greedy generation from random token ids under attention `attn`, which the model is switched to.

    Args:
        model: a loaded model on one device.
        name: what the row is called.
        attn: "flash_mla", "sdpa" or "eager".
        cache: "dynamic", or "static" (fixed capacity; compiled on a GPU by Transformers itself).
        batch, prompt, new_tokens: rows, tokens per row, tokens to generate.
        warmup: generate a few tokens of the same shape first, so that compilation is not measured.
        seed: of the token ids.
    Returns: the measurement, and int64 `[batch, new_tokens]`, what was generated.
    """
    from transformers import StoppingCriteriaList

    device = model.device
    model.set_attn_implementation(attn)
    generator = torch.Generator().manual_seed(seed)
    vocab_size = model.config.get_text_config(decoder=True).vocab_size
    input_ids = torch.randint(min(16, vocab_size - 1), vocab_size, (batch, prompt), generator=generator).to(device)
    options: dict[str, Any] = {
        "attention_mask": torch.ones_like(input_ids),
        "max_new_tokens": new_tokens,
        "do_sample": False,
        "eos_token_id": None,
        "pad_token_id": 0,
        "return_dict_in_generate": True,
    }
    if cache == "static":
        options["cache_implementation"] = "static"

    def run(clock: StepClock) -> Any:
        clock.start()
        return model.generate(input_ids, stopping_criteria=StoppingCriteriaList([clock]), **options)

    if warmup:
        # The same capacity as the measured run, so that nothing is compiled twice; the third step replays.
        run(StepClock(device, stop_after=min(new_tokens, 6)))
    gc.collect()
    before_bytes = 0
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before_bytes = torch.cuda.memory_allocated(device)
    paths, backends = _counts()
    clock = StepClock(device)
    output = run(clock)
    peak = (torch.cuda.max_memory_allocated(device) - before_bytes) / 2**30 if device.type == "cuda" else None
    paths_after, backends_after = _counts()
    result = GenerateResult(
        model=name,
        attn=attn,
        cache=cache,
        batch=batch,
        prompt=prompt,
        new_tokens=new_tokens,
        dtype=str(model.dtype).removeprefix("torch."),
        ttft_s=round(clock.ttft_s, 4),
        decode_ms=round(clock.late_ms, 3),
        tokens_per_s=round(batch * (len(clock.stamps) - 1) / (clock.stamps[-1] - clock.stamps[0]), 2),
        peak_GiB=None if peak is None else round(peak, 3),
        cache_bytes=cache_bytes(output.past_key_values),
        paths=_difference(paths_after, paths),
        backends=_difference(backends_after, backends),
        step_ms=[round(step, 3) for step in clock.step_ms],
    )
    return result, output.sequences[:, prompt:]


@dataclass
class LayerResult:
    """One measured decode step of one attention layer.

    Attributes:
        ms: milliseconds per step with the device waited for, median.
        peak_MiB: device memory beyond the layer and its cache; None off CUDA.
    """

    attn: str
    num_heads: int
    batch: int
    seqlen_k: int
    dtype: str
    ms: float
    peak_MiB: float | None
    paths: dict[str, int]
    backends: dict[str, int]

    def to_json(self) -> dict[str, Any]:
        """As a row of a report."""
        return asdict(self)


def time_layer(
    *,
    attn: str,
    num_heads: int,
    batch: int,
    seqlen_k: int,
    device: torch.device,
    dtype: torch.dtype,
    hidden_size: int = 7168,
    steps: int = 50,
) -> LayerResult:
    """One new token per row through a DeepseekV3Attention with random weights, `seqlen_k` tokens in its cache.

    Args:
        attn: "flash_mla" (on a PagedLatentCache), "sdpa" or "eager" (on a DynamicCache).
        num_heads, batch, seqlen_k: of the step; the new token is taken out of the cache again, untimed. (A context
            that grew from step to step would never find memory of its size in torch's allocator: native attention
            then reads 33 ms for 9 at 128 heads, batch 16 x 4096 on an H200.)
        hidden_size: columns of the layer's input (7168 in DeepSeek-V3).
        steps: timed, after five to warm up.
    """
    from transformers import AutoModel, DynamicCache

    import flash_mla

    config = layer_config(num_heads, hidden_size=hidden_size, max_position_embeddings=seqlen_k + 1)
    torch.manual_seed(0)
    with torch.device(device):
        # A model of one layer around it, so that the attention is found and hooked as in any other model.
        model = AutoModel.from_config(config, dtype=dtype, attn_implementation=attn).eval()
        layer, rotary = model.layers[0].self_attn, model.rotary_emb
        latent = torch.randn(batch, 1, seqlen_k, config.kv_lora_rank, dtype=dtype)
        k_rope = torch.randn(batch, 1, seqlen_k, config.qk_rope_head_dim, dtype=dtype)
        hidden_states = torch.randn(batch, 1, hidden_size, dtype=dtype)
    cache: Any
    if attn == "flash_mla":
        cache = flash_mla.PagedLatentCache(config)
        stored, _ = cache.update(latent, k_rope, 0)
        stored.layer.write(stored, None)
    else:
        cache = DynamicCache()
        cache.update(latent, k_rope, 0)
    del latent, k_rope
    position_ids = torch.full((batch, 1), seqlen_k, device=device)
    position_embeddings = rotary(hidden_states, position_ids)

    def step() -> None:
        layer(
            hidden_states=hidden_states,
            position_embeddings=position_embeddings,
            position_ids=position_ids,
            attention_mask=None,
            past_key_values=cache,
        )

    paths, backends = _counts()
    times = []
    peak = None
    with torch.no_grad():
        for number in range(WARMUP_STEPS + steps):
            if number == WARMUP_STEPS and device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
                held = torch.cuda.memory_allocated(device)
            synchronize(device)
            begin = time.perf_counter()
            step()
            synchronize(device)
            times.append((time.perf_counter() - begin) * 1e3)
            cache.crop(-1)
        if device.type == "cuda":
            peak = round((torch.cuda.max_memory_allocated(device) - held) / 2**20, 1)
    paths_after, backends_after = _counts()
    return LayerResult(
        attn=attn,
        num_heads=num_heads,
        batch=batch,
        seqlen_k=seqlen_k,
        dtype=str(dtype).removeprefix("torch."),
        ms=round(statistics.median(times[WARMUP_STEPS:]), 4),
        peak_MiB=peak,
        paths=_difference(paths_after, paths),
        backends=_difference(backends_after, backends),
    )
