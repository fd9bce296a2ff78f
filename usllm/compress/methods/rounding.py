"""Rounding as a method: each weight to the nearest of 2 to 256 levels, with a scale for each row or group of inputs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from usllm.compress.base import Compressor, LayerPlan
from usllm.compress.expanded import Expanded
from usllm.compress.packed_bytes import PackedBytes, half_bytes, half_view
from usllm.compress.values import Encoded, Fact, Spec, Statistics
from usllm.rounding import RoundingConfig
from usllm.rounding.codes import groups_of, largest_level, nearest_levels, over_columns, to_codes, to_levels
from usllm.rounding.config import DEFAULT_WIDTH, WIDTHS
from usllm.rounding.scales import fit_scales
from usllm.sketch.bitstream import pack, unpack
from usllm.system.errors import UserError
from usllm_kernels import Codes, make_planes
from usllm_kernels.planes import Levels, planes_bytes

HEADER_BYTES = 4
_CHUNK = 1 << 18  # weights encoded at a time on the CPU: what is computed in between stays in its cache


class RoundingPlan(LayerPlan):
    """Width and groups of one layer; states follow the latents in each forward pass."""

    def __init__(self, name: str, shape: tuple[int, int], config: RoundingConfig, bits: int) -> None:
        self.name, self.shape, self.config, self.bits = name, shape, config, bits

    @property
    def compressor(self) -> RoundingCompressor:
        return RoundingCompressor(self.config)

    @property
    def groups(self) -> int:
        """Groups of inputs in a row."""
        return groups_of(self.shape[1], self.config.group_size)

    def to_tensors(self) -> dict[str, Tensor]:
        return {"bits": torch.tensor(self.bits, dtype=torch.uint8)}

    def state_specs(self) -> dict[str, Spec]:
        return {
            "codes": Spec((_code_bytes(self.shape, self.bits),), torch.uint8, "state"),
            "scales": Spec((self.shape[0], self.groups), torch.float16, "state"),
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
        weight = latents["weight"].detach()
        codes, scales = [], []
        error, total = (torch.zeros(self.shape[1], dtype=torch.float64, device=weight.device) for _ in range(2))
        for rows in self._chunks(weight):
            scale, levels, decoded = self._nearest(rows)
            scales.append(scale)
            codes.append(to_codes(levels, self.bits))
            error += (decoded - rows).square_().sum(0, dtype=torch.float64)
            total += rows.square().sum(0, dtype=torch.float64)
        weights = torch.ones_like(error) if energy is None else energy.double()
        stream = pack([(torch.cat(codes), self.bits)], weight.device)
        states = {"codes": stream, "scales": torch.cat(scales)}
        change = torch.zeros((), device=weight.device)
        if before is not None:
            change = (torch.cat(codes).flatten() != self._codes(before)).float().mean()
        return Encoded(
            states=states,
            decoded=None if decode_dtype is None else self.decode(states, decode_dtype),
            change=change,
            error=((error @ weights) / (total @ weights).clamp_min(1e-30)).float(),
            memory=None,
        )

    def decode(self, states: Mapping[str, Tensor], dtype: torch.dtype = torch.float32) -> Tensor:
        levels = to_levels(self._codes(states), self.bits).view(self.shape)
        return levels.mul_(over_columns(states["scales"], self.shape[1], self.config.group_size)).to(dtype)

    def decode_latents(
        self, latents: Mapping[str, Tensor], energy: Tensor | None = None, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        weight = latents["weight"].detach()
        decoded = torch.empty(self.shape, dtype=dtype, device=weight.device)
        first = 0
        for rows in self._chunks(weight):
            decoded[first : first + len(rows)] = self._nearest(rows)[2]
            first += len(rows)
        return decoded

    def _chunks(self, weight: Tensor) -> Iterator[Tensor]:
        """Runs of rows, fp32; rows are independent of each other."""
        many = max(1, _CHUNK // self.shape[1]) if weight.device.type == "cpu" else self.shape[0]
        return (rows.float() for rows in weight.split(many))

    def _nearest(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Scales fp16 [rows, groups], levels fp32 and decoded weights fp32, both [rows, in]."""
        size = self.config.group_size
        scales = fit_scales(rows, self.bits, size, self.config.scales)
        wide = over_columns(scales, self.shape[1], size)
        levels = nearest_levels(rows, wide, self.bits)
        return scales, levels, levels * wide

    def _codes(self, states: Mapping[str, Tensor]) -> Tensor:
        return unpack(states["codes"], self.shape[0] * self.shape[1], self.bits)

    def pack(self, states: Mapping[str, Tensor]) -> Tensor:
        header = torch.tensor([self.bits, 0, 0, 0], dtype=torch.uint8)
        return torch.cat([header, half_bytes(states["scales"]), states["codes"].detach().cpu()])

    def unpack(self, packed: Tensor) -> dict[str, Tensor]:
        number = self.shape[0] * self.groups
        return {
            "codes": packed[HEADER_BYTES + 2 * number :],
            "scales": half_view(packed, HEADER_BYTES, number).view(self.shape[0], self.groups),
        }

    def sections(self) -> dict[str, int]:
        return _sections(self.shape, self.bits, self.config.group_size)

    def expanded_bytes(self) -> int | None:
        return planes_bytes(self.shape[0], [(self.shape[1], self._levels())], self.config.group_size)

    def expand(self, states: Mapping[str, Tensor]) -> Expanded:
        inputs, scales = self.shape[1], states["scales"]
        levels = to_levels(self._codes(states), self.bits).view(self.shape)
        channels, ones = torch.arange(inputs, device=scales.device), torch.ones(inputs, device=scales.device)
        codes = Codes(levels, self._levels(), channels, ones)
        return Expanded(make_planes([codes], inputs, scales, self.config.group_size))

    def _levels(self) -> Levels:
        largest = largest_level(self.bits)
        return Levels(-largest, largest, 2)

    def facts(self) -> dict[str, Fact]:
        return {
            "code_width": Fact(self.bits, "bits"),
            "weights_per_scale": Fact(self.shape[1] / self.groups, "weights"),
        }

    def normalised_codes(self, states: Mapping[str, Tensor]) -> Tensor:
        return to_levels(self._codes(states), self.bits) / largest_level(self.bits)


