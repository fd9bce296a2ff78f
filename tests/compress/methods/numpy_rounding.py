"""A second reader of layers packed by rounding, written from usllm/packed/FORMAT.md with NumPy alone."""

from __future__ import annotations

import numpy as np


def decode(data: bytes, shape: tuple[int, int], group_size: int | None) -> np.ndarray:
    """The weight of a layer, fp32 [out, in]."""
    out, inputs = shape
    bits = data[0]
    assert bits in (1, 2, 3, 4, 8)
    assert data[1:4] == bytes(3)
    size = group_size or inputs
    groups = -(-inputs // size)
    scales = np.frombuffer(data, "<f2", out * groups, 4).reshape(out, groups)
    stream = np.frombuffer(data, np.uint8, offset=4 + 2 * out * groups)
    assert len(stream) == -(-out * inputs * bits // 8)
    each = np.unpackbits(stream, bitorder="little")
    assert not each[out * inputs * bits :].any()
    codes = (each[: out * inputs * bits].reshape(-1, bits).astype(np.int32) << np.arange(bits)).sum(1)
    levels = (2 * codes - (2**bits - 1)).reshape(shape).astype(np.float32)
    return levels * scales.astype(np.float32)[:, np.arange(inputs) // size]
