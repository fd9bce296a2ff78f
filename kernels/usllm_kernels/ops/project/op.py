"""Projection: latent weight -> states."""

from __future__ import annotations

import torch
from torch import Tensor

from usllm.sketch import Plan
from usllm.sketch.codec import States, check_shape
from usllm_kernels.dispatch import choose, running_on
from usllm_kernels.ops.project import reference
from usllm_kernels.plans import empty, fake_states, flatten, list_states, name_states, unflatten


def project(
    weight: Tensor,
    plan: Plan,
    moment: Tensor | None = None,
    *,
    winners: Tensor | None = None,
    backend: str | None = None,
) -> States:
    """States of a latent weight, as :func:`usllm.sketch.project` gives them, bit for bit.

    Args:
        weight: [out, in], any float dtype; computed in fp32.
        plan: The layer's plan.
        moment: E[a²] per input channel, [in]: weights the fit of the output scale, if the plan has one.
        winners: int16 [states], written: the rotated position within its group of the member that each state keeps.
        backend: See :func:`usllm_kernels.dispatch.choose`.

    Raises:
        ValueError: The weight's shape is not the plan's, or the backend cannot run.
    """
    check_shape(weight, plan)
    *states, kept = project_op(weight.detach(), moment, *flatten(plan), winners is not None, backend or "")
    if winners is not None:
        winners.copy_(kept)
    return name_states(states)


@torch.library.custom_op("usllm::project", mutates_args=())
def project_op(
    weight: Tensor,
    moment: Tensor | None,
    classes: Tensor,
    channel_class: Tensor,
    numbers: list[int],
    winners: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Codes, scales, their base, output scales, their base, winners; see :mod:`usllm_kernels.plans`."""
    plan, device = unflatten(classes, channel_class, numbers), weight.device
    chosen = choose(device, backend)
    kept = torch.empty(plan.num_states, dtype=torch.int16, device=device) if winners else None
    if chosen == "numba":
        from usllm_kernels.cpu import codec

        states = codec.project(weight.float(), plan, moment, kept)
    elif chosen == "triton":
        from usllm_kernels.ops.project import triton

        with running_on(device):
            states = triton.project(weight, plan, moment, kept)
    else:
        states = reference.project(weight, plan, moment, winners=kept)
    return *list_states(states), empty(torch.int16, device) if kept is None else kept


@project_op.register_fake
def _(
    weight: Tensor,
    moment: Tensor | None,
    classes: Tensor,
    channel_class: Tensor,
    numbers: list[int],
    winners: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    kept = torch.empty(numbers[2] if winners else 0, dtype=torch.int16, device=weight.device)
    return *fake_states(numbers, weight.device), kept
