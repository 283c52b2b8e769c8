"""How long to wait for what nearly always comes."""

from __future__ import annotations

from dataclasses import dataclass

_SMOOTH = 0.1


@dataclass(slots=True)
class Patience:
    """How long something takes to come, in seconds: mean and mean deviation, as TCP's retransmission timer has them
    (RFC 6298)."""

    mean_s: float
    """Before anything has come, a guess."""
    deviation_s: float
    came_once: bool = False

    def came(self, after_s: float) -> None:
        if not self.came_once:
            self.came_once, self.mean_s, self.deviation_s = True, after_s, after_s / 2
            return
        self.deviation_s += _SMOOTH * (abs(after_s - self.mean_s) - self.deviation_s)
        self.mean_s += _SMOOTH * (after_s - self.mean_s)

    @property
    def seconds(self) -> float:
        """Within this time nearly all have come that will."""
        return self.mean_s + 4 * self.deviation_s
