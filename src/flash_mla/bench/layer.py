"""One decode step of one DeepSeek-V3 attention layer, native attention beside ours: eager, and from a CUDA graph."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from .clock import synchronize
from .device_time import PROFILED_STEPS, StepProfiler, absorb_gemms
from .generate import difference
from .memory import held_bytes, peak_bytes, reset_peak
from .shapes import layer_config

__all__ = ["LayerResult", "LayerStep", "middle_of_page", "time_layer"]

WARMUP_STEPS = 5
BLOCK_SIZE = 64  # tokens per page, the cache's default


def middle_of_page(seqlen_k: int) -> int:
    """`seqlen_k` moved to where its last page is half full.

    A step at a full page takes a new one and uploads the table of pages. Decoding does so once in 64 steps; a step that
    is taken out of the cache again would do so every time.
    """
    return seqlen_k // BLOCK_SIZE * BLOCK_SIZE + BLOCK_SIZE // 2


@dataclass
class LayerResult:
    """One measured decode step of one attention layer.

    Attributes:
        prompt: tokens asked for; seqlen_k: tokens in the cache, `middle_of_page(prompt)`.
        ms: milliseconds per eager step with the device waited for, median.
        graph_ms: milliseconds per replay of the step as a CUDA graph, on the device, median of replays queued one after
            the other; the cache has a fixed capacity and grows by a token with each. None: see `graph_reason`.
        graph_reason: why there is no graph; empty if there is one.
        peak_MiB: device memory of eager steps beyond the layer and its cache; None off CUDA.
        paths, backends: counted over the eager steps.
        device_time: of `bench.device_time` over eager steps, per step; None where not profiled.
    """

    attn: str
    num_heads: int
    batch: int
    prompt: int
    seqlen_k: int
    dtype: str
    ms: float
    graph_ms: float | None
    graph_reason: str
    peak_MiB: float | None
    paths: dict[str, int]
    backends: dict[str, int]
    device_time: dict[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        """As a row of a report."""
        return asdict(self)


class LayerStep:
    """A DeepseekV3Attention with random weights and one new token per row, to be run on caches that it fills.

    Args:
        attn: "flash_mla", "sdpa" or "eager".
        num_heads, batch, seqlen_k: of the step.
        hidden_size: columns of the layer's input.
    """

    def __init__(
        self,
        attn: str,
        num_heads: int,
        batch: int,
        seqlen_k: int,
        device: torch.device,
        dtype: torch.dtype,
        hidden_size: int,
    ) -> None:
        from transformers import AutoModel

        self.attn, self.batch, self.seqlen_k, self.device, self.dtype = attn, batch, seqlen_k, device, dtype
        self.config = layer_config(num_heads, hidden_size=hidden_size, max_position_embeddings=seqlen_k + 1)
        torch.manual_seed(0)
        with torch.device(device):
            # A model of one layer around it, so that the attention is found and hooked as in any other model.
            model = AutoModel.from_config(self.config, dtype=dtype, attn_implementation=attn).eval()
            self.layer = model.layers[0].self_attn
            self.hidden_states = torch.randn(batch, 1, hidden_size, dtype=dtype)
            self.position_ids = torch.full((batch, 1), seqlen_k)
        self.position_embeddings = model.rotary_emb(self.hidden_states, self.position_ids)

    def filled_cache(self, max_cache_len: int | None = None) -> Any:
        """A cache with `seqlen_k` random latents per row: growing, or of a fixed capacity in tokens per row."""
        from transformers import DynamicCache, StaticCache

        import flash_mla

        config = self.config
        torch.manual_seed(1)
        with torch.device(self.device):
            latent = torch.randn(self.batch, 1, self.seqlen_k, config.kv_lora_rank, dtype=self.dtype)
            k_rope = torch.randn(self.batch, 1, self.seqlen_k, config.qk_rope_head_dim, dtype=self.dtype)
        if self.attn == "flash_mla":
            paged = flash_mla.PagedLatentCache(config, block_size=BLOCK_SIZE, max_cache_len=max_cache_len)
            stored, _ = paged.update(latent, k_rope, 0)
            stored.layer.write(stored, None)
            return paged
        native = DynamicCache() if max_cache_len is None else StaticCache(config=config, max_cache_len=max_cache_len)
        native.update(latent, k_rope, 0)
        return native

    def mask_for(self, max_cache_len: int) -> torch.Tensor | None:
        """What hides the empty positions of a native cache of fixed capacity, additive `[batch, 1, 1, max_cache_len]`;
        None for ours, which knows its lengths."""
        if self.attn == "flash_mla":
            return None
        hidden = torch.arange(max_cache_len, device=self.device) > self.seqlen_k
        mask = torch.zeros(max_cache_len, dtype=self.dtype, device=self.device)
        return mask.masked_fill_(hidden, torch.finfo(self.dtype).min).expand(self.batch, 1, 1, -1)

    def __call__(self, cache: Any, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """One step; the cache holds a token more per row afterwards.

        Returns: `[batch, 1, hidden_size]`.
        """
        out: torch.Tensor = self.layer(
            hidden_states=self.hidden_states,
            position_embeddings=self.position_embeddings,
            position_ids=self.position_ids,
            attention_mask=attention_mask,
            past_key_values=cache,
        )[0]
        return out


def _capture(call: Callable[[], Any]) -> Callable[[], None]:
    """A CUDA graph of one call, which runs a few times first; returns what replays it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARMUP_STEPS):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def _replay_ms(replay: Callable[[], None], steps: int) -> float:
    """Median milliseconds on the device of replays queued without waiting for any, after a few to warm up."""
    for _ in range(WARMUP_STEPS):
        replay()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
    events[0].record()
    for event in events[1:]:
        replay()
        event.record()
    events[-1].synchronize()
    times: list[float] = [begin.elapsed_time(end) for begin, end in itertools.pairwise(events)]
    return statistics.median(times)


