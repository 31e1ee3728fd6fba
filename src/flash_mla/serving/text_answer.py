"""How a checked request becomes text: one `generate()` on pages, what it took, and why not if it may not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, StoppingCriteriaList

from ..bench.clock import StepClock
from .emf import RequestNumbers
from .text_request import Limits, RequestError, TextRequest

__all__ = ["Answer", "Served", "generate_text", "load"]

BLOCK_SIZE = 64  # tokens per page, the default of the cache that generate() makes


@dataclass
class Served:
    """A model with its tokenizer."""

    model: Any
    tokenizer: Any


@dataclass
class Answer:
    """What was generated, one dict per row, and the numbers of its metric line."""

    outputs: list[dict[str, Any]]
    numbers: RequestNumbers


def load(model_dir: str) -> Served:
    """A checkpoint of safetensors on the first GPU in its own dtype, or on the CPU in float32.

    Raises: OSError: no such files, or weights that only a pickle holds.
    """
    on_gpu = torch.cuda.is_available()
    model = AutoModelForCausalLM.from_pretrained(
        model_dir,
        attn_implementation="flash_mla",
        dtype="auto" if on_gpu else torch.float32,
        device_map="cuda" if on_gpu else "cpu",
        use_safetensors=True,
    )
    tokenizer = AutoTokenizer.from_pretrained(model_dir, padding_side="left")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token  # masked wherever it pads
    return Served(model.eval(), tokenizer)


def generate_text(request: TextRequest, served: Served, limits: Limits) -> Answer:
    """Answer a request with one `generate()`; greedy unless the request samples.

    Raises: RequestError: 400: a prompt without tokens, more tokens than the model has positions, or more pages than the
        rows may take. Nothing has been computed by then.
    """
    model, tokenizer = served.model, served.tokenizer
    inputs = tokenizer(list(request.prompts), return_tensors="pt", padding=True).to(model.device)
    inputs.pop("token_type_ids", None)
    lengths = inputs["attention_mask"].sum(1).tolist()
    _check_room(lengths, request.max_new_tokens, model, limits)
    clock = StepClock(model.device)
    clock.start()
    generated = model.generate(
        **inputs,
        **request.sampling,
        max_new_tokens=request.max_new_tokens,
        pad_token_id=tokenizer.pad_token_id,
        stopping_criteria=StoppingCriteriaList([clock]),
        return_dict_in_generate=True,
    )
    ends = model.generation_config.eos_token_id
    ends = set(ends) if isinstance(ends, list) else {ends}
    outputs = []
    for length, row in zip(lengths, generated.sequences[:, inputs["input_ids"].shape[1] :].tolist(), strict=True):
        # What comes after a row's end token is padding, which may be the end token again.
        count = next((number for number, token in enumerate(row, 1) if token in ends), None)
        new = row if count is None else row[:count]
        outputs.append(
            {
                "generated_text": tokenizer.decode(new, skip_special_tokens=True),
                "prompt_tokens": length,
                "generated_tokens": len(new),
                "finish_reason": "length" if count is None else "stop",
            }
        )
    steps = clock.step_ms
    numbers = RequestNumbers(
        prompt_tokens=sum(lengths),
        generated_tokens=sum(output["generated_tokens"] for output in outputs),
        time_per_token_ms=round(sum(steps) / len(steps), 3) if steps else None,
        time_to_first_token_ms=round(clock.ttft_s * 1e3, 3),
        kv_pages_used=generated.past_key_values.memory_report().pages_allocated,
        kv_pages_total=limits.kv_pages,
    )
    return Answer(outputs, numbers)


def _check_room(lengths: list[int], new_tokens: int, model: Any, limits: Limits) -> None:
    """Raise RequestError if the rows need more positions than the model has, or more pages than they may take."""
    if not min(lengths):
        raise RequestError(400, f"inputs must be strings with tokens: number {lengths.index(0)} has none")
    positions = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    longest = max(lengths) + new_tokens
    if positions is not None and longest > positions:
        raise RequestError(
            400, f"prompt and max_new_tokens must be at most {positions} tokens, got {max(lengths)} + {new_tokens}"
        )
    pages = sum(-(-(length + new_tokens) // BLOCK_SIZE) for length in lengths)
    if pages > limits.kv_pages:
        raise RequestError(
            400,
            f"the rows must take at most {limits.kv_pages} pages of {BLOCK_SIZE} tokens together, prompt and "
            f"max_new_tokens, got {pages}",
        )
