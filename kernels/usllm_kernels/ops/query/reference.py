"""The truth about the query: :func:`usllm.sketch.query`, in plain torch; packed states are unpacked first."""

from __future__ import annotations

import torch
from torch import Tensor

from usllm import sketch
from usllm.sketch import Plan
from usllm.sketch.bitstream import unpack
from usllm.sketch.codec import States


def supports(plan: Plan) -> None:
    """Every plan."""


def query(states: States, plan: Plan, dtype: torch.dtype = torch.float32) -> Tensor:
    """Decoded weight [out, in], computed in fp32 and rounded to ``dtype``."""
    codes = states["codes"]
    if codes.dtype == torch.uint8:
        states = {**states, "codes": unpacked(codes, plan)}
    return sketch.query(states, plan).to(dtype)


def unpacked(stream: Tensor, plan: Plan) -> Tensor:
    """Codes, int8 or int16 [states], from the packed stream, uint8 [bytes]."""
    codes = torch.empty(plan.num_states, dtype=plan.code_dtype, device=stream.device)
    first_bit = 0
    for block in plan.blocks:
        bits = block.choice.bits
        value = unpack(stream, block.num_states, bits, first_bit).to(torch.int32)
        # One bit holds the sign alone; from two on, the highest counts negative.
        signed = 1 - 2 * value if bits == 1 else value - ((value >> (bits - 1)) << bits)
        codes[block.first_state : block.first_state + block.num_states] = signed.to(codes.dtype)
        first_bit += block.num_states * bits
    return codes
