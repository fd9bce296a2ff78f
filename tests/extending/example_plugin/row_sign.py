"""A method: the sign of each weight, times one scale for each output row."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from usllm.compress import METHODS, Compressor, Encoded, LayerPlan, Spec, Statistics
from usllm.sketch.bitstream import pack, unpack
from usllm.system.errors import PackedFormatError


@dataclass(frozen=True)
class RowSignOptions:
    """A rate is a ceiling; the method always takes one bit a weight and 16 a row."""

    bits_per_weight: float = 2.0
    layer_budget: str = "equal"


class RowSignPlan(LayerPlan):
    """Nothing is planned: names and shapes say it all."""

    def __init__(self, name: str, shape: tuple[int, int], options: RowSignOptions) -> None:
        self.name, self.shape, self.options = name, shape, options

    @property
    def compressor(self) -> "RowSign":
        return RowSign(self.options)

    def to_tensors(self) -> dict[str, Tensor]:
        return {}

    def state_specs(self) -> dict[str, Spec]:
        return {
            "scales": Spec((self.shape[0],), torch.float16, "state"),
            "signs": Spec(self.shape, torch.bool, "state"),
        }

    def encode(
        self,
        latents: Mapping[str, Tensor],
        energy: Tensor | None = None,
        *,
        decode_dtype: torch.dtype | None = None,
        before: Mapping[str, Tensor] | None = None,
        memory: Tensor | None = None,
    ) -> Encoded:
        weight = latents["weight"].detach().float()
        states = {"scales": weight.abs().mean(1).half(), "signs": weight < 0}
        decoded = None if decode_dtype is None else self.decode(states, decode_dtype)
        return Encoded(states, decoded, torch.zeros((), device=weight.device), None, None)

    def decode(self, states: Mapping[str, Tensor], dtype: torch.dtype = torch.float32) -> Tensor:
        scales = states["scales"].float()[:, None]
        return torch.where(states["signs"], -scales, scales).to(dtype)

    def pack(self, states: Mapping[str, Tensor]) -> Tensor:
        scales = states["scales"].detach().cpu().contiguous().view(torch.uint8)
        return torch.cat([scales, pack([(states["signs"].detach().cpu().to(torch.uint8), 1)])])

    def unpack(self, packed: Tensor) -> dict[str, Tensor]:
        rows, columns = self.shape
        scales = packed[: 2 * rows].clone().view(torch.float16)
        signs = unpack(packed[2 * rows :], rows * columns, 1).view(rows, columns).bool()
        return {"scales": scales, "signs": signs}

    def sections(self) -> dict[str, int]:
        rows, columns = self.shape
        return {"scales": 16 * rows, "signs": -(-rows * columns // 8) * 8}


class RowSign(Compressor):
    """Signs and row scales."""

    method = "row_sign"
    Options = RowSignOptions
    options: RowSignOptions

    @property
    def format(self) -> dict[str, Any]:
        return {}

    @classmethod
    def from_format(cls, stored: Mapping[str, Any], options: Mapping[str, Any]) -> "RowSign":
        if stored:
            raise ValueError(f"format.{min(stored)}: is unknown")
        return cls(RowSignOptions(**{key: value for key, value in options.items() if key in asdict(RowSignOptions())}))

    def least_bits(self, shape: tuple[int, int]) -> int:
        return RowSignPlan("", shape, self.options).total_bits

    most_bits = least_bits

    def plan(self, shape: tuple[int, int], name: str, statistics: Statistics, bits: int) -> RowSignPlan:
        if bits < self.least_bits(shape):
            least = self.least_bits(shape) / (shape[0] * shape[1])
            raise ValueError(f"{name}: sketch.bits_per_weight is too little; row_sign takes {least:.3f}")
        return RowSignPlan(name, shape, self.options)

    def restore(self, tensors: Mapping[str, Tensor], shape: tuple[int, int], name: str) -> RowSignPlan:
        return RowSignPlan(name, shape, self.options)

    def read(self, packed: Tensor, shape: tuple[int, int], name: str) -> RowSignPlan:
        plan = RowSignPlan(name, shape, self.options)
        if packed.dtype != torch.uint8 or 8 * packed.numel() != plan.total_bits:
            raise PackedFormatError(f"{name}: has {packed.numel()} bytes, expected {plan.total_bits // 8}")
        if not bool(plan.unpack(packed)["scales"].isfinite().all()):
            raise PackedFormatError(f"{name}: a scale is not finite")
        return plan

    def byte_bounds(self, shape: tuple[int, int]) -> tuple[int, int]:
        size = self.least_bits(shape) // 8
        return size, size


METHODS["row_sign"] = RowSign
