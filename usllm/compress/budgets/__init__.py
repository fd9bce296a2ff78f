"""Rules over layers: how the bits of a model are shared out over its layers. One file each; a new one is a file and a
line in this table.
"""

from usllm.compress.budgets import equal, importance
from usllm.compress.budgets.problem import BudgetProblem, BudgetRule, LayerDemand

BUDGETS: dict[str, BudgetRule] = {"equal": equal.share, "importance": importance.share}

__all__ = ["BUDGETS", "BudgetProblem", "BudgetRule", "LayerDemand"]
