"""A linear layer whose weight exists only as a packed sketch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from usllm.compress import Compressor, LayerPlan
from usllm.packed.attention import register_attention
from usllm.packed.config import PackedLayerEntry

if TYPE_CHECKING:
    from usllm.compress.expanded import Expanded

LAYOUTS = ("compact", "expanded", "decoded")


class PackedWeight:
    """The place of a weight that exists only as bytes.

    ``peft`` asks it for its device, and for its type, which is that of bytes: so adapters are not cast to it.

    Raises:
        AttributeError: Anything else is asked of it; an adapter that is to be merged asks for its ``data``.
    """

    def __init__(self, layer: PackedLinear) -> None:
        self.device, self.dtype = layer.packed.device, layer.packed.dtype
        self._name = layer.name

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"{self._name}: has no weight.{name}, it is packed; adapters stay beside packed layers and cannot be "
            "merged into them, nor begin from their weights"
        )


class PackedLinear(nn.Linear):
    """``y = x Ŵᵀ + b`` with ``Ŵ`` from bytes.

    To ``peft`` it is a linear layer whose weight it cannot reach: adapters are trained beside it, and never merged.

    Its only state is a buffer of bytes, which no cast of the model touches. The decoded weight is that of the trained
    layer, bit for bit, in the dtype that is computed with. What else is held, and made again where it is lost, is its
    layout: nothing (``compact``: decoded for each call and released after it), codes in output order (``expanded``), or
    the decoded weight. Who writes into ``packed`` by hand has to set the layout anew.

    Args:
        entry: Shape and bytes of the layer.
        compressor: The method, with its format constants.
        name: Stable name, part of the hash key.
        bias: Whether there is one.
        dtype: Of the bias.
    """

    packed: Tensor
    _is_hf_initialized = True  # transformers draws no weights for it

    def __init__(
        self,
        entry: PackedLayerEntry,
        compressor: Compressor,
        name: str,
        bias: bool = False,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)  # there is no weight to allocate
        self.out_features, self.in_features = entry.shape
        self.compressor, self.name = compressor, name
        self.register_buffer("packed", torch.zeros(entry.bytes, dtype=torch.uint8))
        held = nn.Parameter(torch.empty(self.out_features, dtype=dtype), requires_grad=False) if bias else None
        self.register_parameter("bias", held)
        self.layout, self.automatic = "compact", True
        self._plan: LayerPlan | None = None
        self._decoded: Tensor | None = None
        self._expanded: Expanded | None = None

    @property
    def weight(self) -> PackedWeight:  # type: ignore[override]
        """What stands where linear layers have a tensor: it has a device and cannot be computed with."""
        return PackedWeight(self)

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
        if self.layout == "decoded":
            self._decoded = decoded
        return decoded

    @property
    def expanded(self) -> Expanded:
        """The codes in output order, made again where they were lost."""
        if self._expanded is None:
            self._expanded = self.plan.expand(self.plan.unpack(self.packed))
        return self._expanded

    def set_layout(self, layout: str, automatic: bool = False) -> None:
        """Compute by another of :data:`LAYOUTS` from the next call on; what was held is released.

        Args:
            layout: One that the layer has.
            automatic: Whether nobody asked for it: then a layer that is moved to another device, or computes in
                float32, computes as a compact one there.

        Raises:
            ValueError: The layer has no such layout.
        """
        if layout not in LAYOUTS or (layout == "expanded" and self.plan.expanded_bytes() is None):
            raise ValueError(f"{self.name}: has no layout {layout!r}")
        self.automatic = automatic
        if layout == self.layout:
            return
        self.layout = layout
        self._forget()
        if layout == "expanded" and self.packed.device.type != "meta":
            _ = self.expanded  # now, and not in the midst of what somebody compiles

    def _forget(self) -> None:
        self._decoded = self._expanded = None

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., in] to [..., out] in the dtype of ``x``, or of autocast."""
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        plan = self.plan
        # Where the trained layer multiplies a decoded weight, so does this one in float32: what is added up, and so the
        # bits of the logits, are then the same. In other types products come straight from the states.
        if self.layout == "expanded" and not (self.automatic and (device != "cpu" or dtype == torch.float32)):
            return self.expanded.linear(x, self.bias)
        if self.layout == "decoded":
            return functional.linear(x, self.decoded_weight(dtype), self.bias)
        if torch.is_grad_enabled() and x.requires_grad and plan.multiplies_decoded(device, kept=dtype == torch.float32):
            product: Tensor = _DecodedAgain.apply(x.to(dtype), self.bias, self)
            return product
        return self.compact(x, dtype)

    def compact(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """The product of the compact layout, computed in ``dtype``."""
        plan = self.plan
        if dtype == torch.float32 and plan.multiplies_decoded(x.device.type, kept=True):
            return functional.linear(x, self.decoded_weight(dtype), self.bias)
        return plan.linear(x, plan.unpack(self.packed), {}, self.bias)

    def _apply(self, *args: Any, **kwargs: Any) -> PackedLinear:
        before = self.packed.device
        super()._apply(*args, **kwargs)
        if self.packed.device != before:
            self._forget()
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_decoded": None, "_expanded": None}  # made again from the bytes

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        register_attention()  # the model around this layer may name it, in a process that has loaded nothing

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._plan = None
        self._forget()

    def extra_repr(self) -> str:
        weights = self.out_features * self.in_features
        text = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        return f"{text}, bits_per_weight={8 * self.packed.numel() / weights:.4f}"


class _DecodedAgain(torch.autograd.Function):
    """The product of a compact layer; the backward pass decodes again, so that a graph holds no weights."""

    @staticmethod
    def forward(x: Tensor, bias: Tensor | None, layer: PackedLinear) -> Tensor:
        y = layer.compact(x, x.dtype)
        return y.clone() if y._is_view() else y  # adapters may add to it in place, which torch refuses for a view

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.layer = inputs[2]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None, None]:
        of_bias = gradient.flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None
        return gradient @ ctx.layer.decoded_weight(gradient.dtype), of_bias, None


def packed_layers(model: nn.Module) -> dict[str, PackedLinear]:
    """All packed layers of a model by stable name, in module order."""
    return {module.name: module for module in model.modules() if isinstance(module, PackedLinear)}
