"""Projection (insert) and query: latent weight -> states -> decoded weight. The readable reference of both.

States are a dictionary of tensors, named and shaped by :meth:`Plan.state_tensors`:

``codes``              int8 or int16 [states], ordered by class, channel, group, row, bucket
``scales``             uint8 [channels with states], ordered by class, channel (:mod:`usllm.sketch.scale`)
``scale_base``         uint8 [1]
``output_scales``      uint8 [out], where asked for
``output_scale_base``  uint8 [1], likewise
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from usllm.sketch.blocks import chunks, rotate, unrotate_
from usllm.sketch.layout import Span
from usllm.sketch.plan import ClassBlock, Plan
from usllm.sketch.quantize import best_scale, quantize
from usllm.sketch.scale import CHANNEL_MANTISSA, OUTPUT_MANTISSA, base_exponent, decode_scale, encode_scale

States = dict[str, Tensor]


@torch.no_grad()
def project(weight: Tensor, plan: Plan, moment: Tensor | None = None) -> States:
    """States of a latent weight (insert).

    Args:
        weight: [out, in], any float dtype; computed in fp32.
        plan: The layer's plan.
        moment: E[a²] per input channel, [in]: weights the fit of the output scale, if the plan has one.

    Raises:
        ValueError: If the weight's shape is not the plan's.
    """
    _check_shape(weight, plan)
    values = _bucket_values(weight.detach().float(), plan)
    states = plan.state_tensors(weight.device)
    if not plan.blocks:
        return states
    rounding = plan.config.rounding
    best = [best_scale(v, b.choice.bits, rounding) for b, v in zip(plan.blocks, values, strict=True)]
    largest = torch.stack([scale.amax() for scale in best]).amax()
    states["scale_base"] = base_exponent(largest, CHANNEL_MANTISSA)
    first = 0
    for block, block_values, scale in zip(plan.blocks, values, best, strict=True):
        bits = block.choice.bits
        # A scale that clips nothing must not round down to one that does.
        stored = encode_scale(scale, states["scale_base"], CHANNEL_MANTISSA, up=bits >= 8)
        scale = decode_scale(stored, states["scale_base"], CHANNEL_MANTISSA)
        codes = quantize(block_values, scale[:, None], bits, rounding)
        states["codes"][block.first_state : block.first_state + block.num_states].view_as(codes).copy_(codes)
        states["scales"][first : first + len(stored)] = stored
        first += len(stored)
    if plan.config.output_scale:
        _fit_output_scales(weight, states, plan, moment)
    return states


@torch.no_grad()
def query(states: States, plan: Plan) -> Tensor:
    """Decoded weight, fp32 [out, in], on the device of the states."""
    decoded = _query_unscaled(states, plan)
    if plan.config.output_scale:
        scale = decode_scale(states["output_scales"], states["output_scale_base"], OUTPUT_MANTISSA)
        decoded.mul_(scale[:, None])
    return decoded


def channel_scales(states: States, plan: Plan) -> Tensor:
    """What one code unit is worth in each channel, fp32 [in]; 0 for channels without states."""
    device = states["codes"].device
    scales = torch.zeros(plan.shape[1], device=device)
    first = 0
    for block in plan.blocks:
        codes = states["scales"][first : first + len(block.channels)]
        value = decode_scale(codes, states["scale_base"], CHANNEL_MANTISSA)
        scales[block.channels.to(device)] = value / plan.operator.divisor(block.choice.rows)
        first += len(block.channels)
    return scales


def _bucket_values(weight: Tensor, plan: Plan) -> list[Tensor]:
    """fp32 values of the states before quantisation, one [channels, states per channel] for each block."""
    operator, device = plan.operator, weight.device
    flat = torch.empty(0, device=device)
    for span, rotation in chunks(plan):
        encoded = operator.encode(rotate(weight, span, rotation)).index_select(0, _rows(plan, span, device))
        if not len(flat):
            flat = encoded.new_empty(plan.num_states)
        members = encoded.new_empty(span.size + 1, len(encoded))
        members[:-1] = encoded.t()
        members[-1] = operator.pad
        for block, first, column in _parts(plan, span):
            _, slots, load = (index.to(device).int() for index in plan.placement(block.choice, span.size))
            rows, depth, states = slots.shape
            columns = len(block.channels) * span.groups
            gathered = members[:, column : column + columns].index_select(0, slots.flatten())
            reduced = operator.reduce(gathered.view(rows, depth, states, columns), load[..., None])
            target = _states(flat, block, first, span.groups, rows, states)
            target.copy_(reduced.view(rows, states, len(block.channels), span.groups).permute(2, 3, 0, 1))
    values = operator.decode(flat)
    if plan.config.hash == "uniform":  # a random hash leaves states without a member
        values = values.nan_to_num_(0.0)
    return [values[b.first_state : b.first_state + b.num_states].view(len(b.channels), -1) for b in plan.blocks]


def _query_unscaled(states: States, plan: Plan) -> Tensor:
    operator, device = plan.operator, states["codes"].device
    decoded = torch.empty(plan.shape, device=device)
    if not plan.blocks:
        return decoded.zero_()
    encoded = operator.encode_codes(states["codes"], plan.config.query)
    for span, rotation in chunks(plan):
        n = span.size
        joined = []
        for block, first, _ in _parts(plan, span):
            buckets = plan.placement(block.choice, n).buckets.to(device).int()
            rows, k = block.choice.rows, min(block.choice.states, n)
            stored = _states(encoded, block, first, span.groups, rows, k)
            by_bucket = stored.permute(2, 3, 0, 1).reshape(rows * k, -1)
            if rows > 1:
                buckets = buckets + torch.arange(0, rows * k, k, dtype=torch.int32, device=device)[:, None]
            candidates = by_bucket.index_select(0, buckets.flatten()).view(rows, n, -1)
            joined.append(operator.combine(candidates))
        values = operator.decode_codes(torch.cat(joined, 1), plan.config.query)
        twice = torch.zeros(span.groups * plan.shape[1] + 1, 2 * n, dtype=values.dtype, device=device)
        twice[:, :n].index_copy_(0, _rows(plan, span, device), values.t().contiguous())
        twice[:, n:] = twice[:, :n]
        unrotate_(twice, decoded, span, rotation)
    return decoded.mul_(channel_scales(states, plan))


def _rows(plan: Plan, span: Span, device: torch.device) -> Tensor:
    """Rows of a rotated span by class, channel, group, int64 [channels with states * groups]."""
    groups = torch.arange(0, span.groups * plan.shape[1], plan.shape[1])
    return (plan.channel_order[:, None] + groups).flatten().to(device)


def _parts(plan: Plan, span: Span) -> Iterator[tuple[ClassBlock, int, int]]:
    """The blocks with the first state of the span in a channel, and the block's first column among the span's rows."""
    column = 0
    for block in plan.blocks:
        first = 0
        for before in plan.spans:
            groups = min(max(span.first_group - before.first_group, 0), before.groups)
            first += groups * block.choice.rows * min(block.choice.states, before.size)
        yield block, first, column
        column += len(block.channels) * span.groups


def _states(flat: Tensor, block: ClassBlock, first: int, groups: int, rows: int, states: int) -> Tensor:
    """A block's states in some of its groups, view [channels, groups, rows, states] from its ``first`` state on."""
    stored = flat[block.first_state : block.first_state + block.num_states].view(len(block.channels), -1)
    return stored[:, first : first + groups * rows * states].unflatten(1, (groups, rows, states))


def _fit_output_scales(weight: Tensor, states: States, plan: Plan, moment: Tensor | None) -> None:
    """Least-squares scale per output row, in the norm of the input's second moment."""
    decoded = _query_unscaled(states, plan)
    weighted = decoded if moment is None else decoded * moment.to(decoded)
    product = (weighted * weight).sum(1)
    square = (weighted * decoded).sum(1)
    scale = torch.where(square > 0, product / square, 1.0).clamp_min(2.0**-20)
    states["output_scale_base"] = base_exponent(scale.amax(), OUTPUT_MANTISSA)
    states["output_scales"] = encode_scale(scale, states["output_scale_base"], OUTPUT_MANTISSA)


def _check_shape(weight: Tensor, plan: Plan) -> None:
    if tuple(weight.shape) != plan.shape:
        raise ValueError(f"{plan.name}: weight has shape {tuple(weight.shape)}, its plan {plan.shape}")
