"""The truth about the states' gradient: :func:`usllm.sketch.state_gradient.state_gradient_`, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from usllm.sketch import Plan, state_gradient
from usllm.sketch.codec import States
from usllm_kernels.ops.query.reference import unpacked


def supports(plan: Plan) -> None:
    """Every plan."""


def state_gradient_(gradient: Tensor, plan: Plan, states: States) -> None:
    """In place; packed states are unpacked first."""
    if states["codes"].dtype == torch.uint8:
        states = {**states, "codes": unpacked(states["codes"], plan)}
    state_gradient.state_gradient_(gradient, plan, states)
