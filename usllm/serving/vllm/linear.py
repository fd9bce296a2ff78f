"""vLLM's linear layers over stored parts; compiled, a layer is one op, which asks for its parts by their name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from vllm.config import get_current_vllm_config
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.linear import LinearMethodBase
from vllm.utils.torch_utils import direct_register_custom_op, set_default_torch_dtype

from usllm.packed.config import PackedConfig
from usllm.serving.vllm.parts import Parts
from usllm.system.errors import UserError


class PackedLinearMethod(LinearMethodBase):
    """One of vLLM's linear layers, computed from the stored layers that it fuses.

    Args:
        names: Of the stored layers, in the order of their outputs.
        packed: The packed configuration.
        loaded: Told of the parts when they are.
    """

    def __init__(self, names: Sequence[str], packed: PackedConfig, loaded: Callable[[Parts], None]) -> None:
        self.names, self.packed, self.loaded = tuple(names), packed, loaded

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
        """Give a layer its parts, empty.

        Raises:
            UserError: vLLM fuses or splits in another way than the folder.
            PackedFormatError: A stored layer has another shape.
        """
        rows = output_partition_sizes if len(self.names) > 1 else [sum(output_partition_sizes)]
        if (input_size_per_partition, sum(rows)) != (input_size, output_size) or len(rows) != len(self.names):
            raise UserError(
                f"{', '.join(self.names)}: vLLM cuts them into {output_partition_sizes} x {input_size_per_partition} "
                f"of {output_size} x {input_size}, the folder does not; this model cannot be served packed"
            )
        layer.parts = Parts(self.names, rows, input_size, self.packed, params_dtype)
        for name, holder in layer.parts.placeholders().items():
            layer.register_parameter(name, holder)
        known = get_current_vllm_config().compilation_config.static_forward_context
        layer.parts_name = f"usllm.{self.names[0]}"
        known[layer.parts_name] = layer.parts

    def process_weights_after_loading(self, layer: Any) -> None:
        """Check what was loaded.

        vLLM has made the model's type the default one here; layouts are computed in float32, as everywhere else.
        """
        with set_default_torch_dtype(torch.float32):
            layer.parts.check()
            self.loaded(layer.parts)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """``y = x Ŵᵀ + b``, [..., in] to [..., out]."""
        if torch.compiler.is_compiling():
            y: Tensor = torch.ops.vllm.usllm_parts(x, layer.parts_name, layer.parts.outputs)
        else:
            y = layer.parts(x)
        return y if bias is None else y + bias


def _parts(x: Tensor, name: str, outputs: int) -> Tensor:
    """All parts of a layer; what is compiled around it knows neither bytes nor layouts."""
    y: Tensor = get_forward_context().no_compile_layers[name](x)
    return y.contiguous()


def _parts_fake(x: Tensor, name: str, outputs: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], outputs)


direct_register_custom_op("usllm_parts", _parts, fake_impl=_parts_fake)
