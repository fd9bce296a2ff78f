"""Rules over layers by name: how the bits of a model are shared out over its layers.

A new one is a file beside these with a function ``share``, and a set ``NEEDS`` of the statistics that it reads.
"""

from __future__ import annotations

from usllm.compress.budgets.problem import BudgetProblem, BudgetRule, LayerDemand
from usllm.system.discovery import attributes

BUDGET_NEEDS: dict[str, frozenset[str]] = attributes(__name__, __path__, "NEEDS")
"""Statistics that each rule reads; a rule of a plug-in that says nothing reads ``energy``."""
BUDGETS: dict[str, BudgetRule] = attributes(__name__, __path__, "share")


def budget_needs(rule: str) -> frozenset[str]:
    """``energy``, ``gradient``: what a rule over layers reads besides the layers' shapes."""
    return BUDGET_NEEDS.get(rule, frozenset({"energy"}))


__all__ = ["BUDGETS", "BudgetProblem", "BudgetRule", "LayerDemand", "budget_needs"]
