"""Results that are cached as long as the plan that they were made of lives."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar
from weakref import WeakKeyDictionary

from usllm.sketch.plan import Plan

P = ParamSpec("P")
T = TypeVar("T")


def cached_by_plan(make: Callable[Concatenate[Plan, P], T]) -> Callable[Concatenate[Plan, P], T]:
    """A function of a plan that computes once for each plan and other arguments.

    Plans are told apart by identity: a copy has results of its own. The result must not hold the plan, or neither is
    ever freed.

    Args:
        make: The function; all arguments after the plan are hashable.
    """
    cached: WeakKeyDictionary[Plan, dict[Any, T]] = WeakKeyDictionary()

    @wraps(make)
    def look_up(plan: Plan, *args: P.args, **kwargs: P.kwargs) -> T:
        of_plan = cached.get(plan)
        if of_plan is None:
            of_plan = cached.setdefault(plan, {})
        key = (args, *kwargs.items()) if kwargs else args
        if key not in of_plan:
            of_plan.setdefault(key, make(plan, *args, **kwargs))  # of two threads' results one is everybody's
        return of_plan[key]

    return look_up
