"""What happens around the forwards of a prompt: sequences of one prompt compute it once; a callback says how far it is.

Both wrap `GenerationMixin._prefill`, through which sampling and beam search run every prompt.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any
from weakref import WeakKeyDictionary

import torch
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.generation.utils import GenerationMixin

from ..cache import PagedIndexedLayer, PagedLatentCache, PagedLatentLayer

__all__ = ["expect_repeats", "prefill_progress", "wrap_prefill"]

logger = logging.getLogger(__name__)


def wrap_prefill(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `GenerationMixin._prefill`; without repeated rows and without a callback it is the original."""

    @functools.wraps(original)
    def _prefill(
        self: Any,
        input_ids: torch.Tensor,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        is_first_iteration: bool = True,
    ) -> Any:
        run = functools.partial(_run, original, self, generation_config, is_first_iteration)
        cache = model_kwargs.get("past_key_values")
        if not isinstance(cache, PagedLatentCache) or cache not in _repeats:
            return run(input_ids, model_kwargs)
        repeats = _repeats.pop(cache)
        why = _why_not_once(self, cache, generation_config, model_kwargs)
        if why is None:
            why, once = _every_nth_row(input_ids, model_kwargs, repeats)
        if why is not None:
            _say(f"{why}: the prompt is computed once per sequence, its pages are shared all the same")
            return run(input_ids, model_kwargs)
        cache.group.prompt_repeats = 1  # this prompt comes without its repetitions
        outputs = run(once.pop("input_ids"), once)
        cache.batch_repeat_interleave(repeats)
        batch = input_ids.shape[0] // repeats
        for name, value in list(outputs.items()):
            if isinstance(value, torch.Tensor) and value.ndim > 0 and value.shape[0] == batch:
                outputs[name] = value.repeat_interleave(repeats, dim=0)
        return outputs

    return _prefill


@functools.lru_cache(maxsize=64)  # some texts carry shapes
def _say(text: str) -> None:
    logger.info("flash_mla: %s", text)


# --- one prompt, several sequences ------------------------------------------------------------------------------------

# Caches that `generate` made and no prompt has reached yet: how many consecutive rows it gave the same prompt.
_repeats: WeakKeyDictionary[PagedLatentCache, int] = WeakKeyDictionary()

# Layers whose `batch_repeat_interleave` repeats all that they hold. Linear-attention layers have none, or inherit one
# that repeats keys and values and not their state.
REPEATABLE = (PagedLatentLayer, PagedIndexedLayer, DynamicLayer, DynamicSlidingWindowLayer)


def expect_repeats(cache: PagedLatentCache, repeats: int) -> None:
    """Say that `generate` made this empty cache for rows that it repeats itself, `repeats` equal ones in a row."""
    if repeats > 1:
        _repeats[cache] = repeats


def _why_not_once(
    model: Any, cache: PagedLatentCache, generation_config: Any, model_kwargs: dict[str, Any]
) -> str | None:
    """Why each of the repeated rows has to be computed, or None."""
    for layer in cache.layers:
        if type(layer) not in REPEATABLE:
            return f"cache layers of type {type(layer).__name__} cannot repeat their rows"
    for name in ("output_hidden_states", "output_attentions"):
        if getattr(generation_config, name, None) or model_kwargs.get(name) or getattr(model.config, name, None):
            return f"{name} asks for every row's"
    if model.config.is_encoder_decoder or generation_config.is_assistant:
        return "encoder-decoder models and assistants prefill in their own way"
    if generation_config.token_healing:
        return "token healing changes rows after they were repeated"
    if type(model)._expand_inputs_for_generation is not GenerationMixin._expand_inputs_for_generation:
        return f"{type(model).__name__} repeats its inputs in its own way"
    if cache.group.states:
        return "the cache holds tokens already"
    return None


def _every_nth_row(
    input_ids: torch.Tensor, model_kwargs: dict[str, Any], repeats: int
) -> tuple[str | None, dict[str, Any]]:
    """Take back what `generate` did with `repeat_interleave(repeats)`.

    Args:
        input_ids: `[batch * repeats, positions]`.
        model_kwargs: tensors `[batch * repeats, ...]`; `position_ids` may be `[axes, batch * repeats, positions]`.
        repeats: equal rows that follow each other.
    Returns: what could not be taken back, or None; a new dict of `model_kwargs` and "input_ids" with every
        `repeats`-th row, as views.
    """
    rows = input_ids.shape[0]
    if rows % repeats:
        return f"{rows} rows are not groups of {repeats}", {}
    once: dict[str, Any] = {}
    for name, value in {**model_kwargs, "input_ids": input_ids}.items():
        if name == "past_key_values" or value is None or isinstance(value, (bool, int, float, str)):
            once[name] = value
            continue
        dim = 1 if name == "position_ids" and isinstance(value, torch.Tensor) and value.ndim == 3 else 0
        if not isinstance(value, torch.Tensor) or value.ndim <= dim or value.shape[dim] != rows:
            found = f"shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else f"type {type(value).__name__}"
            return f"{name} of {found} has no dimension of {rows} rows", {}
        once[name] = value[(slice(None),) * dim + (slice(None, None, repeats),)]
    return None, once


# --- progress ---------------------------------------------------------------------------------------------------------

_callback: ContextVar[Callable[[int, int], object] | None] = ContextVar("flash_mla_prefill_progress", default=None)


