"""The data sketch as a method: :mod:`usllm.sketch` behind the seam, computed by :mod:`usllm_kernels`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from usllm.compress.base import Compressor, LayerPlan
from usllm.compress.expanded import Expanded
from usllm.compress.straight_through import scale_gradient
from usllm.compress.values import Encoded, Fact, Spec, Statistics
from usllm.sketch import Plan, SketchConfig, bit_range, build_plan
from usllm.sketch.bits import CLASS_BITS, HEADER_BITS
from usllm.sketch.hash import HASH_VERSION
from usllm.sketch.layer_bytes import pack_layer, read_plan
from usllm.sketch.quantize import largest_code
from usllm.sketch.scale import OUTPUT_MANTISSA, decode_scale
from usllm_kernels import (
    choice_problem,
    packed_states,
    project,
    project_query,
    query,
    sketch_linear,
    sketch_planes,
    sketch_planes_bytes,
    state_gradient_,
)

FORMAT_KEYS = ("operator", "query", "hash", "group_size", "output_scale", "seed")
"""Fields of :class:`usllm.sketch.SketchConfig` that give stored bytes their meaning."""
GAIN = "output_gain"
"""Logarithm of each output's scale, a latent where these are trained: a step of it is a share of the scale."""
_MAX_BITS_PER_WEIGHT = 64  # sketch and tables of the smallest layers stay far below
_MAX_WEIGHTS_PER_BYTE = 1024  # a layer of a few bytes could ask for any amount of decoded memory


class SketchPlan(Plan, LayerPlan):
    """A plan of the sketch that computes with its states."""

    stored_states: ClassVar[bool] = True
    decodes_on: ClassVar[frozenset[str]] = frozenset({"cpu"})

    @property
    def compressor(self) -> SketchCompressor:
        return SketchCompressor(self.config)

    def latent_specs(self) -> dict[str, Spec]:
        found = {"weight": Spec(self.shape, torch.float32, "latent")}
        if self.config.train_output_scale:
            found[GAIN] = Spec(self.shape[:1], torch.float32, "scale")
        return found

    def start(self, weight: Tensor, statistics: Statistics) -> dict[str, Tensor]:
        if not self.config.train_output_scale:
            return {"weight": weight}
        states = project(weight.float(), self, statistics.energy)
        scales = decode_scale(states["output_scales"], states["output_scale_base"], OUTPUT_MANTISSA)
        return {"weight": weight, GAIN: scales.log() if self.blocks else torch.zeros_like(scales)}

    def state_specs(self) -> dict[str, Spec]:
        empty = self.state_tensors("meta")
        return {name: Spec(tuple(tensor.shape), tensor.dtype, "state") for name, tensor in empty.items()}

    def encode(
        self,
        latents: Mapping[str, Tensor],
        energy: Tensor | None = None,
        *,
        decode_dtype: torch.dtype | None = None,
        before: Mapping[str, Tensor] | None = None,
        memory: Tensor | None = None,
    ) -> Encoded:
        latent, gain = latents["weight"], latents.get(GAIN)
        device = latent.device
        winners = self._room_for_winners(device)
        sums = torch.empty(2, self.shape[1], device=device)
        dtype = decode_dtype or torch.bfloat16  # of what is dropped: the least to write
        scales = None if gain is None else gain.detach().exp()
        states, decoded = project_query(
            latent, self, energy, dtype=dtype, winners=winners, sums=sums, output_scale=scales
        )
        old, now = memory, winners
        if winners is None:
            old, now = None if before is None else before["codes"], states["codes"]
        change = torch.zeros((), device=device)
        if old is not None and now is not None:
            change = (now != old).sum() / max(now.numel(), 1)
        weights = torch.ones(self.shape[1], device=device) if energy is None else energy
        error, total = sums @ weights
        kept = decoded if decode_dtype is not None else None
        return Encoded(states, kept, change, error / total.clamp_min(1e-30), winners)

    def recall(self, latents: Mapping[str, Tensor], energy: Tensor | None = None) -> Tensor | None:
        winners = self._room_for_winners(latents["weight"].device)
        if winners is not None:
            project(latents["weight"], self, energy, winners=winners)
        return winners

    def _room_for_winners(self, device: torch.device) -> Tensor | None:
        if not self.operator.keeps_member:
            return None
        return torch.zeros(self.num_states, dtype=torch.int16, device=device)

    def decode(self, states: Mapping[str, Tensor], dtype: torch.dtype = torch.float32) -> Tensor:
        return query(dict(states), self, dtype)

    def linear(
        self,
        x: Tensor,
        states: Mapping[str, Tensor],
        latents: Mapping[str, Tensor],
        bias: Tensor | None = None,
        *,
        decoded: Tensor | None = None,
    ) -> Tensor:
        if decoded is not None:
            y = super().linear(x, states, latents, bias, decoded=decoded)
        else:
            y = sketch_linear(x, dict(states), self, bias, weight=latents.get("weight"))
        gain = latents.get(GAIN)
        return y if gain is None or not gain.requires_grad else scale_gradient(y, gain, bias)

    def expanded_bytes(self) -> int | None:
        return sketch_planes_bytes(self)

    def expand(self, states: Mapping[str, Tensor]) -> Expanded:
        return Expanded(sketch_planes(dict(states), self))

    @property
    def spreads(self) -> bool:
        return self.config.straight_through == "state"

    def spread_(self, gradients: Mapping[str, Tensor], states: Mapping[str, Tensor]) -> None:
        state_gradient_(gradients["weight"], self, dict(states))

    def pack(self, states: Mapping[str, Tensor]) -> Tensor:
        return pack_layer(self, dict(states))

    def unpack(self, packed: Tensor) -> dict[str, Tensor]:
        return packed_states(packed, self)

    def sections(self) -> dict[str, int]:
        return self.bit_breakdown()

    def facts(self) -> dict[str, Fact]:
        fewest, mean, most = self.load()
        return {
            "states": Fact(self.num_states, "states"),
            "states_per_weight": Fact(self.num_states / (self.shape[0] * self.shape[1]), drawn=True),
            "channels_with_states": Fact(self.num_active / self.shape[1], drawn=True),
            "occupancy": Fact(self.occupancy(), least=0.98),
            "load_min": Fact(fewest, "weights per state"),
            "load_mean": Fact(mean, "weights per state"),
            "load_max": Fact(most, "weights per state"),
            "classes": Fact(_classes_in_words(self)),
        }

    def channel_rates(self) -> Tensor:
        rates = torch.zeros(self.shape[1], dtype=torch.float64)
        for block in self.blocks:
            rates[block.channels] = block.states_per_channel * block.choice.bits / self.shape[0]
        return rates

    def normalised_codes(self, states: Mapping[str, Tensor]) -> Tensor:
        codes = states["codes"]
        parts = [
            codes[block.first_state : block.first_state + block.num_states].float() / largest_code(block.choice.bits)
            for block in self.blocks
        ]
        return torch.cat(parts) if parts else codes.float()


