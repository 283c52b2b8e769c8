"""A worker's speed, measured from the calls it runs.

One number is fitted: engine seconds per prefilled token *at the batch sizes the worker really runs*, from busy
windows, with forgetting. A decoded token counts as `DECODE_WEIGHT` prefilled ones: a fit of both cannot tell them
apart as long as calls look alike, and then gives either of them any value; placement needs only their sum, and a
prefill cost of the right order. The latency of a decode step, for predictions of duration, comes from the calls.

What a prefilled token costs at the margin is fitted from the calls themselves: a call takes `bare_step_s` for each
token of its output, and `stall_s` for each token that the engine prefills meanwhile, for it or for others. How much
that is varies from call to call, so that these two can be told apart.

Calls of one batch end together. A window that counted those only that have ended would call the engine slow when the
first of them ends, and fast when the others do. So what runs counts, too, by its age: a call that has run for half as
long as the one that has just ended took is half done.
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
_FORGET_CALLS = 0.99
_PRIOR_CALLS = 1.0
"""The prior of `stall_s` weighs as much as so many calls."""
_CALIBRATED_CALLS = 4.0
"""What was measured when the worker came up weighs as much as so many calls of each of two kinds."""
_PRIOR_S = 2.0
"""Busy seconds of its own after which a worker's measurements weigh as much as those of its peers."""
_LEAST_S, _MOST_S = 1e-7, 0.1


