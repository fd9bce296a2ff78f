"""Work dealt out to the ranks of a run, every item once, equally many each; and failures shared among them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from usllm.system import ranks as module
from usllm.system.errors import UserError
from usllm.system.ranks import Ranks, dealt, failing_together, ranks, sum_over_ranks_
from usllm.training import sharding


def hands(items: int, world_size: int) -> list[list[tuple[int, str, bool]]]:
    """What each rank gets of ``items`` items."""
    with pytest.MonkeyPatch.context() as patch:
        found = []
        for rank in range(world_size):
            patch.setattr(module, "ranks", lambda rank=rank: Ranks(rank, world_size))
            found.append(list(dealt(f"item {number}" for number in range(items))))
        return found


@given(st.integers(0, 40), st.integers(1, 9))
def test_every_item_counts_once_and_all_ranks_get_equally_many(items: int, world_size: int) -> None:
    found = hands(items, world_size)
    assert len({len(hand) for hand in found}) == 1
    counted = sorted(number for hand in found for number, _, counts in hand if counts)
    assert counted == list(range(items))
    assert all(item == f"item {number}" for hand in found for number, item, _ in hand)


def test_ranks_take_turns() -> None:
    first, second = hands(3, 2)
    assert first == [(0, "item 0", True), (2, "item 2", True)]
    assert second == [(1, "item 1", True), (2, "item 2", False)]


def test_single_process_is_rank_0_of_1_and_its_sums_are_its_own() -> None:
    assert ranks() == Ranks(0, 1)
    value = torch.arange(3.0)
    assert sum_over_ranks_(value) is value
    assert torch.equal(value, torch.arange(3.0))


@pytest.fixture
def second_rank(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """This process is rank 1 of 2; rank 0 tells it ``first``, and hears ``second``."""
    said: dict[str, Any] = {"first": None}

    def gather(into: list[Any], own: Any) -> None:
        said["second"] = own
        into[:] = [said["first"], own]

    monkeypatch.setattr(module, "ranks", lambda: Ranks(1, 2))
    monkeypatch.setattr(module.dist, "all_gather_object", gather)
    return said


def test_block_that_went_well_everywhere_is_silent(second_rank: dict[str, Any]) -> None:
    with failing_together():
        pass
    assert second_rank["second"] is None


def test_rank_raises_what_another_one_has_failed_with(second_rank: dict[str, Any]) -> None:
    second_rank["first"] = "no space left"
    with pytest.raises(UserError, match="rank 0 has failed: no space left"), failing_together():
        pass


@pytest.mark.parametrize(("error", "told"), [(OSError("no space left"), "no space left"), (KeyError(), "KeyError")])
def test_rank_that_fails_tells_the_others_and_raises_its_own_error(
    error: Exception, told: str, second_rank: dict[str, Any]
) -> None:
    with pytest.raises(type(error)) as raised, failing_together():
        raise error
    assert raised.value is error
    assert second_rank["second"] == told


def test_request_to_leave_is_no_failure_and_waits_for_nobody(second_rank: dict[str, Any]) -> None:
    with pytest.raises(SystemExit), failing_together():
        raise SystemExit(75)
    assert "second" not in second_rank


def test_failure_of_a_single_process_is_its_own() -> None:
    with pytest.raises(ZeroDivisionError), failing_together():
        raise ZeroDivisionError


def test_model_that_rank_0_cannot_load_is_not_waited_for(
    second_rank: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    second_rank["first"] = "model.name=x: there is no such folder"
    monkeypatch.setattr(sharding.dist, "get_rank", lambda: 1)
    monkeypatch.setattr(sharding.dist, "broadcast_object_list", lambda *_, **__: pytest.fail("waits for rank 0"))
    with pytest.raises(UserError, match="no such folder"):
        sharding.load_on_rank_zero(lambda: pytest.fail("loads"))
