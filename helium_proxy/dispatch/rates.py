"""A worker's speed, measured from the calls it finishes.

Two numbers drive every cost: engine seconds per prefilled token and per decoded token *at the batch sizes the worker
really runs*. They are fitted by recursive least squares with forgetting to busy windows: over a window, engine
seconds ≈ a · computed prompt tokens + b · output tokens. A third, the latency of one decode step, comes from the
calls themselves.
"""

from __future__ import annotations

from dataclasses import dataclass

# Before anything is measured: a mid-size model on a modern accelerator. Only ratios matter until then.
PRIOR_PREFILL_S = 1 / 8000
PRIOR_DECODE_S = 1 / 2000
_FORGET = 0.98
_MIN_WINDOW_S = 0.5


@dataclass(frozen=True, slots=True)
class RateStatistics:
    """Tokens per second: prefill, decode of the whole batch, decode of one call; and windows measured."""

    prefill: float
    decode: float
    decode_one: float
    windows: int


class Rates:
    """The fit for one worker; `started` and `finished` are told of every call."""

    def __init__(self) -> None:
        # -- state
        self.prefill_s = PRIOR_PREFILL_S  # engine seconds per prompt token computed
        self._decode_s = PRIOR_DECODE_S
        self._step_s = 4 * PRIOR_DECODE_S  # seconds between two tokens of one call
        # Normal equations of the fit, decayed by _FORGET a window; the prior enters as one weak window.
        self._pp = self._po = self._oo = self._pt = self._ot = 0.0
        self._windows = 0
        # The window under way: busy seconds so far, and tokens of the calls that ended in it.
        self._busy = 0.0
        self._prompt = 0.0
        self._output = 0.0
        self._running = 0
        self._since = 0.0  # when `_running` last became or was accounted as non-zero

    def __repr__(self) -> str:
        return f"<Rates prefill={1 / self.prefill_s:.0f}/s decode={1 / self._decode_s:.0f}/s>"

    def statistics(self) -> RateStatistics:
        return RateStatistics(1 / self.prefill_s, 1 / self._decode_s, 1 / self._step_s, self._windows)

    def work(self, prompt_tokens: float, output_tokens: float) -> float:
        """Engine seconds to prefill `prompt_tokens` and decode `output_tokens` within a full batch."""
        return prompt_tokens * self.prefill_s + output_tokens * self._decode_s

    def duration(self, prompt_tokens: float, output_tokens: float) -> float:
        """Seconds one call takes from start to end at the usual load."""
        return prompt_tokens * self.prefill_s + output_tokens * self._step_s

    def started(self, now: float) -> None:
        if self._running == 0:
            self._since = now
        self._running += 1

    def finished(self, prompt_tokens: float, output_tokens: float, took_s: float, now: float) -> None:
        """A call ended: `prompt_tokens` it computed (not those it found cached), `output_tokens`, in `took_s`."""
        self._busy += max(0.0, now - self._since)
        self._since = now
        self._running = max(0, self._running - 1)
        self._prompt += prompt_tokens
        self._output += output_tokens
        if output_tokens >= 4:
            step = max(1e-5, (took_s - prompt_tokens * self.prefill_s) / output_tokens)
            self._step_s += 0.1 * (step - self._step_s)
        if self._busy >= _MIN_WINDOW_S and self._prompt + self._output > 0:
            self._fit(self._prompt, self._output, self._busy)
            self._busy = self._prompt = self._output = 0.0

    def abandoned(self, now: float) -> None:
        """A call ended without a count (it failed, or was aborted)."""
        self._busy += max(0.0, now - self._since)
        self._since = now
        self._running = max(0, self._running - 1)

    def _fit(self, prompt: float, output: float, seconds: float) -> None:
        keep = _FORGET
        self._pp = keep * self._pp + prompt * prompt
        self._po = keep * self._po + prompt * output
        self._oo = keep * self._oo + output * output
        self._pt = keep * self._pt + prompt * seconds
        self._ot = keep * self._ot + output * seconds
        self._windows += 1
        # Ridge towards the ratio of the prior: with one kind of call the two columns are collinear, and only their
        # sum is measured; the ridge then keeps prefill and decode in a plausible proportion.
        scale = self._scale(prompt, output, seconds)
        ridge_p, ridge_o = 0.05 * self._pp + 1.0, 0.05 * self._oo + 1.0
        a11, a22, a12 = self._pp + ridge_p, self._oo + ridge_o, self._po
        b1 = self._pt + ridge_p * PRIOR_PREFILL_S * scale
        b2 = self._ot + ridge_o * PRIOR_DECODE_S * scale
        determinant = a11 * a22 - a12 * a12
        if determinant <= 0:
            return
        prefill = (b1 * a22 - b2 * a12) / determinant
        decode = (a11 * b2 - a12 * b1) / determinant
        floor = 1e-7
        self.prefill_s = max(floor, prefill)
        self._decode_s = max(floor, decode)

    def _scale(self, prompt: float, output: float, seconds: float) -> float:
        expected = prompt * PRIOR_PREFILL_S + output * PRIOR_DECODE_S
        scale = seconds / expected if expected > 0 else 1.0
        return min(1000.0, max(0.001, scale))
