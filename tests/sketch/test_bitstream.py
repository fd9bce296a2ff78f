"""Bit streams against a bit-by-bit model of them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from usllm.sketch.bitstream import pack, unpack

widths = st.sampled_from([1, 2, 3, 4, 5, 6, 7, 8, 16])
runs_of_values = st.lists(
    widths.flatmap(lambda bits: st.tuples(st.lists(st.integers(0, 2**bits - 1), max_size=40), st.just(bits))),
    max_size=5,
)


def bit_by_bit(runs: list[tuple[list[int], int]]) -> bytes:
    """The stream as one large integer, value after value from its lowest bit up."""
    stream = length = 0
    for values, bits in runs:
        for value in values:
            stream |= value << length
            length += bits
    return stream.to_bytes(-(-length // 8), "little")


@given(runs_of_values)
def test_stream_is_the_one_that_is_written_bit_by_bit(runs: list[tuple[list[int], int]]) -> None:
    packed = pack([(torch.tensor(values, dtype=torch.int32), bits) for values, bits in runs])
    assert bytes(packed.tolist()) == bit_by_bit(runs)


@given(runs_of_values)
def test_every_run_is_found_again_at_its_bit(runs: list[tuple[list[int], int]]) -> None:
    packed = pack([(torch.tensor(values, dtype=torch.int32), bits) for values, bits in runs])
    first = 0
    for values, bits in runs:
        assert unpack(packed, len(values), bits, first).tolist() == values
        first += len(values) * bits


def test_negative_integers_keep_their_low_bits() -> None:
    codes = torch.tensor([-1, -3, 3, 0], dtype=torch.int8)
    assert unpack(pack([(codes, 3)]), 4, 3).tolist() == [7, 5, 3, 0]


def test_stream_that_is_too_short_is_refused() -> None:
    with pytest.raises(ValueError, match="3 bytes, 4 are needed"):
        unpack(torch.zeros(3, dtype=torch.uint8), 5, 5, 2)
