"""Prompts in, continuations out: what a batch job and a scoring server do with one model in one process."""

from __future__ import annotations

import hashlib
import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

__all__ = ["Completer", "Completion", "CompletionOptions", "check_batch_size"]


@dataclass(frozen=True)
class CompletionOptions:
    """What decides the tokens of a continuation, beside the model and the prompt.

    Args:
        max_new_tokens: 1 or more.
        do_sample: draw tokens instead of taking the likeliest; the next four arguments are read only then.
        temperature: above 0.
        top_k: tokens that are drawn from; 0: all.
        top_p: smallest set of tokens with this probability, in (0, 1].
        seed: equal seeds, prompts and options give equal tokens, whatever else is in the batch.
        chat: the prompt is a user's message, put into the tokenizer's chat template.
    Raises: ValueError: out of these bounds.
    """

    max_new_tokens: int = 64
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    chat: bool = False

    def __post_init__(self) -> None:
        for name, holds, bound in (
            ("max_new_tokens", self.max_new_tokens >= 1, "1 or more"),
            ("temperature", 0 < self.temperature < math.inf, "finite and above 0 (greedy is do_sample=False)"),
            ("top_k", self.top_k >= 0, "0 (all tokens) or more"),
            ("top_p", 0 < self.top_p <= 1, "in (0, 1]"),
        ):
            if not holds:
                raise ValueError(f"flash_mla.serving: {name} must be {bound}, got {getattr(self, name)}")


@dataclass(frozen=True)
class Completion:
    """A prompt's continuation, or why there is none.

    `tokens` are the new ones, the end token included and padding not. `finish_reason` is "stop" (end token), "length"
    (`max_new_tokens`) or "error"; then `error` says what is wrong with the prompt, and `text` is None.
    """

    text: str | None
    tokens: list[int]
    num_prompt_tokens: int
    finish_reason: str
    error: str | None = None


def check_batch_size(batch_size: int) -> None:
    """Raise ValueError unless it is 1 or more."""
    if batch_size < 1:
        raise ValueError(f"flash_mla.serving: batch_size must be 1 or more, got {batch_size}")


