"""What a submitted plan tells the dispatcher about each of its calls."""

from __future__ import annotations

from collections import Counter

from helium_proxy.planner.pipeline import PhysicalPlan
from helium_proxy.types import Hints


class PlanHints:
    """What the plan knows of each operator, exactly, where a live run's template only guesses."""

    def __init__(self, plan: PhysicalPlan, run_seq: int) -> None:
        self.plan = plan
        self.run_seq = run_seq
        operators, tree = plan.graph.operators, plan.tree
        consumers = plan.graph.consumers()
        # The longest chain behind each operator: (output tokens, prompt tokens, calls).
        self._path: dict[int, tuple[float, float, int]] = {}
        for id_ in reversed(list(tree.paths)):
            best = (0.0, 0.0, 0)
            for consumer in consumers[id_]:
                output, prompt, calls = self._path[consumer]
                best = max(best, (output + tree.lengths[consumer], prompt + tree.prompts[consumer], calls + 1))
            self._path[id_] = best
        # All mutable state: how many operators with the same inputs have not started yet, and who has.
        self._family = {id_: operators[id_].deps or (-1 - operators[id_].row,) for id_ in tree.paths}
        self._to_come = Counter(self._family.values())
        self._started: set[int] = set()

    def started(self, id_: int) -> Hints:
        """The hints of an operator that starts now; its siblings to come are those with the same inputs."""
        tree = self.plan.tree
        output, prompt, calls = self._path[id_]
        self._to_come[self._family[id_]] -= id_ not in self._started
        self._started.add(id_)
        return Hints(
            output_tokens=tree.lengths[id_],
            path_calls=calls,
            path_output_tokens=output,
            path_prompt_tokens=prompt,
            siblings_to_come=self._to_come[self._family[id_]],
            last=not calls,
            run_seq=self.run_seq,
            row=self.plan.graph.operators[id_].row,
            plan_rank=self.plan.rank[id_],
        )
