"""Windows over a model's blocks, and the dense streams between them."""

from __future__ import annotations

from contextlib import nullcontext
from itertools import pairwise

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from usllm.stages.block_windows import DenseStreams, block_windows


@given(st.integers(1, 40), st.integers(1, 8), st.data())
def test_every_block_comes_and_leaves_once_and_windows_overlap_by_what_they_share(
    count: int, size: int, data: st.DataObject
) -> None:
    size = min(size, count)
    stride = data.draw(st.integers(1, size))
    windows = block_windows(count, size, stride)
    assert [n for window in windows for n in window.new] == list(range(count))
    assert [n for window in windows for n in window.leaving] == list(range(count))
    assert [window.number for window in windows] == list(range(len(windows)))
    assert windows[-1].blocks.stop == count
    for window, after in pairwise(windows):
        assert after.blocks.start - window.blocks.start == stride
        assert len(window.blocks) == size
    for window in windows:
        assert set(window.new) | set(window.leaving) <= set(window.blocks)


def test_windows_of_one_block_are_the_blocks() -> None:
    assert [list(window.blocks) for window in block_windows(3, 1, 1)] == [[0], [1], [2]]
    assert [list(window.blocks) for window in block_windows(5, 3, 2)] == [[0, 1, 2], [2, 3, 4]]


class _Adds(nn.Module):
    def __init__(self, number: int) -> None:
        super().__init__()
        self.number, self.calls = number, 0

    def forward(self, stream: Tensor) -> Tensor:
        self.calls += 1
        return stream + 10**self.number


def test_dense_streams_are_made_once_and_only_those_still_needed_are_held() -> None:
    blocks = [_Adds(number) for number in range(4)]
    streams = DenseStreams(torch.zeros(2, 3, 4), blocks.__getitem__, [lambda sequences: {}] * 4, 2, nullcontext)
    assert float(streams.before(2).max()) == 11
    assert float(streams.before(3).max()) == 111
    streams.forget_before(2)
    assert float(streams.before(4).max()) == 1111
    assert float(streams.before(2).max()) == 11
    assert [block.calls for block in blocks] == [1, 1, 1, 1]
