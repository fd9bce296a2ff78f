"""Rules over layers by name: how the bits of a model are shared out over its layers.

A new one is a file beside these with a function ``share``.
"""

from usllm.compress.budgets.problem import BudgetProblem, BudgetRule, LayerDemand
from usllm.system.discovery import attributes

BUDGETS: dict[str, BudgetRule] = attributes(__name__, __path__, "share")

__all__ = ["BUDGETS", "BudgetProblem", "BudgetRule", "LayerDemand"]
