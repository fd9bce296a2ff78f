"""Words of bit planes: whole numbers in output order -> one bit of each, together with those of its neighbours."""

from __future__ import annotations

import torch
from torch import Tensor

from usllm_kernels.dispatch import implementation, running_on
from usllm_kernels.planes import OUTPUTS, Levels, Planes, group_sizes


@torch.no_grad()
def plane_words(numbers: Tensor, bits: int, *, backend: str | None = None) -> Tensor:
    """Words of :class:`usllm_kernels.planes.Planes`.

    It runs once for a layer that is loaded, in no graph: it is not a custom op.

    Args:
        numbers: Below ``2^bits``, uint8 [out, columns], multiples of 64 and 32.
        bits: Planes, 1 to 8.
        backend: See :func:`usllm_kernels.dispatch.choose`.

    Returns:
        int32 [bits, out / 64, columns / 32, 64].

    Raises:
        ValueError: The back end cannot run.
    """
    with running_on(numbers.device):
        words: Tensor = implementation("plane_words", numbers, numbers.device, backend).plane_words(numbers, bits)
    return words


@torch.no_grad()
def make_planes(
    codes: Tensor,
    levels: Levels,
    inputs: int,
    channels: Tensor,
    scales: Tensor,
    factors: Tensor | None = None,
    group_size: int | None = None,
    *,
    backend: str | None = None,
) -> Planes:
    """Planes of codes.

    Args:
        codes: Whole numbers among ``levels``, any type, [out, columns].
        levels: That codes can have; at most 8 bits.
        inputs: Of the layer.
        channels: Input of each column, whole numbers [columns].
        scales: What a unit is worth in each column, fp32 [columns].
        factors: Of each output and group, [out, groups]; ``None``: ones.
        group_size: Consecutive columns of a group, of which the last one may be shorter; ``None``: all.
        backend: See :func:`usllm_kernels.dispatch.choose`.

    Raises:
        ValueError: The back end cannot run.
    """
    (outputs, columns), device = codes.shape, codes.device
    size, groups, wide = group_sizes(columns, group_size)
    rows = -(-outputs // OUTPUTS) * OUTPUTS

    def filled(values: Tensor, into: Tensor) -> Tensor:
        """[..., columns] with columns that fill up words."""
        by_group = into.view(*into.shape[:-1], groups, wide)
        for group, part in enumerate(values.split(size, -1)):
            by_group[..., group, : part.shape[-1]] = part
        return into

    numbers = torch.zeros(rows, groups * wide, dtype=torch.uint8, device=device)
    filled((codes - levels.least) // levels.stride, numbers[:outputs])
    by_output = torch.zeros(groups, rows, device=device)
    by_output[:, :outputs] = 1.0 if factors is None else factors.float().t()
    return Planes(
        (outputs, inputs),
        levels,
        filled(channels, torch.zeros(groups * wide, dtype=torch.int32, device=device)),
        filled(scales.float(), torch.zeros(groups * wide, device=device)),
        plane_words(numbers, levels.bits, backend=backend),
        by_output,
    )
