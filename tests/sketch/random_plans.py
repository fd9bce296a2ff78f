"""Layers to plan at random, drawn from the registries, and what every plan of them must keep."""

from __future__ import annotations

import random
import re
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from usllm.sketch import Plan, SketchConfig, bit_range, build_plan
from usllm.sketch.allocation import ALLOCATIONS
from usllm.sketch.bits import available_bits
from usllm.sketch.classes import MAX_CLASSES
from usllm.sketch.config import PRICE_LISTS, STATE_BITS
from usllm.sketch.hash import HASHES
from usllm.sketch.layer_bytes import pack_layer, read_plan
from usllm.sketch.layout import states_per_channel
from usllm.sketch.operators import OPERATORS

LARGE_LAYER = 1 << 16  # weights
USED = 0.98
IMPORTANCES = ("equal", "nearly equal", "uniform", "heavy", "one", "zero", "many octaves")


class Layer(NamedTuple):
    """A layer to plan: shape ``(out, in)``, E[a²] [in], configuration."""

    shape: tuple[int, int]
    importance: Tensor
    config: SketchConfig


def importance_of(kind: str, channels: int, generator: torch.Generator) -> Tensor:
    """E[a²] of one of :data:`IMPORTANCES`, [channels]."""
    drawn = torch.rand(channels, generator=generator)
    one = torch.zeros(channels)
    one[0] = 1e6
    values = torch.ones(channels), 1 + 1e-3 * drawn, drawn, drawn**8 + 1e-4, one + 1, 0 * drawn, 10 ** (12 * drawn - 6)
    return dict(zip(IMPORTANCES, values, strict=True))[kind]


def random_layer(seed: int) -> Layer:
    """A layer of any shape and configuration; every fourth has more than 64 Ki weights."""
    draw = random.Random(seed)
    out_features, in_features = int(2 ** draw.uniform(0, 9)), int(2 ** draw.uniform(1, 9))
    if seed % 4 == 0:
        out_features = draw.choice((64, 256, 576, 1024, draw.randint(40, 2000)))
        in_features = LARGE_LAYER // out_features + draw.randint(1, 400)
    allocation = draw.choice(list(ALLOCATIONS))
    price_list = draw.choice(PRICE_LISTS) if allocation == "waterfill" else PRICE_LISTS[0]
    config = SketchConfig(
        bits_per_weight=2 ** draw.uniform(-5.65, 4),
        rows=1 if price_list == "trained" else draw.choice((1, 2, 3, 3, 5, 15)),
        group_size=draw.choice((1, 5, 16, 64, 256, 512, 512, 4096)),
        operator=draw.choice(list(OPERATORS)),
        hash=draw.choice(list(HASHES)),
        state_bits=draw.choice(STATE_BITS),
        output_scale=draw.random() < 0.5,
        allocation=allocation,
        min_importance=draw.choice((0.0, 0.0, 0.1, 1.0)),
        price_list=price_list,
    )
    generator = torch.Generator().manual_seed(seed)
    return Layer((out_features, in_features), importance_of(draw.choice(IMPORTANCES), in_features, generator), config)


def plan_or_least_rate(layer: Layer) -> Plan | None:
    """The plan; ``None`` where the rate is too little, and then the rate that the message names must work.

    Raises:
        AssertionError: It does not.
    """
    try:
        return build_plan(layer.shape, layer.importance, layer.config, "layer")
    except ValueError as error:
        message = str(error)
    named = re.search(r"too little for .* take ([0-9.e+-]+)\. Raise", message)
    assert named, f"{layer}: {message}"
    least = float(named[1])
    assert least > layer.config.bits_per_weight, layer
    raised = replace(layer.config, bits_per_weight=least)
    assert build_plan(layer.shape, layer.importance, raised, "layer").num_states, layer
    return None


def check(layer: Layer, plan: Plan) -> None:
    """What a plan must keep: its ceiling, 16 classes, its own bytes, some states, and nearly all of its bits.

    Raises:
        AssertionError: It does not.
    """
    budget = layer.config.bits_per_weight * layer.shape[0] * layer.shape[1]
    assert plan.total_bits <= budget, f"{layer}: {plan.total_bits} bits of {budget}"
    assert len(plan.classes) <= MAX_CLASSES, f"{layer}: {plan.classes}"
    packed = pack_layer(plan, plan.state_tensors())
    assert len(packed) * 8 == plan.total_bits
    read = read_plan(packed, plan.shape, plan.config, plan.name)
    assert read.classes == plan.classes and torch.equal(read.channel_class, plan.channel_class), layer
    assert plan.num_states, f"{layer}: nothing is stored"
    large = layer.shape[0] * layer.shape[1] > LARGE_LAYER and layer.config.bits_per_weight >= 0.05
    if large and plan.total_bits < USED * budget:
        assert not could_hold_more(layer, plan), f"{layer}: {plan.total_bits / budget:.3f} used"


def could_hold_more(layer: Layer, plan: Plan) -> bool:
    """Whether a class more, for one channel with one state more in each group, would fit."""
    count, output_scale = len(plan.classes), layer.config.output_scale
    budget = int(layer.config.bits_per_weight * layer.shape[0] * layer.shape[1])
    room, room_beside_one_more, of_one_class = (
        available_bits(layer.shape, output_scale, classes, budget) for classes in (count, min(count + 1, 16), 1)
    )
    left = budget - plan.total_bits - (room - room_beside_one_more)
    largest = (bit_range(layer.shape, layer.config)[1] - budget + of_one_class) // layer.shape[1]
    groups = sum(span.groups for span in plan.spans)
    narrowest = min(layer.config.state_bits, 2) if layer.config.allocation != "waterfill" else 1
    for number, choice in enumerate(plan.classes):
        stored = states_per_channel(plan.spans, choice.rows, choice.states) * choice.bits + 8 * bool(choice.rows)
        step = groups * choice.rows * choice.bits if choice.rows else groups * narrowest + 8
        growing = choice.states < plan.spans[0].size and stored + step <= largest
        if growing and left >= step and bool((may_hold_states(layer) & (plan.channel_class == number)).any()):
            return True
    return False


def may_hold_states(layer: Layer) -> Tensor:
    """Channels above the threshold and of any importance, or all where none has any; bool [in]."""
    values = layer.importance.double()
    if not values.any():
        return torch.ones(len(values)) > 0
    return (values > 0) & (values >= layer.config.min_importance * values.mean())
