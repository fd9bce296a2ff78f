"""Arguments of Triton kernels, made of a plan and its states. Launch parameters follow from formulas."""

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from usllm.sketch import Plan
from usllm.sketch.codec import States
from usllm_kernels.compiled_operators import combination
from usllm_kernels.dispatch import interpreted
from usllm_kernels.tables import SpanTables, Tables, tables
from usllm_kernels.triton_tile import Groups, Sketch


def sketch_argument(states: States, plan: Plan, *, output_scale: bool = True) -> tuple[Tables, Sketch]:
    """Tables of a plan that has states, and the argument that kernels take for states and tables.

    Output scales are applied where the plan has them and ``output_scale`` is true.
    """
    codes = states["codes"]
    known = tables(plan, codes.device)
    output = plan.config.output_scale
    return known, Sketch(
        codes=codes,
        scales=states["scales"],
        scale_base=states["scale_base"],
        output_scales=states["output_scales"] if output else codes,
        output_scale_base=states["output_scale_base"] if output else codes,
        channel=known.channel,
        class_index=known.class_index,
        first_state=known.first_state,
        first_bit=known.first_bit,
        bits=known.bits,
        num_active=plan.num_active,
        width=plan.shape[1],
        ROTATION_STEP=tl.constexpr(plan.rotation_step),
        ROWS=tl.constexpr(known.rows),
        COMBINATION=tl.constexpr(combination(plan)),
        PACKED=tl.constexpr(codes.dtype == torch.uint8),
        OUTPUT_SCALE=tl.constexpr(output and output_scale),
    )


def groups_argument(span: SpanTables) -> Groups:
    """What kernels take of a span."""
    return Groups(span.shape, span.buckets, span.start, span.size, span.rotation)


def target(out: Tensor) -> dict[str, Any]:
    """A tensor that a kernel writes through :func:`usllm_kernels.triton_tile.as_stored`."""
    is_bfloat16 = out.dtype == torch.bfloat16
    return {"out": out.view(torch.int16) if is_bfloat16 else out, "BFLOAT16": is_bfloat16}


def power_of_two(number: int, least: int = 1, most: int = 1 << 20) -> int:
    """Smallest power of two that is not below ``number``, within bounds that are powers of two."""
    return min(max(1 << (max(number, 1) - 1).bit_length(), least), most)


def dot_in_float32() -> bool:
    """Whether products of tiles must be of float32: the interpreter gets those of bfloat16 wrong."""
    return interpreted()
