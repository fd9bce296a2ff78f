"""A Triton kernel: the query of sketches in which channels hold no states; only the others are looked at."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from usllm.sketch import Plan, States
from usllm_kernels import compiled_operators
from usllm_kernels.launch import groups_argument, sketch_argument, target
from usllm_kernels.triton_tile import as_stored, decoded_tile

TILE = 32  # channels, and outputs


@triton.jit
def held_channels_kernel(out, pitch, sketch, span, BFLOAT16: tl.constexpr, TILE: tl.constexpr):
    parts = tl.cdiv(span.n, TILE)
    group = tl.program_id(1) // parts
    index = tl.program_id(0) * TILE + tl.arange(0, TILE)  # among the channels that hold states
    i = tl.program_id(1) % parts * TILE + tl.arange(0, TILE)
    held = index < sketch.num_active
    channel = tl.load(sketch.channel + index, mask=held, other=0)
    weight = as_stored(decoded_tile(sketch, span, index, i, group), BFLOAT16, out.dtype.element_ty)
    row = (span.start + group * span.n + i).to(tl.int64)
    tl.store(out + row[None, :] * pitch + channel[:, None], weight, mask=held[:, None] & (i < span.n)[None, :])


def supports(plan: Plan) -> str | None:
    """Why it cannot compute with a plan."""
    if not 0 < plan.num_active < plan.shape[1]:
        return f"{plan.name} has states in all channels or in none"
    return compiled_operators.supports(plan)


def query(states: States, plan: Plan, dtype: torch.dtype = torch.float32) -> Tensor:
    """Decoded weight [out, in]."""
    decoded = torch.zeros(plan.shape, dtype=dtype, device=states["codes"].device)
    known, sketch = sketch_argument(states, plan)
    for span in known.spans:
        grid = triton.cdiv(plan.num_active, TILE), span.groups * triton.cdiv(span.size, TILE)
        held_channels_kernel[grid](
            **target(decoded), pitch=plan.shape[1], sketch=sketch, span=groups_argument(span), TILE=TILE
        )
    return decoded
