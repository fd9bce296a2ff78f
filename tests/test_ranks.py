"""Work dealt out to the ranks of a run: every item once, equally many each."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from usllm import ranks as module
from usllm.ranks import Ranks, dealt, ranks, sum_over_ranks_


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