class SketchCompressor(Compressor):
    """The sketch with its configuration."""

    method: ClassVar[str] = "sketch"
    needs: ClassVar[frozenset[str]] = frozenset({"energy"})
    later_options: ClassVar[Mapping[str, Any]] = {"train_output_scale": False}
    Options: ClassVar[type[Any]] = SketchConfig
    options: SketchConfig

    @property
    def format(self) -> dict[str, Any]:
        return {key: getattr(self.options, key) for key in FORMAT_KEYS} | {"hash_version": HASH_VERSION}

    @classmethod
    def from_format(cls, stored: Mapping[str, Any], options: Mapping[str, Any]) -> SketchCompressor:
        known = ("hash_version", *FORMAT_KEYS)
        if missing := [key for key in known if key not in stored]:
            raise ValueError(f"{missing[0]}: is missing")
        if unknown := [key for key in stored if key not in known]:
            raise ValueError(f"{ascii(unknown[0])[:80]}: is unknown; upgrade usllm to read the model")
        version = stored["hash_version"]
        if type(version) is not int or version != HASH_VERSION:
            raise ValueError(
                f"hash_version={ascii(version)[:80]}: this version of usllm reads {HASH_VERSION}; upgrade usllm"
            )
        fields = {field.name: field for field in dataclasses.fields(SketchConfig)}
        for key in FORMAT_KEYS:
            if type(stored[key]) is not type(fields[key].default):
                raise ValueError(f"{key}={ascii(stored[key])[:80]}: has the wrong type")
        given = {key: value for key, value in options.items() if key in fields and key not in FORMAT_KEYS}
        try:
            return cls(SketchConfig(**given, **{key: stored[key] for key in FORMAT_KEYS}))
        except (TypeError, OverflowError) as error:
            raise ValueError(str(error)) from error

    def least_bits(self, shape: tuple[int, int]) -> int:
        return bit_range(shape, self.options)[0]

    def most_bits(self, shape: tuple[int, int]) -> int:
        return bit_range(shape, self.options)[1]

    def plan(self, shape: tuple[int, int], name: str, statistics: Statistics, bits: int) -> SketchPlan:
        energy, of_weights = statistics.energy, statistics.weight_energy
        return computing(build_plan(shape, energy, self.options, name, weight_energy=of_weights, budget_bits=bits))

    def restore(self, tensors: Mapping[str, Tensor], shape: tuple[int, int], name: str) -> SketchPlan:
        return computing(Plan.from_tensors(tensors, shape, self.options, name))

    def read(self, packed: Tensor, shape: tuple[int, int], name: str) -> SketchPlan:
        return computing(read_plan(packed, shape, self.options, name))

    def byte_bounds(self, shape: tuple[int, int]) -> tuple[int, int]:
        weights = shape[0] * shape[1]
        least = (HEADER_BITS + CLASS_BITS) // 8
        if weights > 1 << 20:  # small layers may be empty
            least = max(least, -(-weights // _MAX_WEIGHTS_PER_BYTE))
        return least, _MAX_BITS_PER_WEIGHT * weights // 8 + 64

    def problems(self) -> list[str]:
        problem = choice_problem(self.options)
        return [] if problem is None else [problem]


def computing(plan: Plan) -> SketchPlan:
    """The plan as one that a layer computes with."""
    return SketchPlan(plan.name, plan.shape, plan.config, plan.classes, plan.channel_class)


def _classes_in_words(plan: Plan) -> str:
    """Such as ``384 x (1 row, 64 states, 4 bits), 192 empty``."""
    channels = torch.bincount(plan.channel_class.long(), minlength=len(plan.classes)).tolist()
    words = [
        f"{count} x ({choice.rows} row{'s' * (choice.rows > 1)}, {choice.states} states, {choice.bits} bits)"
        if choice.rows
        else f"{count} empty"
        for choice, count in zip(plan.classes, channels, strict=True)
    ]
    return ", ".join(words)


COMPRESSOR = SketchCompressor