@contextmanager
def prefill_progress(callback: Callable[[int, int], object]) -> Iterator[None]:
    """Within this block, hear how far `generate` is with a prompt, under any attention implementation.

    Args:
        callback: called as `callback(done, total)`, both in positions per row, padding included. The computation of the
            first `done` has finished on the device. `total` counts the positions that this call computes: a context
            that is in the cache already is not part of it. With `prefill_chunk_size=n` it is called after every n
            positions, otherwise once, with `done == total`. What it returns is ignored.
    Raises: ValueError: `callback` is not callable. What the callback raises ends `generate`; the model is unchanged,
        a cache that was passed keeps the chunks that ran.

    The device is not kept waiting between chunks: chunk i + 1 is queued before the host waits for chunk i, so the news
    are late by up to one chunk, and only the last chunk is waited for with nothing queued behind it. That holds for
    CUDA and ROCm; on other accelerators the host waits for all that is queued, once per chunk.

        with flash_mla.prefill_progress(lambda done, total: print(f"{done} of {total}")):
            model.generate(**inputs, prefill_chunk_size=4096)

    It is the block of one thread: a thread started inside it does not hear of it and opens its own. A block inside
    another one takes its place. Assisted decoding prefills in its own way and calls nothing; nor does anything after
    `flash_mla.unregister()`.
    """
    if not callable(callback):
        raise ValueError(f"flash_mla.prefill_progress: needs a callable of (done, total), got {callback!r}")
    token = _callback.set(callback)
    try:
        yield
    finally:
        _callback.reset(token)


def _run(
    original: Callable[..., Any],
    model: Any,
    generation_config: Any,
    is_first_iteration: bool,
    input_ids: torch.Tensor,
    model_kwargs: dict[str, Any],
) -> Any:
    """Transformers' own `_prefill`, watched if somebody listens."""
    callback = _callback.get()
    if callback is None or generation_config.is_assistant:  # a draft's prompts are not the caller's
        return original(model, input_ids, generation_config, model_kwargs, is_first_iteration=is_first_iteration)
    total = 0  # without chunks the one forward says itself how long it is
    if generation_config.prefill_chunk_size is not None:
        total = _new_positions(model, input_ids, generation_config, model_kwargs, is_first_iteration)
    meter = _Meter(callback, total, {parameter.device for parameter in model.parameters()})
    watched = _Watched(model, meter)
    outputs = original(watched, input_ids, generation_config, model_kwargs, is_first_iteration=is_first_iteration)
    meter.forward_was_queued()
    meter.report(still_running=0)
    return outputs


def _new_positions(
    model: Any,
    input_ids: torch.Tensor,
    generation_config: Any,
    model_kwargs: dict[str, Any],
    is_first_iteration: bool,
) -> int:
    """Positions per row that a chunked `_prefill` computes, by its rule: ids as long as the mask hold the context."""
    cache = model_kwargs.get("past_key_values")
    past = 0 if cache is None else int(cache.get_seq_length())
    embeds = model_kwargs.get("inputs_embeds")
    if embeds is not None and is_first_iteration and not model.config.is_encoder_decoder:
        return int(embeds.shape[1]) - past
    mask = model_kwargs.get("decoder_attention_mask" if model.config.is_encoder_decoder else "attention_mask")
    mask_length = mask.shape[1] if mask is not None else getattr(generation_config, "_mask_length", -1)
    width = int(input_ids.shape[1])
    return width - past if mask_length == width else width


class _Watched:
    """A model to `_prefill`, except that a meter hears of every chunk. The model itself stays untouched, so there is
    nothing to put back on an error, and other threads that generate with it notice nothing.

    `prepare_inputs_for_generation` runs once per chunk and is never compiled; the forward may be.
    """

    __slots__ = ("_meter", "_model")
    _meter: _Meter
    _model: Any

    def __init__(self, model: Any, meter: _Meter) -> None:
        object.__setattr__(self, "_model", model)
        object.__setattr__(self, "_meter", meter)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._model, name, value)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._model(*args, **kwargs)

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> Any:
        self._meter.forward_was_queued()
        self._meter.report(still_running=1)
        inputs = self._model.prepare_inputs_for_generation(*args, **kwargs)
        given = (inputs.get(name) for name in ("inputs_embeds", "input_ids", "decoder_input_ids"))
        self._meter.next_positions = next(int(tensor.shape[1]) for tensor in given if tensor is not None)
        return inputs


class _Meter:
    """Which chunks are queued, and which of them the device has finished.

    Args:
        callback: see `prefill_progress`.
        total: positions per row that will be computed; 0: as many as were.
        devices: where the model computes.
    """

    def __init__(self, callback: Callable[[int, int], object], total: int, devices: set[torch.device]) -> None:
        self.callback = callback
        self.total = total
        self.devices = devices
        self.next_positions = 0  # of the chunk whose inputs were prepared last
        self.num_queued = 0  # positions
        self.marks: list[tuple[int, Callable[[], None]]] = []  # positions up to here, and how to wait for them

    def forward_was_queued(self) -> None:
        """Mark the end of the chunk whose inputs were prepared last."""
        if self.next_positions:
            self.num_queued += self.next_positions
            self.next_positions = 0
            self.marks.append((self.num_queued, _mark(self.devices)))

    def report(self, still_running: int) -> None:
        """Wait for all marked chunks but the last `still_running`, and call back after each."""
        while len(self.marks) > still_running:
            done, wait = self.marks.pop(0)
            wait()
            self.callback(done, max(self.total, done))


def _mark(devices: set[torch.device]) -> Callable[[], None]:
    """Mark what is queued on these devices now; the function returned waits for it. On the CPU it is done already."""
    events = []
    for device in devices:
        if device.type == "cuda":
            # A blocking event lets the host thread sleep: a chunk takes milliseconds, and spinning takes a core.
            event = torch.cuda.Event(blocking=True)
            event.record(torch.cuda.current_stream(device))
            events.append(event)
    others = [device for device in devices if device.type not in ("cpu", "cuda", "meta")]

    def wait() -> None:
        for event in events:
            event.synchronize()
        for device in others:
            torch.accelerator.synchronize(device)

    return wait
