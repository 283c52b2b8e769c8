"""The Python builder for plans: ``from helium_proxy.plan import Plan, chat, input_``. See `planner.build`."""

from __future__ import annotations

from helium_proxy.planner.build import InputRef, NodeRef, Plan, PlanFailed, chat, completion, input_

__all__ = ["InputRef", "NodeRef", "Plan", "PlanFailed", "chat", "completion", "input_"]
