"""Room for frames: no loop of calls fetches memory for them at each round."""

from __future__ import annotations

import inspect
import resource
import sys

import pytest

from usllm.system.frames import with_room

ROUNDS = 400


def leaf(left: int) -> int:
    return leaf(left - 1) if left else 0


def loop() -> int:
    """Pages that were touched for the first time while some functions were called again and again."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(ROUNDS):
        leaf(3)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def at_depth(depth: int, function: object) -> int:
    return at_depth(depth - 1, function) if depth else function()  # type: ignore[operator]


@pytest.mark.skipif(sys.platform != "linux", reason="counts page faults")
def test_calls_in_it_fetch_no_memory_at_any_depth() -> None:
    assert max(at_depth(depth, with_room(loop)) for depth in range(250)) < ROUNDS // 2


@pytest.mark.skipif(
    sys.platform != "linux" or not (3, 11) <= sys.version_info < (3, 14) or sys.implementation.name != "cpython",
    reason="later releases of CPython may keep a piece in reserve",
)
def test_without_it_they_do_at_some_depth() -> None:
    assert max(at_depth(depth, loop) for depth in range(250)) >= ROUNDS


def test_function_is_what_it_was() -> None:
    def added(one: int, two: int = 2, *, three: int) -> int:
        """Sum."""
        return one + two + three

    roomy = with_room(added)
    assert roomy(1, three=3) == 6
    assert (roomy.__name__, roomy.__doc__) == ("added", "Sum.")
    assert inspect.signature(roomy) == inspect.signature(added)
    with pytest.raises(TypeError, match="three"):
        roomy(1)  # type: ignore[call-arg]
