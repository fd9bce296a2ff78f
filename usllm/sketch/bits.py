"""The one bit count: what a layer's packed form takes, section by section, each padded to whole bytes.

=================  ==========================================================================================
header             number of classes, bases of the scales, reserved: 64 bits
classes            rows 4 bits, width code 4 bits, states per group 16 bits: 24 bits a class
channel classes    ⌈log2(classes)⌉ bits a channel; it also gives the channel order (by class, then by number)
scales             8 bits for every channel that holds states
output scale       8 bits an output row, where asked for
states             rows x groups x K x width for every channel, without gaps
=================  ==========================================================================================

No section stores an index. Biases are not weights: they are counted with the parameters left alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from usllm.sketch.scale import SCALE_BITS

if TYPE_CHECKING:
    from usllm.sketch.plan import Plan

HEADER_BITS = 64
CLASS_BITS = 24


def code_bits(classes: int) -> int:
    """Bits of a class number."""
    return (classes - 1).bit_length()


def whole_bytes(bits: int) -> int:
    """Bits after padding to bytes."""
    return -(-bits // 8) * 8


def _fixed_bits(shape: tuple[int, int], output_scale: bool, classes: int) -> dict[str, int]:
    return {
        "header": HEADER_BITS,
        "classes": classes * CLASS_BITS,
        "channel_classes": whole_bytes(shape[1] * code_bits(classes)),
        "output_scale": shape[0] * SCALE_BITS if output_scale else 0,
    }


def available_bits(shape: tuple[int, int], output_scale: bool, classes: int, budget: int) -> int:
    """Bits of a budget left for states and scales, in whole bytes; negative where the tables alone exceed it."""
    return (budget - sum(_fixed_bits(shape, output_scale, classes).values())) // 8 * 8


def bit_breakdown(plan: Plan) -> dict[str, int]:
    """Bits of each section of a planned layer; their sum is the layer's size."""
    sections = _fixed_bits(plan.shape, plan.config.output_scale, len(plan.classes))
    sections["scales"] = plan.num_active * SCALE_BITS
    sections["states"] = whole_bytes(sum(block.num_states * block.choice.bits for block in plan.blocks))
    return sections