class RoundingCompressor(Compressor):
    """Rounding with its configuration."""

    method: ClassVar[str] = "rounding"
    Options: ClassVar[type[Any]] = RoundingConfig
    options: RoundingConfig

    @property
    def format(self) -> dict[str, Any]:
        return {"group_size": self.options.group_size}

    @classmethod
    def from_format(cls, stored: Mapping[str, Any], options: Mapping[str, Any]) -> RoundingCompressor:
        if odd := sorted(set(stored) ^ {"group_size"}):
            raise ValueError(f"format: the key {odd[0]} is missing or unknown")
        known = {field.name for field in dataclasses.fields(RoundingConfig)}
        given = {key: value for key, value in options.items() if key in known and key not in stored}
        return cls(RoundingConfig(**given, **stored))

    def _widths(self) -> tuple[int, ...]:
        """Those that a layer may get."""
        if self.options.bits is not None:
            return (self.options.bits,)
        return (DEFAULT_WIDTH,) if self.options.bits_per_weight is None else WIDTHS

    def _total_bits(self, shape: tuple[int, int], bits: int) -> int:
        return sum(_sections(shape, bits, self.options.group_size).values())

    def least_bits(self, shape: tuple[int, int]) -> int:
        return self._total_bits(shape, self._widths()[0])

    def most_bits(self, shape: tuple[int, int]) -> int:
        return self._total_bits(shape, self._widths()[-1])

    def plan(self, shape: tuple[int, int], name: str, statistics: Statistics, bits: int) -> RoundingPlan:
        fitting = [width for width in self._widths() if self._total_bits(shape, width) <= bits]
        if not fitting:
            weights, width = shape[0] * shape[1], self._widths()[0]
            least = math.ceil(self.least_bits(shape) / weights * 1e4) / 1e4
            given = self.options.bits_per_weight
            raise ValueError(
                f"sketch.bits_per_weight={bits / weights if given is None else given:g}: {name} ({shape[0]}x{shape[1]})"
                f" needs {least:.4f} for codes of {width} bit{'s' * (width > 1)} and their scales; raise it, or leave "
                "it at null and give the width by sketch.bits"
            )
        return RoundingPlan(name, shape, self.options, fitting[-1])

    def restore(self, tensors: Mapping[str, Tensor], shape: tuple[int, int], name: str) -> RoundingPlan:
        bits = int(tensors["bits"])
        if bits not in WIDTHS:
            raise UserError(f"{name}: codes of {bits} bits; the checkpoint is damaged")
        return RoundingPlan(name, shape, self.options, bits)

    def read(self, packed: Tensor, shape: tuple[int, int], name: str) -> RoundingPlan:
        read = PackedBytes(packed, shape, name, HEADER_BYTES)
        bits, *rest = read.header
        if bits not in WIDTHS or any(rest):
            read.fail(f"its header {read.header} is impossible")
        plan = RoundingPlan(name, shape, self.options, bits)
        read.check_size(plan.total_bits // 8)
        read.check_scales(HEADER_BYTES, shape[0] * plan.groups, signed=False)
        read.check_padding(-1, shape[0] * shape[1] * bits)
        return plan

    def byte_bounds(self, shape: tuple[int, int]) -> tuple[int, int]:
        return self._total_bits(shape, WIDTHS[0]) // 8, self._total_bits(shape, WIDTHS[-1]) // 8


def _code_bytes(shape: tuple[int, int], bits: int) -> int:
    return -(-shape[0] * shape[1] * bits // 8)


def _sections(shape: tuple[int, int], bits: int, group_size: int | None) -> dict[str, int]:
    """Bits of the header, of the fp16 scales, and of the codes with what fills their last byte."""
    return {
        "header": 8 * HEADER_BYTES,
        "scales": 16 * shape[0] * groups_of(shape[1], group_size),
        "codes": 8 * _code_bytes(shape, bits),
    }


COMPRESSOR = RoundingCompressor
