"""One request's turn with the model: on the server's one fixed-capacity cache, until it ends or nobody waits for it.

Requests are answered one after the other, as `transformers serve` does it, so one cache of one row serves them all. Its
pages are reserved once, when the model is warmed: no request can run out of memory for them later.
"""

from __future__ import annotations

import logging
import time
from typing import Any

import torch
from fastapi import HTTPException
from transformers import StoppingCriteriaList
from transformers.cli.serving.utils import GenerateManager

from ..cache import PagedLatentCache
from ..contract import UnsupportedError
from ..hf.models import require_mla
from .gate import Ticket, current_ticket
from .metrics import Metrics

__all__ = ["EndedError", "FailedError", "Turns"]

logger = logging.getLogger(__name__)

WARM_TOKENS = 4


class EndedError(RuntimeError):
    """Nobody waits for this answer any more. Its text is the reason of the ticket."""


class FailedError(RuntimeError):
    """`generate` raised. Its text is for the client; the log has the rest."""


class Turns(GenerateManager):
    """Transformers' queue of requests for one model, on one paged cache, within limits.

    Args:
        metrics: where tokens, times and pages are counted.
        max_new_tokens: the most that a request may ask for.
        max_waiting: requests that may wait behind the one that runs.
    """

    def __init__(self, metrics: Metrics, *, max_new_tokens: int, max_waiting: int) -> None:
        super().__init__()
        self.metrics = metrics
        self.max_new_tokens = max_new_tokens
        self.max_waiting = max_waiting
        self.cache: PagedLatentCache | None = None
        self.pages_total: int | None = None
        # Set once the cache could not be emptied: a device that is gone. Nothing can be served after that.
        self.broken: str | None = None
        # Written by the inference thread only.
        self.is_running = False
        self._admitted: set[_Turn] = set()
        metrics.running.set_function(lambda: self.is_running)
        metrics.waiting.set_function(lambda: max(0, len(self._admitted) - self.is_running))

    def warm(self, model: Any, *, max_cache_len: int, block_size: int, dtype: str | None) -> None:
        """Reserve the pages and generate a few tokens, on the thread that will generate later (it holds CUDA graphs).

        Args:
            model: the loaded model.
            max_cache_len: tokens of a request, new ones included.
            block_size, dtype: as in `PagedLatentCache`.
        Raises: UnsupportedError: the model keeps a cache of Transformers' own, which has no pages. ValueError: a bad
            option, or no model with Multi-head Latent Attention.
        """
        config = model.config.get_text_config(decoder=True)
        if require_mla(config).cache == "own":
            raise UnsupportedError(
                f"flash-mla serve: {config.model_type} keeps Transformers' own cache, so there are no pages to serve "
                "from; `transformers serve` takes it as it is"
            )
        cache = self.cache = PagedLatentCache(config, block_size, max_cache_len, dtype=dtype)
        ids = torch.zeros((1, WARM_TOKENS), dtype=torch.long, device=model.device)
        self.submit(
            model.generate,
            inputs=ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=cache,
            max_new_tokens=WARM_TOKENS,
            min_new_tokens=WARM_TOKENS,
        ).result()
        cache.reset()
        self.pages_total = cache.memory_report().pages_total
        self.metrics.pages_total.set(self.pages_total)
        self.show_pages()

    def show_pages(self) -> int:
        """Write the pages in use, as the cache counts them, into the gauge. Waits for the device."""
        assert self.cache is not None
        used = self.cache.memory_report().pages_allocated
        self.metrics.pages_used.set(used)
        return used

    def generate_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, *args: Any, **more: Any
    ) -> Any:
        """As Transformers has it, in a turn. Raises: HTTPException: beyond a limit."""
        turn = self._admit(model, inputs, gen_config)
        try:
            return super().generate_streaming(turn, processor, inputs, gen_config, *args, **more)
        except Exception:
            self._admitted.discard(turn)  # it never got into the queue
            raise

    async def generate_non_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, *args: Any, **more: Any
    ) -> Any:
        """As Transformers has it, in a turn. Raises: HTTPException: beyond a limit. EndedError, FailedError."""
        turn = self._admit(model, inputs, gen_config)
        return await super().generate_non_streaming(turn, processor, inputs, gen_config, *args, **more)

    def _admit(self, model: Any, inputs: Any, gen_config: Any) -> _Turn:
        ticket = current_ticket.get()
        assert self.cache is not None
        assert self.cache.max_cache_len is not None
        prompt = inputs["input_ids"].shape[-1]
        room = self.cache.max_cache_len - prompt
        asked = ticket.max_new_tokens
        if prompt < 1 or room < 1:
            raise HTTPException(
                400, f"the prompt must have 1 to {self.cache.max_cache_len - 1} tokens, got {prompt} (--ctx)"
            )
        if asked is not None and asked > min(self.max_new_tokens, room):
            raise HTTPException(
                400,
                f"max_tokens must be at most {self.max_new_tokens} (--max-new-tokens), and at most {room} after a "
                f"prompt of {prompt} tokens (--ctx), got {asked}",
            )
        if len(self._admitted) > self.max_waiting:
            raise HTTPException(429, f"{self.max_waiting} requests are waiting (--max-waiting): try again later")
        # Without a limit of the request: what Transformers gives, 1024 or the checkpoint's if that is more.
        gen_config.max_new_tokens = min(asked or gen_config.max_new_tokens, self.max_new_tokens, room)
        ticket.turn_taken = True
        turn = _Turn(self, model, ticket, prompt)
        self._admitted.add(turn)
        return turn

    def leave(self, turn: _Turn) -> None:
        """A turn is over."""
        self.is_running = False
        self._admitted.discard(turn)