def graph_ms(
    step: LayerStep,
    steps: int,
    capture: Callable[[Callable[[], Any]], Callable[[], None]] = _capture,
    timed: Callable[[Callable[[], None], int], float] = _replay_ms,
) -> float:
    """Milliseconds per replay of a step on a cache of fixed capacity.

    Args:
        steps: replays to time.
        capture, timed: how a call becomes its replay, and how replays are timed.
    """
    # The warm-up, the capture, which the host counts as a step too, and all replays.
    capacity = step.seqlen_k + WARMUP_STEPS + 1 + WARMUP_STEPS + steps
    cache, mask = step.filled_cache(capacity), step.mask_for(capacity)
    return timed(capture(lambda: step(cache, mask)), steps)


def _graph_or_reason(step: LayerStep, steps: int) -> tuple[float | None, str]:
    if step.device.type != "cuda":
        return None, "a CUDA graph needs a GPU"
    try:
        with torch.cuda.device(step.device):
            return round(graph_ms(step, steps), 4), ""
    except (RuntimeError, ValueError) as error:  # capture refused; native attention may do so
        return None, str(error).splitlines()[0]


def time_layer(
    *,
    attn: str,
    num_heads: int,
    batch: int,
    prompt: int,
    device: torch.device,
    dtype: torch.dtype,
    hidden_size: int = 7168,
    steps: int = 50,
    profile: bool = False,
) -> LayerResult:
    """One new token per row through a DeepseekV3Attention with random weights.

    Args:
        attn: "flash_mla" (on a PagedLatentCache), "sdpa" or "eager" (on a DynamicCache, in the graph a StaticCache).
        num_heads, batch: of the step.
        prompt: tokens in the cache, moved to the middle of a page. In eager steps the new token is taken out of the
            cache again, untimed. (A context that grew from step to step would never find memory of its size in torch's
            allocator: native attention then reads 33 ms for 9 at 128 heads, batch 16 x 4096 on an H200.)
        hidden_size: columns of the layer's input (7168 in DeepSeek-V3).
        steps: timed, after five to warm up; in the graph as many again.
        profile: record the device in a few more eager steps.
    """
    seqlen_k = middle_of_page(prompt)
    step = LayerStep(attn, num_heads, batch, seqlen_k, device, dtype, hidden_size)
    times = []
    with torch.no_grad():
        cache = step.filled_cache()
        before = _counts()
        for number in range(WARMUP_STEPS + steps):
            if number == WARMUP_STEPS:
                reset_peak(device)
                held = held_bytes(device)
            synchronize(device)
            begin = time.perf_counter()
            step(cache)
            synchronize(device)
            times.append((time.perf_counter() - begin) * 1e3)
            cache.crop(-1)
        peak = peak_bytes(device)
        paths, backends = (difference(after, was) for after, was in zip(_counts(), before, strict=True))
        profiled = _profile(step, cache) if profile else None
        del cache
        replay_ms, reason = _graph_or_reason(step, steps)
    return LayerResult(
        attn=attn,
        num_heads=num_heads,
        batch=batch,
        prompt=prompt,
        seqlen_k=seqlen_k,
        dtype=str(dtype).removeprefix("torch."),
        ms=round(statistics.median(times[WARMUP_STEPS:]), 4),
        graph_ms=replay_ms,
        graph_reason=reason,
        peak_MiB=None if peak is None else round((peak - held) / 2**20, 1),
        paths=paths,
        backends=backends,
        device_time=profiled,
    )


def _profile(step: LayerStep, cache: Any) -> dict[str, Any]:
    """Device time of eager steps, which stay in the cache: cropping has kernels of its own."""
    profiler = StepProfiler(absorb_gemms(step.config, step.batch))
    synchronize(step.device)
    profiler.start()
    for _ in range(PROFILED_STEPS):
        step(cache)
    synchronize(step.device)
    return profiler.stop()


def _counts() -> tuple[dict[Any, int], dict[Any, int]]:
    import flash_mla

    return flash_mla.path_counts(), flash_mla.backend_counts()