def work(prompt_tokens: float, output_tokens: float) -> float:
    """A call's work in prompt tokens: so many could be prefilled in the same time."""
    return prompt_tokens + DECODE_WEIGHT * output_tokens


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
        self.stall_s = PRIOR_PREFILL_S  # seconds by which a token that is prefilled delays what runs
        self.bare_step_s = 0.0  # seconds of a step that prefills nothing; 0: not known yet
        self.busy_s = self.work = 0.0  # of the windows so far, decayed by _FORGET a window
        self._windows = self._steps = 0
        # call → (start, work expected, prompt tokens sent by then, its own among them, and those prefilled by then)
        self._running: dict[str, tuple[float, float, float, float]] = {}
        self._sent = 0.0  # prompt tokens to compute, of all calls so far
        self._prefilled = 0.0  # those of them that are prefilled by `_prefilled_at`, one call after another
        self._prefilled_at = 0.0
        # Decayed sums over calls, of 1, x, y, x², xy; per output token, x: tokens prefilled meanwhile, y: seconds.
        self._moments = [0.0] * 5
        self._alone_s: tuple[float, float] | None = None  # what it was `calibrated` with
        # The window under way: busy seconds, and work of the calls that ended in it; and what had been done of those
        # that ran when it began.
        self._busy = self._ended = self._before = 0.0
        self._since = 0.0  # until when `_busy` is accounted

    def __repr__(self) -> str:
        return f"<Rates prefill={1 / self.prefill_s:.0f}/s step={1e3 * self.step_s:.1f}ms of {self._windows} windows>"

    def statistics(self) -> RateStatistics:
        return RateStatistics(
            1 / self.prefill_s, 1 / (DECODE_WEIGHT * self.prefill_s), 1 / self.step_s, self._windows
        )

    def seconds(self, prompt_tokens: float, output_tokens: float) -> float:
        """Engine seconds to prefill `prompt_tokens` and decode `output_tokens` within a full batch."""
        return work(prompt_tokens, output_tokens) * self.prefill_s

    def duration(self, prompt_tokens: float, output_tokens: float) -> float:
        """Seconds one call takes from start to end at the usual load."""
        return prompt_tokens * self.prefill_s + output_tokens * self.step_s

    def started(self, call: str, prompt_tokens: float, output_tokens: float, now: float) -> None:
        """A call has been sent that will compute about so many tokens."""
        if not self._running:
            self._since = now
        self._prefill(now)
        self._sent += prompt_tokens
        self._running[call] = now, work(prompt_tokens, output_tokens), self._sent, self._prefilled

    def finished(self, call: str, prompt_tokens: float, output_tokens: float, now: float) -> bool:
        """A call ended: `prompt_tokens` it computed (not those it found cached), `output_tokens`. Whether this has
        ended a window, so that the worker's speed is known anew."""
        known = self._end(call, now)
        if known is None:
            return False
        took = now - known[0]
        self._ended += work(prompt_tokens, output_tokens)
        if output_tokens >= 4:
            self._prefill(now)
            self._prefilled = max(self._prefilled, known[2])  # its own prompt, and those before it, for certain
            self._regress((self._prefilled - known[3]) / output_tokens, took / output_tokens)
            step = max(1e-5, (took - prompt_tokens * self.prefill_s) / output_tokens)
            self._steps += 1
            self.step_s += max(_SMOOTH, 1 / self._steps) * (step - self.step_s)
        if self._busy < _MIN_WINDOW_S:
            return False
        underway = sum(tokens * min(1.0, (now - start) / took) for start, tokens, *_ in self._running.values())
        done = self._ended + underway - self._before
        if done <= 0:
            return False
        self.busy_s = _FORGET * self.busy_s + self._busy
        self.work = _FORGET * self.work + done
        self._windows += 1
        self._busy = self._ended = 0.0
        self._before = underway
        self.believe(None)
        return True

    def calibrated(self, prefill_token_s: float, step_s: float) -> None:
        """What one call alone took when the worker came up: for a prefilled token, and for a step that prefills
        nothing. Calls of one batch are often too much alike to tell these two apart."""
        if step_s <= 0 or self._alone_s == (prefill_token_s, step_s):
            return
        self._alone_s = prefill_token_s, step_s
        self.stall_s = min(_MOST_S, max(_LEAST_S, prefill_token_s))
        self.bare_step_s = step_s
        if not self._windows:
            self.prefill_s = self.stall_s
        if not self._steps:
            self.step_s = step_s
        twice = step_s / self.stall_s  # prefilled tokens, for a step that takes twice as long
        points = [(1.0, x, y, x * x, x * y) for x, y in ((0.0, step_s), (twice, 2 * step_s))]
        self._moments = [_CALIBRATED_CALLS * (a + b) for a, b in zip(*points, strict=True)]

    def believe(self, peers_s: float | None) -> None:
        """Sets the speed from what was measured here and, as long as that is little, at the worker's peers:
        `peers_s` seconds per token (None: nothing is known of any)."""
        busy, tokens = self.busy_s, self.work
        if peers_s is not None:
            busy, tokens = busy + _PRIOR_S, tokens + _PRIOR_S / peers_s
        if tokens > 0:
            self.prefill_s = min(_MOST_S, max(_LEAST_S, busy / tokens))

    def abandoned(self, call: str, now: float) -> None:
        """A call ended without a count (it failed, or was aborted)."""
        self._end(call, now)

    def _regress(self, x: float, y: float) -> None:
        """Least squares over the calls so far, as ridge regression towards what was timed, or `prefill_s`."""
        moments = zip(self._moments, (1.0, x, y, x * x, x * y), strict=True)
        n, sx, sy, sxx, sxy = self._moments = [_FORGET_CALLS * before + new for before, new in moments]
        believed = self.prefill_s if self._alone_s is None else self._alone_s[0]
        prior = _PRIOR_CALLS * sxx / n
        slope = (sxy - sx * sy / n + prior * believed) / (sxx - sx * sx / n + prior) if sxx else believed
        self.stall_s = min(_MOST_S, max(_LEAST_S, slope))
        if self._windows:
            self.bare_step_s = max(0.0, (sy - self.stall_s * sx) / n)

    def _prefill(self, now: float) -> None:
        """Brings `_prefilled` up to `now`."""
        done = self._prefilled + max(0.0, now - self._prefilled_at) / self.stall_s
        self._prefilled, self._prefilled_at = min(self._sent, done), now

    def _end(self, call: str, now: float) -> tuple[float, float, float, float] | None:
        known = self._running.pop(call, None)
        if known is not None:
            self._busy += max(0.0, now - self._since)
            self._since = now
        return known
