"""A worker's speed, measured from the calls it finishes.

One number is fitted: engine seconds per prefilled token *at the batch sizes the worker really runs*, from busy
windows, with forgetting. A decoded token counts as `DECODE_WEIGHT` prefilled ones: a fit of both cannot tell them
apart as long as calls look alike, and then gives either of them any value; placement needs only their sum, and a
prefill cost of the right order. The latency of a decode step, for predictions of duration, comes from the calls.
"""

from __future__ import annotations

from dataclasses import dataclass

PRIOR_PREFILL_S = 1 / 8000
"""Before anything is measured: a mid-size model on a modern accelerator. Only ratios matter until then."""
DECODE_WEIGHT = 4.0
"""In full batches: about 3 measured on the CPU build, 4 to 15 on accelerators by their published rates."""
_FORGET = 0.95
_SMOOTH = 0.1
_MIN_WINDOW_S = 0.5
_LEAST_S, _MOST_S = 1e-7, 0.1


@dataclass(frozen=True, slots=True)
class RateStatistics:
    """Tokens per second: prefill, decode of the whole batch, decode of one call; and windows measured."""

    prefill: float
    decode: float
    decode_one: float
    windows: int


class Rates:
    """The fit for one worker; `started`, `finished` and `abandoned` are told of every call."""

    def __init__(self) -> None:
        # -- state
        self.prefill_s = PRIOR_PREFILL_S  # engine seconds per prompt token computed
        self.step_s = DECODE_WEIGHT * PRIOR_PREFILL_S  # seconds between two tokens of one call
        self._seconds = self._tokens = 0.0  # of the windows so far, decayed by _FORGET a window
        self._windows = self._steps = 0
        # The window under way: busy seconds, and weighted tokens of the calls that ended in it.
        self._busy = self._weighted = 0.0
        self._running = 0
        self._since = 0.0  # until when `_busy` is accounted

    def __repr__(self) -> str:
        return f"<Rates prefill={1 / self.prefill_s:.0f}/s step={1e3 * self.step_s:.1f}ms of {self._windows} windows>"

    def statistics(self) -> RateStatistics:
        return RateStatistics(
            1 / self.prefill_s, 1 / (DECODE_WEIGHT * self.prefill_s), 1 / self.step_s, self._windows
        )

    def work(self, prompt_tokens: float, output_tokens: float) -> float:
        """Engine seconds to prefill `prompt_tokens` and decode `output_tokens` within a full batch."""
        return (prompt_tokens + DECODE_WEIGHT * output_tokens) * self.prefill_s

    def duration(self, prompt_tokens: float, output_tokens: float) -> float:
        """Seconds one call takes from start to end at the usual load."""
        return prompt_tokens * self.prefill_s + output_tokens * self.step_s

    def started(self, now: float) -> None:
        if self._running == 0:
            self._since = now
        self._running += 1

    def finished(self, prompt_tokens: float, output_tokens: float, took_s: float, now: float) -> None:
        """A call ended: `prompt_tokens` it computed (not those it found cached), `output_tokens`, in `took_s`."""
        self.abandoned(now)
        self._weighted += prompt_tokens + DECODE_WEIGHT * output_tokens
        if output_tokens >= 4:
            step = max(1e-5, (took_s - prompt_tokens * self.prefill_s) / output_tokens)
            self._steps += 1
            self.step_s += max(_SMOOTH, 1 / self._steps) * (step - self.step_s)
        if self._busy >= _MIN_WINDOW_S:
            self._seconds = _FORGET * self._seconds + self._busy
            self._tokens = _FORGET * self._tokens + self._weighted
            self._windows += 1
            self._busy = self._weighted = 0.0
            if self._tokens > 0:
                self.prefill_s = min(_MOST_S, max(_LEAST_S, self._seconds / self._tokens))

    def abandoned(self, now: float) -> None:
        """A call ended without a count (it failed, or was aborted)."""
        if self._running:
            self._busy += max(0.0, now - self._since)
            self._since = now
            self._running -= 1
