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

from usllm.sketch.layout import Span
from usllm.sketch.plan import ClassBlock, Plan
from usllm.sketch.quantize import channel_sums, quantize, scale_codes
from usllm.sketch.rotation import chunks, rotate, unrotate_
from usllm.sketch.scale import CHANNEL_MANTISSA, OUTPUT_MANTISSA, base_exponent, decode_scale, encode_scale

States = dict[str, Tensor]


@torch.no_grad()
def project(
    weight: Tensor,
    plan: Plan,
    second_moment: Tensor | None = None,
    *,
    winners: Tensor | None = None,
    output_scale: Tensor | None = None,
) -> States:
    """States of a latent weight (insert).

    Args:
        weight: [out, in], any float dtype; computed in fp32.
        plan: The layer's plan.
        second_moment: E[a²] per input channel, [in]: weights the fit of the output scale, if the plan has one.
        winners: int16 [states], written: the rotated position within its group of the member that each state keeps.
            Only for operators that keep a member; states without one are left at 0.
        output_scale: [out], stored where the plan has an output scale; ``None`` fits it.

    Raises:
        ValueError: If the weight's shape is not the plan's.
    """
    check_shape(weight, plan)
    values = _bucket_values(weight.detach().float(), plan, winners)
    states = plan.state_tensors(weight.device)
    if not plan.blocks:
        return states
    scales = store_scales(states, plan, values).split([len(block.channels) for block in plan.blocks])
    for block, scale in zip(plan.blocks, scales, strict=True):
        codes = quantize(_of(values, block), scale[:, None], block.choice.bits, plan.config.rounding)
        _of(states["codes"], block).copy_(codes)
    if plan.config.output_scale:
        if output_scale is None:
            decoded = _query_unscaled(states, plan)
            output_scale = best_output_scale(*output_sums(weight.detach().float(), decoded, second_moment))
        store_output_scales(states, output_scale)
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
    value = decode_scale(states["scales"], states["scale_base"], CHANNEL_MANTISSA)
    if plan.divisors is not None:
        value = value / plan.divisors.to(device)
    return value.new_zeros(plan.shape[1]).index_copy_(0, plan.channel_order.to(device), value)


def _bucket_values(weight: Tensor, plan: Plan, winners: Tensor | None) -> Tensor:
    """fp32 values of the states before quantisation, [states]."""
    operator, device = plan.operator, weight.device
    flat = torch.empty(0, dtype=torch.float32, device=device)
    for span, rotation in chunks(plan):
        encoded = operator.encode(rotate(weight, span, rotation, plan.rotation_step)).index_select(
            0, rows_with_states(plan, span, device)
        )
        if not len(flat):
            flat = encoded.new_empty(plan.num_states)
        members = encoded.new_empty(span.size + 1, len(encoded))
        members[:-1] = encoded.t()
        members[-1] = operator.pad
        for block, first, column in layout_parts(plan, span):
            _, slots, load = (index.to(device) for index in plan.placement(block.choice, span.size))
            rows, depth, states = slots.shape
            columns = len(block.channels) * span.groups
            gathered = members[:, column : column + columns].index_select(0, slots.flatten().int())
            gathered = gathered.view(rows, depth, states, columns)
            where = block, first, span.groups, rows, states
            _put(flat, operator.reduce(gathered, load[..., None]), *where)
            if winners is not None:
                member = slots[..., None].expand_as(gathered).gather(1, gathered.argmin(1, keepdim=True))[:, 0]
                _put(winners, member.masked_fill(load[..., None] == 0, 0), *where)
    return _occupied(operator.decode(flat), plan)


def _occupied(values: Tensor, plan: Plan) -> Tensor:
    """0 for states without a member, which a random hash leaves."""
    return values.nan_to_num_(0.0) if plan.has_empty_states else values


def _query_unscaled(states: States, plan: Plan) -> Tensor:
    operator, device = plan.operator, states["codes"].device
    if not plan.blocks:
        return torch.zeros(plan.shape, dtype=torch.float32, device=device)
    decoded = torch.empty(plan.shape, dtype=torch.float32, device=device)
    encoded = operator.encode_codes(states["codes"], plan.config.query)
    for span, rotation in chunks(plan):
        n = span.size
        joined = []
        for block, first, _ in layout_parts(plan, span):
            buckets = plan.placement(block.choice, n).buckets.to(device).int()
            rows, k = block.choice.rows, min(block.choice.states, n)
            stored = group_states(encoded, block, first, span.groups, rows, k)
            by_bucket = stored.permute(2, 3, 0, 1).contiguous().view(rows * k, -1)
            if rows > 1:
                buckets = buckets + torch.arange(0, rows * k, k, dtype=torch.int32, device=device)[:, None]
            candidates = by_bucket.index_select(0, buckets.flatten()).view(rows, n, -1)
            joined.append(operator.combine(candidates))
        values = operator.decode_codes(torch.cat(joined, 1), plan.config.query)
        columns = values.new_zeros(values.shape[1] + 1, n)  # the last one for channels without states
        columns[:-1] = values.t()
        source = torch.full((span.groups * plan.shape[1],), len(columns) - 1, device=device)
        rows_held = rows_with_states(plan, span, device)
        source[rows_held] = torch.arange(len(rows_held), device=device)
        unrotate_(columns.index_select(0, source), decoded, span, rotation, plan.rotation_step)
    return decoded.mul_(channel_scales(states, plan))


