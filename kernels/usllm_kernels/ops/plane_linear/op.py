"""``y = x Ŵᵀ`` from codes in output order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from usllm_kernels.dispatch import implementation, running_on
from usllm_kernels.planes import Levels, Planes


def plane_linear(x: Tensor, parts: Sequence[Planes], *, backend: str | None = None) -> Tensor:
    """Map [..., in] to [..., out] with the sum of what the parts decode to; fp32 sums, in the dtype of ``x``.

    Args:
        x: [..., in].
        parts: The planes of one layer, one for each width of codes that it has.
        backend: See :func:`usllm_kernels.dispatch.choose`.

    Raises:
        ValueError: ``x`` is not [..., in], or the back end cannot run.
    """
    outputs, inputs = parts[0].shape
    if x.shape[-1] != inputs:
        raise ValueError(f"the input has {x.shape[-1]} channels, the layer {inputs}")
    if torch.compiler.is_compiling():
        tensors = [tensor for part in parts for tensor in part.tensors]
        numbers = [number for part in parts for number in part.levels]
        return plane_linear_op(x, tensors, numbers, outputs, backend or "")
    return _computed(x, parts, backend)


def plane_weight(parts: Sequence[Planes], dtype: torch.dtype = torch.float32, *, backend: str | None = None) -> Tensor:
    """Decoded weight of a layer [out, in], the bits that its states decode to; 0 where nothing is stored.

    Args:
        parts: The planes of the layer.
        dtype: Computed in fp32 and rounded to it.
        backend: See :func:`usllm_kernels.dispatch.choose`.
    """
    (outputs, inputs), device = parts[0].shape, parts[0].words.device
    weight = torch.zeros(inputs, outputs, dtype=dtype, device=device)
    with running_on(device):
        for part in parts:
            if not part.columns:
                continue
            computing = implementation("plane_linear", part, device, backend)
            found, held = computing.columns_weight(part, dtype), part.scales != 0
            weight[part.channels[held].long()] = found[held]
    return weight.t()


def _computed(x: Tensor, parts: Sequence[Planes], backend: str | None) -> Tensor:
    total = None
    with running_on(x.device):
        rows = x.reshape(-1, x.shape[-1])
        for part in parts:
            computing = implementation("plane_linear", part, x.device, backend)
            found = computing.plane_linear(rows, part)
            total = found if total is None else total.float() + found
    assert total is not None
    return total.to(x.dtype).view(*x.shape[:-1], parts[0].shape[0])


@torch.library.custom_op("usllm::plane_linear", mutates_args=())
def plane_linear_op(x: Tensor, tensors: list[Tensor], numbers: list[int], outputs: int, backend: str) -> Tensor:
    """``x Ŵᵀ`` for compiled callers: four tensors and three numbers of levels for each part."""
    parts = [
        Planes((outputs, x.shape[-1]), Levels(*numbers[3 * part : 3 * part + 3]), *tensors[4 * part : 4 * part + 4])
        for part in range(len(tensors) // 4)
    ]
    return _computed(x, parts, backend)


@plane_linear_op.register_fake
def _(x: Tensor, tensors: Any, numbers: Any, outputs: int, backend: str) -> Tensor:
    return x.new_empty(*x.shape[:-1], outputs)
