"""The sketch in output order: its states, looked up once, as bit planes."""

from __future__ import annotations

import torch
from torch import Tensor

from usllm.sketch import Plan
from usllm.sketch.classes import ChannelClass
from usllm.sketch.codec import States, channel_scales
from usllm.sketch.quantize import largest_code
from usllm.sketch.scale import OUTPUT_MANTISSA, decode_scale
from usllm_kernels.compiled_operators import supports
from usllm_kernels.ops.plane_words.op import make_planes
from usllm_kernels.ops.query.op import query
from usllm_kernels.planes import Levels, Planes, planes_bytes

_WIDEST = 8  # bits of a code


def sketch_planes_bytes(plan: Plan) -> int | None:
    """Memory of :func:`sketch_planes`; ``None`` where there is nothing to store, or codes are too wide or unknown."""
    if supports(plan) is not None or not plan.blocks:  # an operator of somebody else may join rows to anything
        return None
    widths = _channels_by_levels(plan)
    if max(levels.bits for levels in widths) > _WIDEST:
        return None
    return sum(planes_bytes(plan.shape[0], len(channels), levels) for levels, channels in widths.items())


@torch.no_grad()
def sketch_planes(states: States, plan: Plan) -> list[Planes]:
    """Planes of all channels that store something, one for each width of codes.

    A decoded weight is one whole number times its channel's scale, whatever the operator and the number of rows: the
    mean of several rows is a sum of codes, and its scale is divided by their number.

    Args:
        states: Of the plan, packed or not.
        plan: One that :func:`sketch_planes_bytes` has a size for.
    """
    device = states["codes"].device
    units = {**states, **_units(states["scales"], "scale_base", "scales")}
    factors = None
    if plan.config.output_scale:
        outputs = states["output_scales"]
        factors = decode_scale(outputs, states["output_scale_base"], OUTPUT_MANTISSA)[:, None]
        units |= _units(outputs, "output_scale_base", "output_scales")
    codes, scales = query(units, plan), channel_scales(states, plan)
    if plan.divisors is not None:
        codes[:, plan.channel_order.to(device)] *= plan.divisors.to(device)
        codes.round_()  # a quotient of small numbers times its divisor
    return [
        make_planes(codes[:, channels], levels, plan.shape[1], channels, scales[channels], factors)
        for levels, channels in _channels_by_levels(plan, device).items()
    ]


def _channels_by_levels(plan: Plan, device: torch.device | str = "cpu") -> dict[Levels, Tensor]:
    found: dict[Levels, list[Tensor]] = {}
    for block in plan.blocks:
        found.setdefault(_levels(block.choice, plan), []).append(block.channels)
    return {levels: torch.cat(channels).to(device) for levels, channels in found.items()}


def _levels(choice: ChannelClass, plan: Plan) -> Levels:
    """What the joined codes of a class can be."""
    most = largest_code(choice.bits) * plan.operator.divisor(choice.rows)
    return Levels(-most, most, 2 if choice.bits == 1 else 1)


def _units(scales: Tensor, base_name: str, name: str) -> States:
    """Scales that are all 1, as states hold them."""
    one = torch.tensor([127], dtype=torch.uint8, device=scales.device)  # the exponent of 1, with a byte of 0 above it
    return {base_name: one, name: torch.zeros_like(scales)}
