"""``y = x Ŵᵀ + b`` with a weight in the blocks of GGUF."""

from __future__ import annotations

import torch
from torch import Tensor

from usllm_kernels.blocks import BLOCK, blocks_of
from usllm_kernels.dispatch import implementation, running_on, traced


def block_linear(
    x: Tensor, packed: Tensor, bits: int, bias: Tensor | None = None, *, backend: str | None = None
) -> Tensor:
    """Map [..., in] to [..., out] in the dtype of ``x``.

    Args:
        x: [..., in].
        packed: uint8 [out, bytes of a row] (:mod:`usllm_kernels.blocks`).
        bits: 8 or 4.
        bias: [out], in the dtype of ``x``, or none.
        backend: See :func:`usllm_kernels.dispatch.choose`.

    Raises:
        ValueError: The back end cannot run, the bytes are no whole number of blocks, or ``x`` is not [..., in] or on
            another device.
    """
    if traced(x):
        return block_linear_op(x, packed, bits, bias, backend or "")
    return _computed(x, packed, bits, bias, backend)


def _computed(x: Tensor, packed: Tensor, bits: int, bias: Tensor | None, backend: str | None) -> Tensor:
    columns = blocks_of(packed, bits, "weight").shape[-2] * BLOCK
    if x.shape[-1] != columns:
        raise ValueError(f"the input has {x.shape[-1]} channels, the weight {columns}")
    if packed.device != x.device:
        raise ValueError(f"the weight is on {packed.device}, the input on {x.device}")
    with running_on(x.device):
        computing = implementation("block_linear", packed, x.device, backend)
        y: Tensor = computing.block_linear(x.reshape(-1, x.shape[-1]), packed, bits, bias)
    return y.to(x.dtype).view(*x.shape[:-1], packed.shape[0])


@torch.library.custom_op("usllm::block_linear", mutates_args=())
def block_linear_op(x: Tensor, packed: Tensor, bits: int, bias: Tensor | None, backend: str) -> Tensor:
    """``x Ŵᵀ + b`` for compiled callers."""
    return _computed(x, packed, bits, bias, backend)


@block_linear_op.register_fake
def _(x: Tensor, packed: Tensor, bits: int, bias: Tensor | None, backend: str) -> Tensor:
    return x.new_empty(*x.shape[:-1], packed.shape[0])
