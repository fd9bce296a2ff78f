"""In which form each layer of a loaded model lies in memory: what is stored, codes in output order, or weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextvars import ContextVar

import torch
from torch import nn

from usllm.packed.linear import LAYOUTS, PackedLinear, packed_layers
from usllm.system.errors import UserError

MOST_BITS = 1.5
"""Of a weight in output order, in the mean, that ``auto`` still takes: with more, not only states would be resident."""
CHOICES = ("auto", *LAYOUTS)
_WITH_KERNELS = ("cpu", "cuda", "meta")
asked: ContextVar[tuple[str, int | None]] = ContextVar("asked", default=("auto", None))
"""Layout and memory that a model is being loaded with."""


def choose_layouts_(model: nn.Module, layout: str = "auto", memory: int | None = None) -> dict[str, str]:
    """Give every packed layer of a model the layout that is asked for, as long as memory is left; in place.

    Which layers have it never changes while the model runs: tokens pass the layers in turn, so evicting the one used
    longest ago would evict each just before it is needed.

    Args:
        model: A packed model.
        layout: ``compact``: as stored, looked up through the hash at each use. ``expanded``: codes in output order,
            one bit of memory for each bit of a code. ``decoded``: weights in the type that is computed with. ``auto``:
            all layers expanded if together they take at most 1.5 bits a weight, else those that do by themselves; on
            the CPU (on no card was it measured), and not where the model computes in float32: there compact layers
            compute the bits of the trained ones.
        memory: Ceiling in bytes for all that is held besides what is stored; layers that it has no room for stay
            compact, as do those whose method has no expanded layout, and offloaded ones. ``None``: no ceiling.

    Returns:
        The layout of each layer.

    Raises:
        UserError: There is no such layout, or none on the device of a layer.
    """
    if layout not in CHOICES:
        raise UserError(f"layout={layout!r}: is unknown; choose one of {', '.join(CHOICES)}")
    for name, layer in packed_layers(model).items():
        if layout == "expanded" and layer.packed.device.type not in _WITH_KERNELS:
            raise UserError(
                f"layout=expanded: {name} is on {layer.packed.device}; it is for the CPU and CUDA, leave it at auto"
            )
    dtype, left = getattr(model, "dtype", torch.float32), memory
    small = _small(packed_layers(model), dtype) if layout == "auto" else set()
    found = {}
    for name, layer in packed_layers(model).items():
        if layer.packed.device.type == "meta":
            found[name] = layer.layout
            continue
        chosen = layout if layout != "auto" else "expanded" if name in small else "compact"
        needed = _BYTES[chosen](layer, dtype)
        if needed is None or (left is not None and needed > left):
            chosen, needed = "compact", 0
        left = None if left is None else left - needed
        layer.set_layout(chosen, automatic=layout == "auto")
        found[name] = chosen
    return found


def _small(layers: Mapping[str, PackedLinear], dtype: torch.dtype) -> set[str]:
    """Names of the layers that ``auto`` expands."""
    if dtype == torch.float32:
        return set()
    on_cpu = {name: layer for name, layer in layers.items() if layer.packed.device.type == "cpu"}
    sizes = {name: layer.plan.expanded_bytes() for name, layer in on_cpu.items()}
    able = {name: size for name, size in sizes.items() if size is not None}

    def fit(names: Iterable[str]) -> bool:
        weights = sum(layers[name].in_features * layers[name].out_features for name in names)
        return 8 * sum(able[name] for name in names) <= MOST_BITS * weights

    return set(able) if fit(able) else {name for name in able if fit([name])}


_BYTES: dict[str, Callable[[PackedLinear, torch.dtype], int | None]] = {
    "compact": lambda layer, dtype: 0,
    "expanded": lambda layer, dtype: layer.plan.expanded_bytes(),
    "decoded": lambda layer, dtype: layer.in_features * layer.out_features * dtype.itemsize,
}
"""Memory besides what is stored; ``None`` where the layout does not exist."""
