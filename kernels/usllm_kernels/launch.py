"""From a plan and its states to the arguments of a Triton kernel. Launch parameters follow from formulas."""

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from usllm.sketch import Plan
from usllm.sketch.codec import States
from usllm_kernels.dispatch import interpreted
from usllm_kernels.tables import SpanTables, Tables, tables
from usllm_kernels.triton_tile import Groups, Sketch

_COMBINATIONS = {"absmaxmin": 0, "countmin": 2, "mean": 3}


def sketch_argument(states: States, plan: Plan, *, output_scale: bool = True) -> tuple[Tables, Sketch]:
    """Tables of a plan with states, and what kernels take of both; output scales only where wanted and there."""
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
        block=known.block,
        first_state=known.first_state,
        first_bit=known.first_bit,
        bits=known.bits,
        numbers=plan.num_scales,
        width=plan.shape[1],
        STEP=tl.constexpr(plan.turns),
        ROWS=tl.constexpr(known.rows),
        COMBINATION=tl.constexpr(combination(plan)),
        PACKED=tl.constexpr(codes.dtype == torch.uint8),
        OUTPUT_SCALE=tl.constexpr(output and output_scale),
    )


def groups_argument(span: SpanTables) -> Groups:
    """What kernels take of a span."""
    return Groups(span.shape, span.buckets, span.start, span.size, span.rotation)


def combination(plan: Plan) -> int:
    """Number of the way in which the candidates of several rows are joined."""
    return 1 if plan.config.query == "signed_max" else _COMBINATIONS[plan.config.operator]


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
