"""Compiled unpacking of the stream, for every width of the format, at every offset and up to its last bit."""

from __future__ import annotations

import ctypes
import mmap

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from usllm.sketch.bitstream import unpack

pytest.importorskip("numba")

from usllm_kernels.cpu.stream import unpack_run, unpack_side_by_side  # needs numba

_areas: list[mmap.mmap] = []  # kept: arrays lie in them
WIDTHS = st.sampled_from([1, 2, 3, 4, 5, 6, 7, 8, 16])


def at_the_end_of_memory(stream: torch.Tensor) -> np.ndarray:
    """The same bytes with nothing behind them: reading one more ends the process."""
    page = mmap.PAGESIZE
    pages = -(-max(len(stream), 1) // page) + 1
    area = mmap.mmap(-1, pages * page)
    _areas.append(area)
    held = np.frombuffer(area, np.uint8)
    held[(pages - 1) * page - len(stream) : (pages - 1) * page] = stream.numpy()
    last = ctypes.c_void_p(held.ctypes.data + (pages - 1) * page)
    assert ctypes.CDLL(None).mprotect(last, ctypes.c_size_t(page), 0) == 0
    return held[(pages - 1) * page - len(stream) : (pages - 1) * page]


def codes(stream: torch.Tensor, count: int, width: int, first_bit: int) -> list[int]:
    """The reference: two's complement, or the sign alone."""
    value = unpack(stream, count, width, first_bit).to(torch.int32)
    signed = 1 - 2 * value if width == 1 else value - ((value >> (width - 1)) << width)
    return [int(code) for code in signed]


@given(WIDTHS, st.integers(0, 60), st.integers(0, 40))
@settings(max_examples=300, deadline=None)
def test_a_run_of_codes(width: int, count: int, first_bit: int) -> None:
    end = first_bit + count * width
    stream = torch.randint(0, 256, (-(-end // 8),), dtype=torch.uint8)
    found = np.full(count, 99, np.int16)
    unpack_run(at_the_end_of_memory(stream), first_bit, width, count, found, 0)
    assert found.tolist() == codes(stream, count, width, first_bit)


@given(WIDTHS, st.integers(1, 40), st.integers(0, 40), st.integers(1, 8), st.integers(0, 30))
@settings(max_examples=300, deadline=None)
def test_channels_side_by_side(width: int, count: int, first_bit: int, lanes: int, more: int) -> None:
    stride = count * width + more  # bits from one channel to the next
    end = first_bit + (lanes - 1) * stride + count * width
    stream = torch.randint(0, 256, (-(-end // 8),), dtype=torch.uint8)
    found = np.full((count + 8, 8), 99, np.int16)
    unpack_side_by_side(
        at_the_end_of_memory(stream), first_bit, stride, lanes, width, count, np.empty(8, np.int64), found
    )
    for lane in range(8):
        start = first_bit + (lane * stride if lane < lanes else 0)
        assert found[:count, lane].tolist() == codes(stream, count, width, start)
