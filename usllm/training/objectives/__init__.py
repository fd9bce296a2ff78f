"""Training objectives by the name that ``objective.name`` gives them."""

from __future__ import annotations

from typing import Any

from usllm.errors import UserError
from usllm.training.objectives.base import Batch, Objective, next_token_loss
from usllm.training.objectives.cross_entropy import CrossEntropy
from usllm.training.objectives.distill import Distill

OBJECTIVES: dict[str, type[Objective]] = {"cross_entropy": CrossEntropy, "distill": Distill}


def build_objective(name: str, **arguments: Any) -> Objective:
    """Build the objective ``name`` with its keyword ``arguments``.

    Raises:
        UserError: unknown name, or arguments that the objective does not take or that are out of range.
    """
    if name not in OBJECTIVES:
        raise UserError(f"objective.name={name!r}: unknown; choose one of {', '.join(OBJECTIVES)}")
    try:
        return OBJECTIVES[name](**arguments)
    except TypeError as error:
        raise UserError(f"objective={name}: {error}") from error


__all__ = ["OBJECTIVES", "Batch", "CrossEntropy", "Distill", "Objective", "build_objective", "next_token_loss"]
