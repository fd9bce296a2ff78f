"""A second reader of layers packed by littlebit, written from usllm/packed/FORMAT.md with NumPy alone."""

from __future__ import annotations

from typing import Any

import numpy as np


def factors(data: bytes, shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """``F_U`` [out, paths · rank] and ``F_V`` [in, paths · rank], fp32; the weight is ``F_U F_Vᵀ``."""
    out, inputs = shape
    paths, rank = data[0], int.from_bytes(data[1:4], "little")
    assert paths in (1, 2)
    assert 1 <= rank <= min(shape)
    at = 4
    scales: list[list[np.ndarray]] = []
    for _ in range(paths):
        scales.append([])
        for count in (out, rank, inputs):
            scales[-1].append(np.frombuffer(data, "<f2", count, at).astype(np.float32))
            at += 2 * count
    left: list[Any] = []
    right: list[Any] = []
    for h, between, g in scales:
        for side, rows in ((left, h), (right, g)):
            size = -(-len(rows) * rank // 8)
            each = np.unpackbits(np.frombuffer(data, np.uint8, size, at), bitorder="little")
            assert not each[len(rows) * rank :].any()
            signs = 1 - 2 * each[: len(rows) * rank].reshape(len(rows), rank).astype(np.float32)
            side.append(signs * rows[:, None] * (between if side is right else np.float32(1)))
            at += size
    assert at == len(data)
    return np.concatenate(left, 1), np.concatenate(right, 1)
