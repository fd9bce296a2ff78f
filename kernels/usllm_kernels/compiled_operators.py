"""The sketch operators that compiled kernels compute, and the numbers by which the kernels know them."""

from __future__ import annotations

from typing import NamedTuple

from usllm.sketch.operators import OPERATORS
from usllm.sketch.operators.absmaxmin import AbsMaxMin
from usllm.sketch.operators.countmin import CountMin
from usllm.sketch.operators.mean import Mean
from usllm.sketch.plan import Plan

# How the members of a bucket become a state.
MINIMUM, SUM, MEAN = 0, 1, 2
# How the candidates of several rows become a weight.
MAGNITUDE_MAX, SIGNED_MAX, MAGNITUDE_MIN, TOTAL = 0, 1, 2, 3


class _Ways(NamedTuple):
    reduction: int
    combination: int


# By class, not by name: a plug-in may give a name another meaning.
_WAYS: dict[type, _Ways] = {
    AbsMaxMin: _Ways(MINIMUM, MAGNITUDE_MAX),
    CountMin: _Ways(SUM, MAGNITUDE_MIN),
    Mean: _Ways(MEAN, TOTAL),
}


def supports(plan: Plan) -> str | None:
    """Why compiled kernels cannot compute with a plan; ``None`` if they can.

    The hash needs no kernel of its own: kernels read the tables that it makes.
    """
    if type(plan.operator) in _WAYS:
        return None
    known = ", ".join(name for name, operator in OPERATORS.items() if type(operator) in _WAYS)
    return f"sketch.operator={plan.config.operator!r} has no compiled kernel, only {known} have"


def reduction(plan: Plan) -> int:
    """One of :data:`MINIMUM`, :data:`SUM`, :data:`MEAN`."""
    return _WAYS[type(plan.operator)].reduction


def combination(plan: Plan) -> int:
    """One of :data:`MAGNITUDE_MAX`, :data:`SIGNED_MAX`, :data:`MAGNITUDE_MIN`, :data:`TOTAL`."""
    return SIGNED_MAX if plan.config.query == "signed_max" else _WAYS[type(plan.operator)].combination
