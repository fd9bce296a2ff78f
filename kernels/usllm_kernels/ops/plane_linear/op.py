"""``y = x Ŵᵀ`` from codes in output order."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from usllm_kernels.dispatch import implementation, running_on, traced
from usllm_kernels.planes import Planes


def plane_linear(x: Tensor, planes: Planes, *, backend: str | None = None) -> Tensor:
    """Map [..., in] to [..., out] with what the planes decode to, without a graph; few tokens are added up in fp32.

    Args:
        x: [..., in].
        planes: Of the layer.
        backend: See :func:`usllm_kernels.dispatch.choose`.

    Returns:
        In the dtype of ``x``.

    Raises:
        ValueError: ``x`` is not [..., in], or the back end cannot run.
    """
    outputs, inputs = planes.shape
    if x.shape[-1] != inputs:
        raise ValueError(f"the input has {x.shape[-1]} channels, the layer {inputs}")
    if traced(x):
        return plane_linear_op(x, list(planes.tensors), outputs, backend or "")
    return _computed(x, planes, backend)


def _computed(x: Tensor, planes: Planes, backend: str | None) -> Tensor:
    (outputs, inputs), device, dtype, rows = planes.shape, x.device, x.dtype, x.shape[:-1]
    # Of one token, each call takes as long as a part of the product: there are no more of them than needed.
    with running_on(device):
        computing = implementation("plane_linear", planes, device, backend)
        y: Tensor = computing.plane_linear((x.detach() if x.requires_grad else x).reshape(-1, inputs), planes)
    return (y if y.dtype == dtype else y.to(dtype)).view(*rows, outputs)


def plane_weight(planes: Planes, dtype: torch.dtype = torch.float32, *, backend: str | None = None) -> Tensor:
    """Decoded weight of a layer [out, in], the bits that its states decode to; 0 where nothing is stored.

    Args:
        planes: Of the layer.
        dtype: Computed in fp32 and rounded to it.
        backend: See :func:`usllm_kernels.dispatch.choose`.
    """
    device = planes.words.device
    with running_on(device):
        weight: Tensor = implementation("plane_linear", planes, device, backend).plane_weight(planes, dtype)
    return weight


@torch.library.custom_op("usllm::plane_linear", mutates_args=())
def plane_linear_op(x: Tensor, planes: list[Tensor], outputs: int, backend: str) -> Tensor:
    """``x Ŵᵀ`` for compiled callers, with the tensors of the planes."""
    y = _computed(x, Planes((outputs, x.shape[-1]), *planes), backend)
    return y if y.is_contiguous() else y.contiguous()


@plane_linear_op.register_fake
def _(x: Tensor, planes: Any, outputs: int, backend: str) -> Tensor:
    return x.new_empty(*x.shape[:-1], outputs)
