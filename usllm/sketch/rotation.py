"""Weights brought into hash order and back, by copies of whole blocks.

The hash of a channel is one small table, rotated one step further from channel to channel. Along the channels that is a
*skew*, and a skew is a strided view of a buffer in which every column is written twice: no index per weight is formed.
Blocks are processed a few groups at a time so that they stay in the processor's cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from usllm.sketch.layout import Span
from usllm.sketch.plan import Plan

_CHUNK_ELEMENTS = 1 << 20


def chunks(plan: Plan) -> Iterator[tuple[Span, int]]:
    """Runs of groups small enough to process at once, each with the rotation of its first channel."""
    channels = plan.shape[1]
    for span in plan.spans:
        step = max(_CHUNK_ELEMENTS // (span.size * channels), 1)
        for first in range(0, span.groups, step):
            part = replace(
                span,
                start=span.start + first * span.size,
                groups=min(step, span.groups - first),
                first_group=span.first_group + first,
            )
            yield part, plan.rotation(part)


def rotate(weight: Tensor, span: Span, rotation: int, rotation_step: int) -> Tensor:
    """Weights of a span by rotated position.

    Args:
        weight: [out, in].
        span: Groups to take.
        rotation: Rotation of the first channel of the span's first group.
        rotation_step: How much further each channel is rotated, 0 or 1.

    Returns:
        [groups * in, n], row ``g * in + c`` holding channel c of group g from its rotation on.
    """
    n, channels = span.size, weight.shape[1]
    rotated = weight.new_empty(span.groups, channels, n)
    for group in range(span.groups):
        start = span.start + group * n
        columns = weight[start : start + n].t().contiguous()
        if not rotation_step:
            rotated[group] = columns.roll(-rotation, 1)
            continue
        twice = torch.cat([columns, columns], 1)
        for first, last, own in _runs(channels, n, rotation + group * channels):
            skewed = (last - first, n), (2 * n + 1, 1), first * 2 * n + own
            rotated[group, first:last] = twice.as_strided(*skewed)
    return rotated.flatten(0, 1)


def unrotate_(rotated: Tensor, out: Tensor, span: Span, rotation: int, rotation_step: int) -> None:
    """Inverse of :func:`rotate`, into the span's rows of ``out``.

    Args:
        rotated: [groups * in, n].
        out: [out, in], written.
        span: Groups to write.
        rotation, rotation_step: As in :func:`rotate`.
    """
    groups, n, channels = span.groups, span.size, out.shape[1]
    straight = torch.empty_like(rotated) if rotation_step else rotated.roll(rotation, 1)
    twice = torch.cat([rotated, rotated], 1) if rotation_step else rotated
    for first, last, own in _runs(groups * channels if rotation_step else 0, n, rotation):
        straight[first:last] = twice.as_strided((last - first, n), (2 * n - 1, 1), first * 2 * n + n - own)
    rows = out[span.start : span.start + groups * n].view(groups, n, channels)
    rows.copy_(straight.view(groups, channels, n).transpose(1, 2))


def _runs(rows: int, n: int, rotation: int) -> Iterator[tuple[int, int, int]]:
    """Runs of rows over which the rotation rises by one without wrapping: first, last, rotation of the first."""
    first = 0
    while first < rows:
        own = (rotation + first) % n
        last = min(first + n - own, rows)
        yield first, last, own
        first = last