class Completer:
    """A causal language model on paged latents, its tokenizer, and batches of prompts of any lengths.

    Args:
        model: folder or Hub id of a checkpoint in safetensors files.
        dtype: name of torch's; default: bfloat16 on a GPU, float32 on a CPU.
        device: default: the first GPU, or the CPU.
    Raises: ValueError: an unknown dtype, or a tokenizer with neither padding nor end token.
        OSError: no such checkpoint.

    Calls from several threads take turns.
    """

    def __init__(self, model: str, *, dtype: str | None = None, device: str | None = None) -> None:
        where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        kind = getattr(torch, dtype or ("bfloat16" if where.type == "cuda" else "float32"), None)
        if not isinstance(kind, torch.dtype):
            raise ValueError(f"flash_mla.serving: dtype must be a name of torch's, as 'bfloat16', got {dtype!r}")
        self.tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left")
        if self.tokenizer.pad_token_id is None:
            if self.tokenizer.eos_token_id is None:
                raise ValueError(f"flash_mla.serving: the tokenizer of {model} has neither a padding nor an end token")
            self.tokenizer.pad_token = self.tokenizer.eos_token
        loaded = AutoModelForCausalLM.from_pretrained(
            model, dtype=kind, attn_implementation="flash_mla", use_safetensors=True
        )
        self.model = loaded.to(where).eval()
        # Drawing is ours, row by row; a checkpoint's own choice of it would draw from the process's generator.
        self.model.generation_config.update(do_sample=False, temperature=None, top_k=None, top_p=None)
        ends = self.model.generation_config.eos_token_id
        self._ends = set(ends if isinstance(ends, list) else [] if ends is None else [ends])
        self._max_length = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        self._turn = threading.Lock()

    def __call__(self, prompts: Sequence[Any], options: CompletionOptions, *, batch_size: int = 16) -> list[Completion]:
        """Continue prompts; those that cannot be continued come back with their `error`, and hold up no other.

        Args:
            prompts: strings; anything else, None too, is an error of that prompt.
            options: of all of them.
            batch_size: prompts in one `generate()`.
        Raises: ValueError: batch_size, or `chat` without a template.
        """
        check_batch_size(batch_size)
        done: dict[int, Completion] = {}
        ids: dict[int, list[int]] = {}
        for row, prompt in enumerate(prompts):
            tokens, error = self._tokens_of(prompt, options)
            if error is None:
                ids[row] = tokens
            else:
                done[row] = Completion(None, [], len(tokens), "error", error)
        # Longest first: rows of a batch are of like length, and if memory is short, that shows at once.
        rows = sorted(ids, key=lambda row: len(ids[row]), reverse=True)
        for start in range(0, len(rows), batch_size):
            batch = rows[start : start + batch_size]
            done |= zip(batch, self._generate([ids[row] for row in batch], options), strict=True)
        return [done[row] for row in range(len(prompts))]

    def _tokens_of(self, prompt: Any, options: CompletionOptions) -> tuple[list[int], str | None]:
        if not isinstance(prompt, str):
            return [], f"prompt must be a string, got {type(prompt).__name__}"
        if options.chat:
            if self.tokenizer.chat_template is None:
                raise ValueError(
                    "flash_mla.serving: chat=True needs a tokenizer with a chat template, this one has none"
                )
            message = [{"role": "user", "content": prompt}]
            prompt = self.tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        tokens: list[int] = self.tokenizer(prompt, add_special_tokens=not options.chat)["input_ids"]
        if not tokens:
            return tokens, "prompt has no tokens"
        if self._max_length is not None and len(tokens) + options.max_new_tokens > self._max_length:
            return tokens, (
                f"prompt of {len(tokens)} tokens and max_new_tokens={options.max_new_tokens} must fit "
                f"max_position_embeddings={self._max_length}"
            )
        return tokens, None

    def _generate(self, ids: list[list[int]], options: CompletionOptions) -> list[Completion]:
        inputs = self.tokenizer.pad({"input_ids": ids}, return_tensors="pt").to(self.model.device)
        with self._turn:
            output = self.model.generate(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                max_new_tokens=options.max_new_tokens,
                logits_processor=_drawing(ids, options, self.model.device) if options.do_sample else None,
            )
        completions = []
        for row, new in zip(ids, output[:, inputs["input_ids"].shape[1] :].tolist(), strict=True):
            end = next((place for place, token in enumerate(new) if token in self._ends), None)
            tokens = new if end is None else new[: end + 1]
            text = self.tokenizer.decode(tokens, skip_special_tokens=True)
            completions.append(Completion(text, tokens, len(row), "length" if end is None else "stop"))
        return completions


def _drawing(ids: list[list[int]], options: CompletionOptions, device: torch.device) -> LogitsProcessorList:
    """Processors after which the likeliest token is a drawn one."""
    found = LogitsProcessorList([TemperatureLogitsWarper(float(options.temperature))])
    if options.top_k:
        found.append(TopKLogitsWarper(options.top_k))
    if options.top_p < 1:
        found.append(TopPLogitsWarper(options.top_p))
    found.append(_RowNoise([_generator(row, options.seed, device) for row in ids]))
    return found


def _generator(ids: list[int], seed: int, device: torch.device) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}:{ids}".encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "little"))


class _RowNoise(LogitsProcessor):  # type: ignore[misc]
    """Gumbel noise on each row's logits, from a generator of its own: their argmax is a draw from the softmax.

    `generate(do_sample=True)` draws all rows from the process's generator: a row's tokens would depend on its place in
    the batch, on its mates and on other threads, and a batch job that is restarted would give other rows.
    """

    def __init__(self, generators: list[torch.Generator]) -> None:
        self.generators = generators

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Noise on `scores` `[batch, vocab]`; -inf stays -inf."""
        noise = torch.empty_like(scores, dtype=torch.float32)
        for row, generator in zip(noise, self.generators, strict=True):
            row.exponential_(generator=generator)
        return scores.float() + _gumbel(noise)


def _gumbel(exponential: torch.Tensor) -> torch.Tensor:
    """Gumbel variables of exponential ones.

    A generator with steps of 2**-24 draws an exact 0 at times: infinite noise, the token taken whatever its logit, and
    NaN where it is masked. Half a step stands in for it.
    """
    return -exponential.clamp_min(2**-25).log()
