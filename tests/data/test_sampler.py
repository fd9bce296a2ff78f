"""The order of training depends on seed and position alone."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from usllm.data.sampler import FILLER, DealtSampler, UnrolledSampler, whose_turn


@given(st.integers(1, 30), st.integers(1, 100), st.integers(0, 5))
def test_every_pass_draws_each_sequence_once(size: int, total: int, seed: int) -> None:
    drawn = list(UnrolledSampler(size, total, seed))
    assert len(drawn) == total == len(UnrolledSampler(size, total, seed))
    for start in range(0, total, size):
        counts = Counter(drawn[start : start + size])
        assert max(counts.values()) == 1
        assert set(counts) <= set(range(size))


@given(st.integers(1, 30), st.integers(1, 40), st.integers(1, 4))
def test_ranks_take_turns_in_the_order_of_one_process(size: int, total: int, world: int) -> None:
    whole = list(UnrolledSampler(size, total * world, 0))
    for rank in range(world):
        assert list(UnrolledSampler(size, total, 0, rank, world)) == whole[rank::world]


@given(st.integers(1, 30), st.integers(1, 60), st.integers(1, 60))
def test_a_shorter_run_is_the_beginning_of_a_longer_one(size: int, short: int, more: int) -> None:
    longer = list(UnrolledSampler(size, short + more, 3))
    assert list(UnrolledSampler(size, short, 3)) == longer[:short]


def test_passes_and_seeds_differ() -> None:
    two = list(UnrolledSampler(100, 200, 0))
    other = list(UnrolledSampler(100, 100, 1))
    assert two[:100] != two[100:]
    assert other not in (two[:100], two[100:])


def test_global_rng_is_neither_read_nor_changed() -> None:
    torch.manual_seed(1)
    first = list(UnrolledSampler(20, 20, 0))
    before = torch.get_rng_state()
    second = list(UnrolledSampler(20, 20, 0))
    assert first == second
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("arguments", [(0, 1, 0), (1, -1, 0), (1, 1, 0, 2, 2)])
def test_impossible_sizes_are_refused(arguments: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="must be positive"):
        UnrolledSampler(*arguments)


@given(st.integers(1, 30), st.integers(1, 60), st.integers(1, 4), st.integers(0, 60))
def test_later_start_is_the_rest_of_the_run(size: int, total: int, world: int, start: int) -> None:
    for rank in range(world):
        rest = UnrolledSampler(size, total, 0, rank, world, start)
        assert list(rest) == list(UnrolledSampler(size, total, 0, rank, world))[start:]
        assert len(rest) == total


@given(st.integers(1, 40), st.integers(1, 7))
def test_each_sequence_is_dealt_to_one_rank_and_fillers_make_hands_equal(size: int, world: int) -> None:
    hands = [list(DealtSampler(size, rank, world)) for rank in range(world)]
    assert {len(hand) for hand in hands} == {len(DealtSampler(size, 0, world))}
    assert sorted(position for hand in hands for position in hand if position != FILLER) == list(range(size))
    assert all(FILLER not in hand[:-1] for hand in hands)


shares = st.lists(st.floats(0.05, 1.0), min_size=1, max_size=4).map(lambda v: [x / sum(v) for x in v])


@given(shares, st.integers(1, 300))
def test_texts_take_turns_by_their_shares_and_count_their_own_places(parts: list[float], places: int) -> None:
    taken = [0] * len(parts)
    for place in range(places):
        part, before = whose_turn(place, parts)
        assert before == taken[part]
        taken[part] += 1
    for count, share in zip(taken, parts, strict=True):
        assert abs(count - share * places) <= len(parts)


def test_each_text_has_passes_of_its_own() -> None:
    drawn = list(UnrolledSampler([8, 2], 32, 0, shares=[0.75, 0.25]))
    first, second = [n for n in drawn if n < 8], [n for n in drawn if n >= 8]
    assert (len(first), len(second)) == (24, 8)
    for passes, size in ((first, 8), (second, 2)):
        for start in range(0, len(passes), size):
            assert len(set(passes[start : start + size])) == size
