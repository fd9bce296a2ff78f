"""vLLM's embedding and head over blocks of 8 or 4 bits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.utils.torch_utils import direct_register_custom_op

from usllm.packed.blocks import bytes_per_row, check_blocks, unpack_blocks
from usllm.packed.config import BlockEntry
from usllm.system.errors import PackedFormatError
from usllm_kernels import block_linear


class BlockEmbeddingMethod(QuantizeMethodBase):
    """An embedding that decodes the rows it looks up, or a head that multiplies with the blocks as they lie.

    A tied head has the embedding's bytes, as with vLLM's own.

    Args:
        entry: Of the folder.
        name: Of the stored module.
    """

    def __init__(self, entry: BlockEntry, name: str) -> None:
        self.entry, self.name = entry, name

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra: Any,
    ) -> None:
        """Make room for the bytes; rows that vLLM adds to the vocabulary are zeros.

        Raises:
            PackedFormatError: The stored matrix has another shape.
        """
        shape = layer.org_vocab_size, input_size_per_partition
        if self.entry.shape != shape:
            stored = self.entry.shape
            raise PackedFormatError(
                f"{self.name}: is {stored[0]}x{stored[1]} in the folder, {shape[0]}x{shape[1]} in vLLM's model"
            )
        size = sum(output_partition_sizes), bytes_per_row(input_size_per_partition, self.entry.bits, self.name)
        weight = nn.Parameter(torch.zeros(size, dtype=torch.uint8), requires_grad=False)
        weight.output_dim, weight.weight_loader = 0, extra["weight_loader"]  # type: ignore[attr-defined]
        layer.register_parameter("weight", weight)
        layer.float_dtype = params_dtype

    def process_weights_after_loading(self, layer: Any) -> None:
        """Check what was loaded.

        Raises:
            PackedFormatError: It is damaged.
        """
        try:
            check_blocks(layer.weight, self.entry.bits, f"{self.name}.weight")
        except ValueError as error:
            raise PackedFormatError(str(error)) from error

    def embedding(self, layer: Any, ids: Tensor) -> Tensor:
        """Rows [...] to [..., columns]."""
        if torch.compiler.is_compiling():
            columns, bits = self.entry.shape[1], self.entry.bits
            rows: Tensor = torch.ops.vllm.usllm_rows(ids, layer.weight, columns, bits, layer.float_dtype)
            return rows
        return _rows(ids, layer.weight, self.entry.shape[1], self.entry.bits, layer.float_dtype)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Logits: [..., columns] to [..., rows]."""
        return block_linear(x, layer.weight, self.entry.bits, bias)


def _rows(ids: Tensor, packed: Tensor, columns: int, bits: int, dtype: torch.dtype) -> Tensor:
    """Rows [...] to [..., columns]; one op for the compiler, which mixes up the types of scales and numbers."""
    return unpack_blocks(functional.embedding(ids, packed), bits, dtype)


def _rows_fake(ids: Tensor, packed: Tensor, columns: int, bits: int, dtype: torch.dtype) -> Tensor:
    return packed.new_empty((*ids.shape, columns), dtype=dtype)


direct_register_custom_op("usllm_rows", _rows, fake_impl=_rows_fake)
