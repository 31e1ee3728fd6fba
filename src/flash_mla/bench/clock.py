"""When each token of a `generate()` was there, with the device waited for at each."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

__all__ = ["StepClock", "synchronize"]


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class StepClock:
    """A stopping criterion that never stops before `stop_after` tokens and notes when each token was there.

    Args:
        device: waited for at every token, so a step's time holds its device work.
        stop_after: tokens after which generation ends, or None.
        at_token: called with the number of the token (from 1) once its time is noted; what it takes counts as part of
            the next step.
    """

    def __init__(
        self, device: torch.device, stop_after: int | None = None, at_token: Callable[[int], None] | None = None
    ) -> None:
        self.device = device
        self.stop_after = stop_after
        self.at_token = at_token
        self.stamps: list[float] = []

    def start(self) -> None:
        """Note the time at which generation begins."""
        synchronize(self.device)
        self.stamps = [time.perf_counter()]

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        synchronize(self.device)
        self.stamps.append(time.perf_counter())
        number = len(self.stamps) - 1
        if self.at_token is not None:
            self.at_token(number)
        done = self.stop_after is not None and number >= self.stop_after
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