class _Turn:
    """Takes the model's place for the handlers of `transformers serve`, which call its `generate`."""

    def __init__(self, turns: Turns, model: Any, ticket: Ticket, prompt_tokens: int) -> None:
        self.turns = turns
        self.model = model
        self.ticket = ticket
        self.length = prompt_tokens

    def generate(self, **kwargs: Any) -> Any:
        """`model.generate` on the server's cache, which is empty before and after. Runs on the inference thread."""
        turns, metrics, cache = self.turns, self.turns.metrics, self.turns.cache
        assert cache is not None
        try:
            if self.ticket.ended is not None:
                raise EndedError(self.ticket.ended)
            turns.is_running = True
            metrics.prompt_tokens.inc(self.length)
            self.ticket.prompt_tokens, self.ticket.begun = self.length, time.perf_counter()
            if self.ticket.seed is not None:
                torch.manual_seed(self.ticket.seed)
            return self.model.generate(
                **kwargs, past_key_values=cache, stopping_criteria=StoppingCriteriaList([self._after_token])
            )
        except EndedError:
            raise
        except Exception as error:
            # Raised by Transformers' streamer when a stream was cancelled.
            if self.ticket.ended is not None:
                raise EndedError(self.ticket.ended) from None
            self.ticket.failed = True
            logger.exception("flash-mla serve: generate failed")
            raise FailedError(
                f"generation failed with {type(error).__name__}; the log of the server has more"
            ) from None
        finally:
            self._empty(cache)
            turns.leave(self)

    def _empty(self, cache: PagedLatentCache) -> None:
        try:
            cache.reset()
            self.turns.show_pages()
        except Exception as error:
            self.turns.broken = f"{type(error).__name__} while the cache was emptied"
            logger.exception("flash-mla serve: the cache could not be emptied")

    def _after_token(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        """A stopping criterion that stops for nothing but a ticket that ended; counts on the way."""
        if self.ticket.ended is not None:
            raise EndedError(self.ticket.ended)
        metrics, ticket, now = self.turns.metrics, self.ticket, time.perf_counter()
        metrics.generated_tokens.inc()
        if ticket.last_token is None:
            ticket.first_token = now
            metrics.time_to_first_token.observe(now - ticket.arrived)
            ticket.pages_used = self.turns.show_pages()
        else:
            metrics.time_per_token.observe(now - ticket.last_token)
            # The token before this one is what the cache just took: look when it was the first of a page.
            assert self.turns.cache is not None
            if self.length % self.turns.cache.block_size == 1:
                ticket.pages_used = self.turns.show_pages()
        ticket.last_token = now
        ticket.generated_tokens += 1
        self.length += 1
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
