"""Words of signs: whole numbers in output order -> a bit of each, together with those of its neighbours."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from usllm_kernels.dispatch import implementation, running_on
from usllm_kernels.planes import OUTPUTS, Levels, Planes, group_sizes, whole


class Codes(NamedTuple):
    """Codes of channels of one width.

    Attributes:
        numbers: Among ``levels``, any type, [out, channels].
        levels: That they can have; at most 8 bits.
        channels: Whole numbers [channels].
        scales: What a unit is worth in each channel, fp32 [channels].
    """

    numbers: Tensor
    levels: Levels
    channels: Tensor
    scales: Tensor


@torch.no_grad()
def plane_words(bits: Tensor, *, backend: str | None = None) -> Tensor:
    """Words of :class:`usllm_kernels.planes.Planes`.

    It runs once for a layer that is loaded, in no graph: it is not a custom op.

    Args:
        bits: 0 or 1, uint8 [out, columns], multiples of 64 and 32.
        backend: See :func:`usllm_kernels.dispatch.choose`.

    Returns:
        int32 [out / 64, columns / 32, 64].

    Raises:
        ValueError: The back end cannot run.
    """
    with running_on(bits.device):
        words: Tensor = implementation("plane_words", bits, bits.device, backend).plane_words(bits)
    return words


@torch.no_grad()
def make_planes(
    widths: Sequence[Codes],
    inputs: int,
    factors: Tensor | None = None,
    group_size: int | None = None,
    *,
    backend: str | None = None,
) -> Planes:
    """Codes in output order as signs.

    Args:
        widths: The channels of a layer, by the width of their codes; one width at least.
        inputs: Of the layer.
        factors: Of each output and group, [out, groups]; ``None``: ones.
        group_size: Consecutive channels of a group, of which the last one may be shorter, all of one width; ``None``:
            all.
        backend: See :func:`usllm_kernels.dispatch.choose`.

    Raises:
        ValueError: The back end cannot run.
    """
    outputs, device = widths[0].numbers.shape[0], widths[0].numbers.device
    columns = sum(len(codes.channels) * codes.levels.bits for codes in widths)
    size = None if group_size is None else group_size * widths[0].levels.bits
    size, groups, wide = group_sizes(columns, size)
    rows = whole(outputs, OUTPUTS)

    def filled(parts: Sequence[Tensor], into: Tensor) -> Tensor:
        """Parts [..., columns] beside each other, with columns that fill up words."""
        joined, by_group = torch.cat(list(parts), -1), into.view(*into.shape[:-1], groups, wide)
        for group, part in enumerate(joined.split(size, -1)):
            by_group[..., group, : part.shape[-1]] = part
        return into

    channels, scales, offsets, bits = [], [], [], []
    each = torch.cat([torch.full((len(codes.channels),), codes.levels.bits) for codes in widths])
    first = each.cumsum(0) - each
    starts = torch.cat([first // size * wide + first % size, torch.tensor([groups * wide])]).int().to(device)
    for codes in widths:
        levels, number = codes.levels, len(codes.channels)
        powers = 2.0 ** torch.arange(levels.bits, dtype=torch.float32, device=device)
        channels.append(codes.channels.int().repeat_interleave(levels.bits))
        scales.append((codes.scales.float()[:, None] * (levels.step * powers)).flatten())
        lowest = torch.zeros(number, levels.bits, dtype=torch.float32, device=device)
        lowest[:, 0] = levels.shift * codes.scales.float()
        offsets.append(lowest.flatten())
        counted = codes.numbers if levels == (-1, 1, 2) else (codes.numbers - levels.least) // levels.stride
        if levels.bits == 1:
            bits.append((counted > 0).to(torch.uint8))
        else:
            places = torch.arange(levels.bits, dtype=torch.uint8, device=device)
            bits.append(((counted.to(torch.uint8)[..., None] >> places) & 1).flatten(1))
    places = torch.zeros(groups * wide, dtype=torch.int32, device=device)
    for group, of_group in enumerate(torch.cat(channels).split(size)):  # those that fill up words go with the last
        places[group * wide : (group + 1) * wide] = of_group[-1] if len(of_group) else 0
    by_output = torch.zeros(groups, rows, dtype=torch.float32, device=device)
    by_output[:, :outputs] = 1.0 if factors is None else factors.float().t()
    whole_bits = torch.zeros(rows, groups * wide, dtype=torch.uint8, device=device)
    filled(bits, whole_bits[:outputs])
    return Planes(
        (outputs, inputs),
        filled(channels, places),
        starts,
        filled(scales, torch.zeros(groups * wide, dtype=torch.float32, device=device)),
        filled(offsets, torch.zeros(groups * wide, dtype=torch.float32, device=device)),
        plane_words(whole_bits, backend=backend),
        by_output,
    )
