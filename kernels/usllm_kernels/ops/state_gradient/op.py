"""The states' gradient: straight-through gradients of a weight -> what the optimizer sees of them."""

from __future__ import annotations

from torch import Tensor

from usllm.sketch import Plan
from usllm.sketch.codec import States, check_shape
from usllm_kernels.dispatch import implementation, running_on
from usllm_kernels.plans import check_states


def state_gradient_(gradient: Tensor, plan: Plan, states: States, *, backend: str | None = None) -> Tensor:
    """Gradients of a decoded weight, each replaced by that of its states, as in :mod:`usllm.sketch.state_gradient`.

    It runs between the backward pass and the optimizer, in no graph: it is not a custom op.

    Args:
        gradient: fp32 [out, in], overwritten.
        plan: The layer's plan.
        states: Of the plan, those that the weight was decoded from.
        backend: See :func:`usllm_kernels.dispatch.choose`.

    Returns:
        ``gradient``.

    Raises:
        ValueError: The back end cannot run, or the gradient's shape or the states are not the plan's.
    """
    check_shape(gradient, plan)
    check_states(states, plan)
    device = gradient.device
    with running_on(device):
        implementation("state_gradient", plan, device, backend).state_gradient_(gradient.detach(), plan, states)
    return gradient
