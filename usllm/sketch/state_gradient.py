"""The gradient of the states, carried by the latents. The readable reference (`docs/method.md` §5).

Straight through, a latent gets the gradient of its own decoded weight, and the members of a bucket drift apart though
only their mean, or one of them, counts. Here every member gets, for each of its rows, the mean over the bucket of what
the members' decoded weights ask of that row's state: the states are trained, and the latents carry them.

A decoded weight is ``code of the row that the query took · channel scale · output scale``, or the mean over the rows.
The derivative by a row's state is therefore 1 or 0, or one over the number of rows. Both scales are left out: they
belong to the units of the state, not of the latent, whose size a learning rate belongs to.
"""

from __future__ import annotations

import torch
from torch import Tensor

from usllm.sketch.codec import States, check_shape, group_states, layout_parts, rows_with_states
from usllm.sketch.operators.base import in_order
from usllm.sketch.plan import Plan
from usllm.sketch.rotation import chunks, rotate, unrotate_


@torch.no_grad()
def state_gradient_(gradient: Tensor, plan: Plan, states: States) -> Tensor:
    """Straight-through gradients, each replaced by that of its states; linear in them.

    Args:
        gradient: Of the decoded weight, fp32 [out, in], overwritten. Channels that store nothing get 0.
        plan: The layer's plan.
        states: Of the plan, those that the weight was decoded from; ``codes`` alone are read, where several rows are.

    Returns:
        ``gradient``.

    Raises:
        ValueError: If the gradient's shape is not the plan's.
    """
    check_shape(gradient, plan)
    if not plan.blocks:
        return gradient.zero_()
    operator, device = plan.operator, gradient.device
    codes = operator.encode_codes(states["codes"], plan.config.query)
    for span, rotation in chunks(plan):
        n = span.size
        held = rows_with_states(plan, span, device)
        members = rotate(gradient, span, rotation, plan.rotation_step).index_select(0, held).t()
        joined = []
        for block, first, column in layout_parts(plan, span):
            buckets, slots, load = (index.to(device).long() for index in plan.placement(block.choice, n))
            rows, depth, k = slots.shape
            columns = len(block.channels) * span.groups
            asked = gradient.new_zeros(rows, n + 1, columns)  # the last one for slots of buckets that are one short
            asked[:, :n] = members[:, column : column + columns]
            if rows > 1:
                stored = group_states(codes, block, first, span.groups, rows, k).permute(2, 3, 0, 1).flatten(2)
                candidates = stored.gather(1, buckets[..., None].expand(rows, n, columns))
                asked[:, :n] *= operator.derivative(candidates)
                asked /= operator.divisor(rows)
            gathered = asked.gather(1, slots.view(rows, -1, 1).expand(-1, -1, columns)).view(rows, depth, k, columns)
            means = in_order(gathered) / load.clamp_min(1)[..., None]
            joined.append(in_order(means.gather(1, buckets[..., None].expand(rows, n, columns))[None])[0])
        spread = gradient.new_zeros(span.groups * plan.shape[1], n)
        spread[held] = torch.cat(joined, 1).t()
        unrotate_(spread, gradient, span, rotation, plan.rotation_step)
    return gradient
