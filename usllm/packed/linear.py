"""A linear layer whose weight exists only as a packed sketch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from usllm.compress import Compressor, LayerPlan
from usllm.packed.config import PackedLayerEntry


class PackedLinear(nn.Module):
    """``y = x Ŵᵀ + b`` with ``Ŵ`` decoded from bytes for each call and released after it.

    Its only state is a buffer of bytes, which no cast of the model touches. The decoded weight is that of the trained
    layer, bit for bit, in the dtype that is computed with.

    Args:
        entry: Shape and bytes of the layer.
        compressor: The method, with its format constants.
        name: Stable name, part of the hash key.
        bias: Whether there is one.
        dtype: Of the bias.
    """

    packed: Tensor

    def __init__(
        self,
        entry: PackedLayerEntry,
        compressor: Compressor,
        name: str,
        bias: bool = False,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = entry.shape
        self.compressor, self.name = compressor, name
        self.register_buffer("packed", torch.zeros(entry.bytes, dtype=torch.uint8))
        self.bias = nn.Parameter(torch.empty(self.out_features, dtype=dtype), requires_grad=False) if bias else None
        self.keeps_decoded = False
        self._plan: LayerPlan | None = None
        self._decoded: Tensor | None = None

    @property
    def plan(self) -> LayerPlan:
        """The layer's plan, read from the bytes and checked at the first use.

        Raises:
            PackedFormatError: The bytes are damaged.
        """
        if self._plan is None:
            self._plan = self.compressor.read(self.packed, (self.out_features, self.in_features), self.name)
        return self._plan

    def decoded_weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """``Ŵ``, [out, in], on the device of the bytes."""
        if self._decoded is not None and self._decoded.dtype == dtype:
            return self._decoded
        with torch.no_grad():
            decoded = self.plan.decode(self.plan.unpack(self.packed), dtype)
        if self.keeps_decoded:
            self._decoded = decoded
        return decoded

    def keep_decoded(self, keep: bool) -> None:
        """Hold on to the decoded weight from the next call on: ``out * in`` numbers more memory, no decoding."""
        self.keeps_decoded = keep
        self._decoded = None

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., in] to [..., out] in the dtype of ``x``, or of autocast."""
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        plan = self.plan
        # Where the trained layer multiplies a decoded weight, so does this one in float32: what is added up, and so the
        # bits of the logits, are then the same. In other types products come straight from the states.
        if self.keeps_decoded or (device in plan.decodes_on and dtype == torch.float32):
            return functional.linear(x, self.decoded_weight(dtype), self.bias)
        return plan.linear(x, plan.unpack(self.packed), {}, self.bias)

    def _apply(self, *args: Any, **kwargs: Any) -> PackedLinear:
        self._decoded = None
        return super()._apply(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._plan = self._decoded = None

    def extra_repr(self) -> str:
        weights = self.out_features * self.in_features
        text = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        return f"{text}, bits_per_weight={8 * self.packed.numel() / weights:.4f}"


def packed_layers(model: nn.Module) -> dict[str, PackedLinear]:
    """All packed layers of a model by stable name, in module order."""
    return {module.name: module for module in model.modules() if isinstance(module, PackedLinear)}


def keep_decoded_(model: nn.Module, budget_bytes: int, dtype: torch.dtype) -> int:
    """Let the first layers keep their decoded weights, as many as fit the budget; in place.

    Which layers are kept never changes while the model runs: tokens pass the layers in turn, so evicting the one used
    longest ago would evict each just before it is needed.

    Args:
        model: A packed model.
        budget_bytes: Ceiling for all kept weights together; 0 keeps none.
        dtype: That the model computes with.

    Returns:
        Bytes that will be kept.
    """
    kept = 0
    size = torch.empty(0, dtype=dtype).element_size()
    for layer in packed_layers(model).values():
        needed = layer.in_features * layer.out_features * size
        fits = kept + needed <= budget_bytes
        layer.keep_decoded(fits)
        kept += needed if fits else 0
    return kept
