"""Projection and query in one: latent weight -> states and decoded weight, for training."""

from __future__ import annotations

import torch
from torch import Tensor

from usllm import sketch
from usllm.sketch import Plan
from usllm.sketch.codec import States, check_shape
from usllm_kernels.dispatch import choose


def project_query(
    weight: Tensor,
    plan: Plan,
    moment: Tensor | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    winners: Tensor | None = None,
    sums: Tensor | None = None,
    backend: str | None = None,
) -> tuple[States, Tensor]:
    """States of a latent weight, and the weight that they decode to [out, in].

    Args:
        weight: [out, in], any float dtype; computed in fp32.
        plan: The layer's plan.
        moment: E[a²] per input channel, [in]: weights the fit of the output scale, if the plan has one.
        dtype: Of the decoded weight: float32, bfloat16 or float16.
        winners: As for :func:`usllm_kernels.project`.
        sums: fp32 [2, in], written: over the outputs, the squared error of the decoded weight, and the squared weight.
        backend: See :func:`usllm_kernels.dispatch.choose`.

    Raises:
        ValueError: The weight's shape is not the plan's, or the backend cannot run.
    """
    check_shape(weight, plan)
    latent = weight.detach().float()
    if choose(weight.device, backend) == "numba":
        from usllm_kernels.cpu import codec

        return codec.project_query(latent, plan, moment, dtype, winners, sums)
    states = sketch.project(latent, plan, moment, winners=winners)
    decoded = sketch.query(states, plan)
    if sums is not None:
        sums[0] = (decoded - latent).square_().sum(0)
        sums[1] = latent.square().sum(0)
    return states, decoded.to(dtype)
