"""What was compressed and what it takes: the one source of every bit figure that users see."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import nn

from usllm.compress.entries import bits_with_entries
from usllm.compress.layer import CompressedLinear, compressed_layers
from usllm.compress.values import Fact

REST_BITS = 16  # what is not compressed is counted at bf16, as it is stored


@dataclass(frozen=True)
class LayerReport:
    """One compressed layer.

    Attributes:
        name: Layer name.
        shape: ``(out, in)``.
        bits: Bits of the packed layer, metadata included.
        bits_per_weight: ``bits`` over the layer's weights.
        importance: Mean E[a²] of the input channels.
        relative_error: ``‖Ŵ - W‖² / ‖W‖²`` with channels weighted by E[a²]; ``None`` where no latent is a weight.
        sections: Bits of each section of the packed layer.
        facts: Figures of its method, by name (:meth:`usllm.compress.base.LayerPlan.facts`).
    """

    name: str
    shape: tuple[int, int]
    bits: int
    bits_per_weight: float
    importance: float
    relative_error: float | None
    sections: dict[str, int]
    facts: dict[str, Fact]

    def value(self, name: str) -> Any:
        """Value of a fact; ``None`` where the method has none of that name."""
        return self.facts[name].value if name in self.facts else None

    def to_dict(self) -> dict[str, Any]:
        """Plain Python, for JSON."""
        plain = {**{f.name: getattr(self, f.name) for f in fields(self)}, "shape": list(self.shape)}
        return {**plain, "facts": {name: fact._asdict() for name, fact in self.facts.items()}}

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> LayerReport:
        """The report that :meth:`to_dict` was made of."""
        facts = {name: Fact(**fact) for name, fact in plain["facts"].items()}
        return cls(**{**plain, "shape": tuple(plain["shape"]), "facts": facts})


@dataclass(frozen=True)
class CompressionReport:
    """A compressed model.

    Attributes:
        layers: The compressed layers.
        compressed_weights: Weights in them.
        other_parameters: All other parameters, tied ones once; counted at 16 bits.
    """

    layers: tuple[LayerReport, ...]
    compressed_weights: int
    other_parameters: int

    @property
    def total_bits(self) -> int:
        """Bits of the compressed layers."""
        return sum(layer.bits for layer in self.layers)

    @property
    def bits_per_weight(self) -> float:
        """Bits per compressed weight: all that is in the layers' tensors, their tables and scales included."""
        return self.total_bits / self.compressed_weights

    @property
    def bits_per_weight_with_entries(self) -> float:
        """The same with what each layer takes in the headers of the weight files (:mod:`usllm.compress.entries`)."""
        return bits_with_entries(
            ((layer.name, layer.shape, layer.bits // 8) for layer in self.layers), self.model_bytes
        )

    @property
    def model_bits(self) -> int:
        """Bits of the whole model."""
        return self.total_bits + REST_BITS * self.other_parameters

    @property
    def model_bits_per_weight(self) -> float:
        """Bits per parameter of the whole model."""
        return self.model_bits / (self.compressed_weights + self.other_parameters)

    @property
    def model_bytes(self) -> int:
        """Bytes of the whole model."""
        return -(-self.model_bits // 8)

    @property
    def allocation_variation(self) -> float:
        """Coefficient of variation of the layers' bits per weight (at most 0.2: `docs/method.md` §2)."""
        rates = torch.tensor([layer.bits_per_weight for layer in self.layers], dtype=torch.float64)
        return float(rates.std(correction=0) / rates.mean())

    def to_dict(self) -> dict[str, Any]:
        """Plain Python, for JSON."""
        totals = ("total_bits", "bits_per_weight", "bits_per_weight_with_entries", "allocation_variation")
        of_model = ("model_bits", "model_bits_per_weight", "model_bytes")
        return {
            **{name: getattr(self, name) for name in (*totals, *of_model)},
            "compressed_weights": self.compressed_weights,
            "other_parameters": self.other_parameters,
            "layers": [layer.to_dict() for layer in self.layers],
        }


def compression_report(model: nn.Module) -> CompressionReport:
    """Report of a model whose compressed layers are planned and projected.

    Raises:
        RuntimeError: If a compressed layer has no plan.
    """
    layers = compressed_layers(model)
    latent = {id(tensor) for layer in layers.values() for tensor in layer.latents.values()}
    rest = {id(p): p.numel() for p in model.parameters() if id(p) not in latent}
    return CompressionReport(
        layers=tuple(layer_report(layer) for layer in layers.values()),
        compressed_weights=sum(layer.out_features * layer.in_features for layer in layers.values()),
        other_parameters=sum(rest.values()),
    )


@torch.no_grad()
def layer_report(layer: CompressedLinear) -> LayerReport:
    """Report of one layer that is planned and projected.

    Raises:
        RuntimeError: It has no plan.
    """
    plan = layer.plan
    if plan is None:
        raise RuntimeError(f"{layer.name} has no plan yet: calibrate and allocate first")
    error = None
    if "weight" in layer.latents:
        latent = layer.latent_weight()
        difference = (layer.decoded_weight() - latent).square().sum(0) @ layer.importance
        energy = latent.square().sum(0) @ layer.importance
        error = float(difference / energy.clamp_min(1e-30))
    return LayerReport(
        name=layer.name,
        shape=plan.shape,
        bits=plan.total_bits,
        bits_per_weight=plan.bits_per_weight,
        importance=float(layer.importance.double().mean()),
        relative_error=error,
        sections=plan.sections(),
        facts=plan.facts(),
    )
