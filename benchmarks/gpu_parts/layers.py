"""Layers of real models' shapes with random weights, and everything that the measurements want of them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from benchmarks.gpu_parts.timing import Clock
from usllm.packed.layer import pack_layer
from usllm.sketch import Plan, SketchConfig, States, build_plan
from usllm_kernels import packed_states, project

# Output rows and input channels of q, k, gate and down; o is not compressed, v and up are k and gate again.
SHAPES: dict[str, dict[str, tuple[int, int]]] = {
    "1b": {"q": (2048, 2048), "k": (512, 2048), "gate": (8192, 2048), "down": (2048, 8192)},
    "8b": {"q": (4096, 4096), "k": (1024, 4096), "gate": (14336, 4096), "down": (4096, 14336)},
}
SMALL: dict[str, dict[str, tuple[int, int]]] = {"small": {"gate": (40, 16), "down": (16, 40)}}

SIGN = SketchConfig(
    bits_per_weight=0.5,
    operator="mean",
    rows=1,
    state_bits=1,
    allocation="waterfill",
    price_list="trained",
    output_scale=True,
    train_output_scale=True,
    straight_through="state",
    rounding="nearest",
)
# The recipe's sketch, the paper's and its cheapest form, and the one of least error untrained.
SKETCHES = {
    "sign": SIGN,
    "absmaxmin-r1": SketchConfig(bits_per_weight=0.5, rows=1),
    "absmaxmin-r3": SketchConfig(bits_per_weight=0.5, rows=3),
    "waterfill": SketchConfig(bits_per_weight=0.5, allocation="waterfill", output_scale=True, rounding="nearest"),
}
# On small layers the tables alone take more than half a bit; the interpreter is slow with every row.
SMALL_SKETCHES = {
    "sign": replace(SIGN, bits_per_weight=12.0),
    "absmaxmin-r3": SketchConfig(bits_per_weight=12.0, rows=2, allocation="uniform"),
}


@dataclass(frozen=True)
class Layer:
    """One layer in copies that no cache holds together.

    Attributes:
        plan: Of all of them.
        weights: fp32 latent weights [out, in].
        states: Unpacked.
        packed: As they lie in a packed layer.
        dense: bf16 weights that the states decode to.
    """

    plan: Plan
    weights: list[Tensor]
    states: list[States]
    packed: list[States]
    dense: list[Tensor]


def make_layer(shape: tuple[int, int], config: SketchConfig, clock: Clock) -> Layer:
    """A layer of random weights, planned by uneven importance: a few channels hold most of the energy."""
    from usllm_kernels import query

    generator = torch.Generator().manual_seed(0)
    importance = torch.rand(shape[1], generator=generator) ** 8 + 1e-3
    weight = torch.randn(shape, generator=generator).to(clock.device)
    plan = build_plan(shape, importance, config, f"layer {shape}")
    states = project(weight, plan)
    packed = pack_layer(plan, {name: value.cpu() for name, value in states.items()}).to(clock.device)
    return Layer(
        plan=plan,
        weights=clock.copies(weight),
        states=[_cloned(states) for _ in clock.copies(states["codes"])],
        packed=[packed_states(copy, plan) for copy in clock.copies(packed)],
        dense=clock.copies(query(states, plan, torch.bfloat16)),
    )


def _cloned(states: States) -> States:
    return {name: value.clone() for name, value in states.items()}
