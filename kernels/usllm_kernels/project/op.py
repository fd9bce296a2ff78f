"""Projection: latent weight -> states."""

from __future__ import annotations

from torch import Tensor

from usllm import sketch
from usllm.sketch import Plan
from usllm.sketch.codec import States, check_shape
from usllm_kernels.dispatch import choose


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
    if choose(weight.device, backend) == "numba":
        from usllm_kernels.cpu import codec

        return codec.project(weight.detach().float(), plan, moment, winners)
    return sketch.project(weight, plan, moment, winners=winners)
