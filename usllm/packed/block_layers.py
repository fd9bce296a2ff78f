"""Linear layer and embedding whose weight stays packed at 8 or 4 bits and is decoded a few rows at a time.

The packed bytes are the parameter ``weight``, as in ``nn.Linear`` and ``nn.Embedding``: so transformers ties a head to
its embedding, stores the shared bytes once, and moves them between devices as one tensor, which it would not do for
buffers (``Module._apply`` replaces buffers but moves parameters in place). Casts to another float dtype leave uint8
alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from usllm.packed.blocks import SCHEMES, bytes_per_row, chunk_rows, pack_blocks, unpack_blocks
from usllm_kernels import block_linear


class BlockLinear(nn.Module):
    """``y = x Ŵᵀ + b`` with ``Ŵ`` decoded in chunks of rows, or a few tokens multiplied with codes as they lie.

    It computes in the dtype of ``x`` or of autocast.

    Gradients reach ``x`` and the bias; for them the chunks are decoded again.

    Args:
        in_features: Inputs, a multiple of 32.
        out_features: Outputs.
        bits: 8 or 4.
        bias: Whether there is a bias.
        dtype: Of the bias; the default dtype if ``None``.
        device: Of the tensors.

    Raises:
        ValueError: ``in_features`` does not fit into blocks.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bits: int,
        bias: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bits = in_features, out_features, bits
        self.weight = _empty(out_features, in_features, bits, device)
        if bias:
            self.bias: nn.Parameter | None = nn.Parameter(torch.zeros(out_features, dtype=dtype, device=device))
        else:
            self.register_parameter("bias", None)

    @classmethod
    def from_weight(cls, weight: Tensor, bits: int, bias: Tensor | None = None, name: str = "weight") -> BlockLinear:
        """Quantise a weight [out, in]; the bias [out] is copied. The layer is on the device of ``weight``.

        Raises:
            ValueError: The weight cannot be packed; ``name`` is named.
        """
        packed = pack_blocks(weight, bits, name)
        layer = cls(weight.shape[1], weight.shape[0], bits, bias is not None, weight.dtype, "meta")
        layer.weight = nn.Parameter(packed.to(weight.device), requires_grad=False)
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach().to(weight.device, copy=True))
        return layer

    @property
    def packed_bytes(self) -> int:
        """Bytes of the packed weight, without the bias."""
        return self.weight.numel()

    def decoded_weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The whole weight, [out, in]."""
        return unpack_blocks(self.weight.detach(), self.bits, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., in] to [..., out]."""
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        bias = None if self.bias is None else self.bias.to(dtype)
        return _BlockProduct.apply(x.to(dtype), self.weight, bias, self.bits)

    def extra_repr(self) -> str:
        shape = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        return f"{shape}, scheme={SCHEMES[self.bits]}"


class BlockEmbedding(nn.Module):
    """Embedding that decodes the rows it looks up, and no others.

    Args:
        num_embeddings: Rows.
        embedding_dim: Columns, a multiple of 32.
        bits: 8 or 4.
        dtype: Of the output, the default dtype if ``None``; ``.to(dtype)``, ``.half()`` and the like change it.
        device: Of the packed weight.

    Attributes:
        dtype: As above. There is no float tensor in the module that could tell it.

    Raises:
        ValueError: ``embedding_dim`` does not fit into blocks.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        bits: int,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim, self.bits = num_embeddings, embedding_dim, bits
        self.dtype = dtype or torch.get_default_dtype()
        self.weight = _empty(num_embeddings, embedding_dim, bits, device)

    @classmethod
    def from_weight(cls, weight: Tensor, bits: int, name: str = "weight") -> BlockEmbedding:
        """Quantise a weight [rows, columns]; its device and dtype are the module's.

        Raises:
            ValueError: The weight cannot be packed; ``name`` is named.
        """
        packed = pack_blocks(weight, bits, name)
        module = cls(weight.shape[0], weight.shape[1], bits, weight.dtype, "meta")
        module.weight = nn.Parameter(packed.to(weight.device), requires_grad=False)
        return module

    @property
    def packed_bytes(self) -> int:
        """Bytes of the packed weight."""
        return self.weight.numel()

    def decoded_weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The whole weight, [rows, columns]."""
        return unpack_blocks(self.weight.detach(), self.bits, dtype)

    def forward(self, ids: Tensor) -> Tensor:
        """Look up row numbers [...]; returns [..., columns] in :attr:`dtype`, as ``nn.Embedding`` also under autocast.

        Raises:
            IndexError: A number is out of range (on the CPU; elsewhere the device reports it).
        """
        return unpack_blocks(functional.embedding(ids, self.weight), self.bits, self.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> BlockEmbedding:
        super()._apply(fn, recurse)
        probe = fn(torch.empty(0, dtype=self.dtype, device=self.weight.device))
        if probe.is_floating_point():
            self.dtype = probe.dtype
        return self

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, scheme={SCHEMES[self.bits]}, dtype={self.dtype}"


class _BlockProduct(torch.autograd.Function):
    """``functional.linear`` with a packed weight; saves the packed bytes instead of decoded chunks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: Tensor, bias: Tensor | None, bits: int) -> Tensor:
        """Args: x [..., in], packed uint8 [out, bytes], bias [out]; one dtype. Returns [..., out]."""
        ctx.save_for_backward(packed)
        ctx.bits, ctx.columns = bits, x.shape[-1]
        return block_linear(x, packed, bits, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, Tensor | None, None]:
        (packed,) = ctx.saved_tensors
        (grad,) = grads
        grad_x = grad_bias = None
        if ctx.needs_input_grad[0]:
            step = chunk_rows(ctx.columns)
            total: Tensor | None = None
            for first in range(0, len(packed), step):
                chunk = slice(first, first + step)
                part = grad[..., chunk] @ unpack_blocks(packed[chunk], ctx.bits, grad.dtype)
                part = part.to(torch.promote_types(grad.dtype, torch.float32))  # chunks add up in fp32
                total = part if total is None else total.add_(part)
            grad_x = None if total is None else total.to(grad.dtype)
        if ctx.needs_input_grad[2]:
            grad_bias = grad.flatten(0, -2).sum(0)
        return grad_x, None, grad_bias, None


def _empty(rows: int, columns: int, bits: int, device: torch.device | str | None) -> nn.Parameter:
    size = (rows, bytes_per_row(columns, bits))
    return nn.Parameter(torch.zeros(size, dtype=torch.uint8, device=device), requires_grad=False)
