"""Projection: latent weight -> states."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from usllm.sketch import Plan
from usllm.sketch.codec import States, check_shape
from usllm_kernels.dispatch import implementation, running_on
from usllm_kernels.plans import PlanNumbers, absent, fake_states, flatten, list_states, name_states, unflatten


def project(
    weight: Tensor,
    plan: Plan,
    second_moment: Tensor | None = None,
    *,
    winners: Tensor | None = None,
    output_scale: Tensor | None = None,
    backend: str | None = None,
) -> States:
    """States of a latent weight, as :func:`usllm.sketch.project` gives them, bit for bit.

    Args:
        weight: [out, in], any float dtype; computed in fp32.
        plan: The layer's plan.
        second_moment: E[a²] per input channel, [in]: weights the fit of the output scale, if the plan has one.
        winners: int16 [states], written: the rotated position within its group of the member that each state keeps.
        output_scale: [out], stored where the plan has an output scale; ``None`` fits it.
        backend: See :func:`usllm_kernels.dispatch.choose`.

    Raises:
        ValueError: The weight's shape is not the plan's, or the back end cannot run.
    """
    check_shape(weight, plan)
    states, found = project_op(
        weight.detach(), second_moment, output_scale, *flatten(plan), winners is not None, backend or ""
    )
    if winners is not None:
        winners.copy_(found)
    return name_states(states)


@torch.library.custom_op("usllm::project", mutates_args=())
def project_op(
    weight: Tensor,
    second_moment: Tensor | None,
    output_scale: Tensor | None,
    plan: list[Tensor],
    numbers: list[int],
    winners: bool,
    backend: str,
) -> tuple[list[Tensor], Tensor]:
    """States and winners; see :mod:`usllm_kernels.plans`."""
    of, device = unflatten(plan, numbers), weight.device
    found = torch.empty(of.num_states, dtype=torch.int16, device=device) if winners else None
    with running_on(device):
        computing = implementation("project", of, device, backend)
        states = computing.project(weight, of, second_moment, found, output_scale)
    return list_states(states), absent(torch.int16, device) if found is None else found


@project_op.register_fake
def _(
    weight: Tensor, second_moment: Any, output_scale: Any, plan: Any, numbers: list[int], winners: bool, backend: str
) -> Any:
    size = PlanNumbers(*numbers).num_states if winners else 0
    return fake_states(numbers, weight.device), torch.empty(size, dtype=torch.int16, device=weight.device)
