"""Room for the calls of a loop, where CPython would fetch and give back memory at each of them.

CPython (from 3.11 on) keeps the frames of Python functions in pieces of 16 KB. Where a piece ends is chance: the depth
at which somebody called. If it ends in the middle of a loop's calls, each round maps memory for the next piece and
unmaps it, which a second thread on another core makes dearer still: a token of a packed model took twice as long.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

_SLOTS = 4200
"""Of a frame, 8 bytes each: more than any piece has left, so that one of 64 KB begins; half of it is left for calls."""


def with_room(function: Callable[P, R]) -> Callable[P, R]:
    """The same function; what it calls finds 30 KB of room for frames, and no piece ends in between.

    Args:
        function: That holds the loop, or is called once a round and makes many calls.
    """

    def roomy(*args: P.args, **kwargs: P.kwargs) -> R:
        return function(*args, **kwargs)

    roomy.__code__ = roomy.__code__.replace(co_stacksize=_SLOTS)
    return wraps(function)(roomy)
