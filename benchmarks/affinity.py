"""Where the peers' cache-aware policies would send a call, for fleets in virtual time."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence


class Affinity:
    """The longest prefix in an approximate tree per worker, unless loads differ too much or little is shared; trees
    never forget, as long as a run of the simulator."""

    def __init__(self, workers: int) -> None:
        # -- state: blocks of the prompts sent to each worker
        self._trees: list[set[int]] = [set() for _ in range(workers)]

    def __repr__(self) -> str:
        return f"<Affinity of {len(self._trees)} workers>"

    def pick(self, chain: Sequence[int], loads: Sequence[int]) -> int:
        """The worker for a prompt; `loads` is what a router counts: its calls in flight on each."""
        low, high = min(loads), max(loads)
        if high - low > 64 and high > 1.5 * low:
            index = loads.index(low)
        else:
            matches = [_match(chain, tree) for tree in self._trees]
            best = max(matches)
            sizes = [len(tree) for tree in self._trees]
            index = matches.index(best) if chain and best > 0.3 * len(chain) else sizes.index(min(sizes))
        self._trees[index].update(chain)
        return index


def _match(chain: Sequence[int], tree: set[int]) -> int:
    """Leading blocks of `chain` in the tree: prefixes only, so a bisection."""
    return bisect_left(chain, True, key=lambda block: block not in tree)
