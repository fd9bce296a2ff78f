"""Training objectives by the name that ``objective.name`` gives them."""

from __future__ import annotations

import inspect
from typing import Any

from usllm.system.errors import UserError
from usllm.training.objectives.base import Batch, Objective, learnt, next_token_loss
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
    known = inspect.signature(OBJECTIVES[name]).parameters
    if unknown := [key for key in arguments if key not in known]:
        raise UserError(
            f"objective={name} has no {', '.join(unknown)}; it takes {', '.join(known) if known else 'no arguments'}"
        )
    return OBJECTIVES[name](**arguments)


__all__ = [
    "OBJECTIVES",
    "Batch",
    "CrossEntropy",
    "Distill",
    "Objective",
    "build_objective",
    "learnt",
    "next_token_loss",
]
