"""The computing layout of a layer: codes in output order, made once from its states, never stored."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from usllm.compress.values import compute_dtype
from usllm_kernels import Codes, make_planes, plane_linear, plane_weight
from usllm_kernels.planes import SIGNS, Planes


class Expanded:
    """A weight that is what some planes decode to.

    Args:
        planes: All that is held: one, unless a subclass has a product of its own.
    """

    def __init__(self, *planes: Planes) -> None:
        self.planes = planes

    @property
    def nbytes(self) -> int:
        """Memory that it takes."""
        return sum(planes.nbytes for planes in self.planes)

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """``y = x Ŵᵀ + b``, [..., in] to [..., out] in the type that is computed with, with the gradient of ``x``."""
        x = x.to(compute_dtype(x))
        if torch.is_grad_enabled() and x.requires_grad:
            y: Tensor = _InputGradient.apply(x, self)
        else:
            y = self.product(x)
        return y if bias is None else y + bias.to(y.dtype)

    def product(self, x: Tensor) -> Tensor:
        """``x Ŵᵀ`` without a graph."""
        return plane_linear(x, self.planes[0])

    def weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The decoded weight [out, in], the bits that the states decode to."""
        return plane_weight(self.planes[0], dtype)


class _InputGradient(torch.autograd.Function):
    """The product; the backward pass decodes the weight for as long as it is needed."""

    @staticmethod
    def forward(x: Tensor, layer: Expanded) -> Tensor:
        product = layer.product(x)
        # Who adds to it in place may: torch refuses that for a view made in here.
        return product.clone() if product._is_view() else product

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.layer = inputs[1]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient @ ctx.layer.weight(gradient.dtype), None


class ExpandedFactors(Expanded):
    """A weight that is a sum of products of two thin matrices of scaled signs.

    Args:
        paths: Of each product the planes of its right factor, [rank, in], and of its left one, [out, rank].
    """

    def __init__(self, paths: Sequence[tuple[Planes, Planes]]) -> None:
        super().__init__(*(planes for path in paths for planes in path))
        self.paths = tuple(paths)

    def product(self, x: Tensor) -> Tensor:
        first, *others = (plane_linear(plane_linear(x, right), left) for right, left in self.paths)
        return sum(others, first)

    def weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The decoded weight [out, in]: the products of the factors that the states decode to, added up in fp32."""
        left = torch.cat([plane_weight(left) for _, left in self.paths], 1)
        right = torch.cat([plane_weight(right).t() for right, _ in self.paths], 1)
        return (left @ right.T).to(dtype)


def sign_planes(signs: Tensor, scales: Tensor, factors: Tensor) -> Planes:
    """Planes of ``signs * factors[:, None] * scales``.

    Args:
        signs: 1 and -1, [out, in].
        scales: [in].
        factors: [out].
    """
    channels = torch.arange(signs.shape[1], device=signs.device)
    return make_planes([Codes(signs, SIGNS, channels, scales)], signs.shape[1], factors[:, None])
