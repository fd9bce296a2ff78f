"""The sketch in output order: its states, looked up once, as signs."""

from __future__ import annotations

import torch
from torch import Tensor

from usllm.sketch import Plan
from usllm.sketch.classes import ChannelClass
from usllm.sketch.codec import States, channel_scales
from usllm.sketch.quantize import largest_code
from usllm.sketch.scale import OUTPUT_MANTISSA, decode_scale
from usllm_kernels.compiled_operators import supports
from usllm_kernels.ops.plane_words.op import Codes, make_planes
from usllm_kernels.ops.query.op import query
from usllm_kernels.planes import Levels, Planes, planes_bytes

_WIDEST = 8  # bits of a code


def sketch_planes_bytes(plan: Plan) -> int | None:
    """Memory of :func:`sketch_planes`; ``None`` where the plan has none.

    That is where nothing is stored, codes are too wide, or a weight is no whole number times its scale: a mean of
    several rows is a quotient, and an operator of somebody else may join rows to anything.
    """
    if supports(plan) is not None or not plan.blocks or plan.divisors is not None:
        return None
    widths = _channels_by_levels(plan)
    if max(levels.bits for levels in widths) > _WIDEST:
        return None
    return planes_bytes(plan.shape[0], [(len(channels), levels) for levels, channels in widths.items()])


@torch.no_grad()
def sketch_planes(states: States, plan: Plan) -> Planes:
    """Planes of all channels that store something: a decoded weight is one code times its channel's scale.

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
    widths = [
        Codes(codes.index_select(1, channels), levels, channels, scales[channels])
        for levels, channels in _channels_by_levels(plan, device).items()
    ]
    return make_planes(widths, plan.shape[1], factors)


def _channels_by_levels(plan: Plan, device: torch.device | str = "cpu") -> dict[Levels, Tensor]:
    found: dict[Levels, list[Tensor]] = {}
    for block in plan.blocks:
        found.setdefault(_levels(block.choice), []).append(block.channels)
    return {levels: torch.cat(channels).to(device) for levels, channels in found.items()}


def _levels(choice: ChannelClass) -> Levels:
    """What the joined codes of a class can be."""
    most = largest_code(choice.bits)
    return Levels(-most, most, 2 if choice.bits == 1 else 1)


def _units(scales: Tensor, base_name: str, name: str) -> States:
    """Scales that are all 1, as states hold them."""
    one = torch.tensor([127], dtype=torch.uint8, device=scales.device)  # the exponent of 1, with a byte of 0 above it
    return {base_name: one, name: torch.zeros_like(scales)}
