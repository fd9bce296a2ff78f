"""AbsMaxMin: a state is its bucket's member of smallest magnitude; a query takes the largest candidate.

Every candidate is at most as large as the weight, so the decode never overestimates a magnitude (the underestimate
property, `docs/method.md` §2).
"""

from __future__ import annotations

import torch
from torch import Tensor

from usllm.sketch.operators.base import first_taken

_MAGNITUDE = 0x7FFFFFFE  # a float32's magnitude without its last bit, which the sign takes


class AbsMaxMin:
    """Signed minimum magnitude in, maximum magnitude out.

    Members and candidates are compared as integers that hold the magnitude above and the sign in the lowest bit, so
    that a plain minimum or maximum finds the member. A member's magnitude loses the last of its 24 bits, downwards.
    Of two equal magnitudes a projection takes the positive one, a query the negative one.
    """

    keeps_member: bool = True
    pad: int | float = 2**31 - 1

    def encode(self, weights: Tensor) -> Tensor:
        bits = weights.view(torch.int32)
        negative = bits >> 31  # 0 or -1
        return bits.bitwise_and_(_MAGNITUDE).sub_(negative)

    def reduce(self, slots: Tensor, load: Tensor) -> Tensor:
        return slots.amin(1)

    def decode(self, states: Tensor) -> Tensor:
        return (states & _MAGNITUDE).bitwise_or_(states << 31).view(torch.float32)  # the pad becomes NaN

    def encode_codes(self, codes: Tensor, query: str) -> Tensor:
        if query == "signed_max":
            return codes
        negative = codes >> (7 if codes.dtype == torch.int8 else 15)  # 0 or -1
        key = codes.to(torch.int32 if codes.dtype == torch.int16 else torch.int16).abs_().mul_(2).sub_(negative)
        return key.add_(-128).to(torch.int8) if codes.dtype == torch.int8 else key

    def combine(self, candidates: Tensor) -> Tensor:
        return candidates[0] if candidates.shape[0] == 1 else candidates.amax(0)

    def decode_codes(self, joined: Tensor, query: str) -> Tensor:
        if query == "signed_max":
            return joined
        if joined.dtype == torch.int8:
            # key + 128 = 2 |code| + sign, as an unsigned byte
            key = joined.view(torch.uint8) ^ 128
            magnitude, sign = (key >> 1).view(torch.int8), (key & 1).view(torch.int8)
        else:
            magnitude, sign = joined >> 1, joined & 1
        return magnitude.mul_(sign.mul_(-2).add_(1))

    def divisor(self, rows: int) -> int:
        return 1

    def derivative(self, candidates: Tensor) -> Tensor:
        return first_taken(candidates, self.combine(candidates))


OPERATOR = AbsMaxMin()
