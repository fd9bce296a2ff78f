"""How far a block's output is from its target: what reconstruction minimises, and what it reports."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

ENERGY_FLOOR = 0.05
"""Of the median energy of a batch's targets: the least that a token's error is divided by."""
_PART_ELEMENTS = 1 << 22
"""Of a stream that errors are computed of at a time."""


def relative_error(output: Tensor, target: Tensor, mine: slice = slice(None)) -> Tensor:
    """Mean over tokens of the squared error over the target's energy, fp32 scalar.

    Args:
        output: [sequences, context, hidden]; of several ranks each has a part of the sequences.
        target: Of all sequences, [sequences, context, hidden].
        mine: The part that ``output`` is of. What the parts give adds up to the error of all.
    """
    energy = target.float().square().sum(-1)
    difference = (output.float() - target[mine].float()).square().sum(-1)
    floor = ENERGY_FLOOR * energy.median()
    return (difference / energy[mine].clamp_min(floor)).sum() / energy.numel()


@torch.no_grad()
def stream_error(student: Tensor, dense: Tensor) -> float:
    """:func:`relative_error` of whole streams, some sequences at a time.

    Args:
        student: Behind a compressed block, [sequences, context, hidden].
        dense: Of the same shape.
    """
    parts = list(_parts(student, dense))
    energy = torch.cat([target.float().square().sum(-1) for _, target in parts])
    difference = torch.cat([(output.float() - target.float()).square().sum(-1) for output, target in parts])
    return float((difference / energy.clamp_min(ENERGY_FLOOR * energy.median())).mean())


@torch.no_grad()
def increment_error(student: tuple[Tensor, Tensor], dense: tuple[Tensor, Tensor]) -> float:
    """``‖Δ_student - Δ_dense‖ / ‖Δ_dense‖`` of what a block adds to the stream, over all tokens.

    Near 1 the block might as well be left out, however small the error of the stream that runs past it.

    Args:
        student: The stream before and after the compressed block, [sequences, context, hidden] each.
        dense: The dense stream before and after the dense block, of the same shape.
    """
    error = energy = 0.0
    for before, after, dense_before, dense_after in _parts(*student, *dense):
        added = (dense_after - dense_before).float()
        error += float(((after - before).float() - added).double().square().sum())
        energy += float(added.double().square().sum())
    return math.sqrt(error / max(energy, 1e-60))


def _parts(*streams: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Equal parts of streams; what is made of a part is small beside a block."""
    sequences = max(1, _PART_ELEMENTS // streams[0][0].numel())
    return zip(*(stream.split(sequences) for stream in streams), strict=True)