def _put(flat: Tensor, reduced: Tensor, block: ClassBlock, first: int, groups: int, rows: int, states: int) -> None:
    """Store [rows, states, channels * groups] where :func:`group_states` finds it."""
    by_channel = reduced.view(rows, states, len(block.channels), groups).permute(2, 3, 0, 1)
    group_states(flat, block, first, groups, rows, states).copy_(by_channel)


def rows_with_states(plan: Plan, span: Span, device: torch.device) -> Tensor:
    """Rows of a rotated span by class, channel, group, int64 [channels with states * groups]."""
    groups = torch.arange(0, span.groups * plan.shape[1], plan.shape[1])
    return (plan.channel_order[:, None] + groups).flatten().to(device)


def layout_parts(plan: Plan, span: Span) -> Iterator[tuple[ClassBlock, int, int]]:
    """The blocks with the first state of the span in a channel, and the block's first column among the span's rows."""
    column = 0
    for block in plan.blocks:
        first = 0
        for before in plan.spans:
            groups = min(max(span.first_group - before.first_group, 0), before.groups)
            first += groups * block.choice.rows * min(block.choice.states, before.size)
        yield block, first, column
        column += len(block.channels) * span.groups


def _of(flat: Tensor, block: ClassBlock) -> Tensor:
    """A block's part of the states, view [channels, states per channel]."""
    return flat[block.first_state : block.first_state + block.num_states].view(len(block.channels), -1)


def group_states(flat: Tensor, block: ClassBlock, first: int, groups: int, rows: int, states: int) -> Tensor:
    """A block's states in some of its groups, view [channels, groups, rows, states] from its ``first`` state on."""
    return _of(flat, block)[:, first : first + groups * rows * states].unflatten(1, (groups, rows, states))


def store_scales(states: States, plan: Plan, values: Tensor) -> Tensor:
    """Choose every channel's scale and store it.

    Args:
        states: Their ``scales`` and ``scale_base`` are written.
        plan: A plan with states.
        values: Of the states before quantisation, fp32 [states].

    Returns:
        The scales as they will be decoded, fp32 [channels with states].
    """
    sums = [channel_sums(_of(values, block)) for block in plan.blocks]
    base = base_exponent(torch.stack([of_block.largest.amax() for of_block in sums]).amax(), CHANNEL_MANTISSA)
    codes = [
        scale_codes(_of(values, block), of_block, base, block.choice.bits, plan.config.rounding)
        for block, of_block in zip(plan.blocks, sums, strict=True)
    ]
    states["scale_base"], states["scales"] = base, torch.cat(codes)
    return decode_scale(states["scales"], states["scale_base"], CHANNEL_MANTISSA)


def output_sums(weight: Tensor, decoded: Tensor, second_moment: Tensor | None) -> tuple[Tensor, Tensor]:
    """What the least-squares scale of each output row is the quotient of, float64 [out] each.

    Terms are fp32 and their sums 64 bits wide, so that the order of summation hardly ever shows in an 8-bit scale.

    Args:
        weight: [out, in].
        decoded: What the states decode to without output scales, fp32 [out, in].
        second_moment: E[a²] per input channel, [in]; ``None`` takes all as equal.

    Returns:
        ``Σ_c E[a_c²] ŵ_c w_c`` and ``Σ_c E[a_c²] ŵ_c²``.
    """
    weighted = decoded if second_moment is None else decoded * second_moment.to(decoded)
    return (weighted * weight).sum(1, dtype=torch.float64), (weighted * decoded).sum(1, dtype=torch.float64)


def best_output_scale(product: Tensor, square: Tensor) -> Tensor:
    """Scales of least squared error, fp32 [out], from :func:`output_sums`.

    A scale is 1 where there is nothing to scale, or where the sums are beyond what their terms hold.
    """
    usable = (square > 0) & product.isfinite() & square.isfinite()
    return torch.where(usable, product / square, 1.0).float()


def store_output_scales(states: States, scale: Tensor) -> None:
    """Write ``output_scales`` and ``output_scale_base``, what is stored of positive scales [out]."""
    scale = scale.detach().float().clamp(2.0**-20, 2.0**20)
    states["output_scale_base"] = base_exponent(scale.amax(), OUTPUT_MANTISSA)
    states["output_scales"] = encode_scale(scale, states["output_scale_base"], OUTPUT_MANTISSA)


def check_shape(weight: Tensor, plan: Plan) -> None:
    """Refuse a weight that the plan was not made for."""
    if tuple(weight.shape) != plan.shape:
        raise ValueError(f"{plan.name}: weight has shape {tuple(weight.shape)}, its plan {plan.shape}")
