"""One packed layer: plan and states as one vector of bytes, and back. FORMAT.md describes it byte by byte.

Everything is checked before it is used: a packed file may come from a stranger. Nothing is allocated that the bytes at
hand do not account for.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import Tensor

from usllm.sketch.bits import CLASS_BITS, HEADER_BITS, bit_breakdown, code_bits, whole_bytes
from usllm.sketch.bitstream import pack, unpack
from usllm.sketch.classes import EMPTY, MAX_CLASSES, ChannelClass
from usllm.sketch.codec import States
from usllm.sketch.config import STATE_BITS, SketchConfig
from usllm.sketch.layout import spans, states_per_channel
from usllm.sketch.plan import Plan
from usllm.sketch.quantize import largest_code
from usllm.sketch.scale import CHANNEL_MANTISSA, OUTPUT_MANTISSA, decode_scale
from usllm.system.errors import PackedFormatError

HEADER_BYTES = HEADER_BITS // 8
CLASS_BYTES = CLASS_BITS // 8
WIDTHS = tuple(sorted({*range(1, 9), *STATE_BITS}))
MAX_DIMENSION = 1 << 20  # of a layer: above any vocabulary, far below what makes sizes overflow
_INFINITE_EXPONENT = 255
_LARGEST_WEIGHT = torch.finfo(torch.float32).max
_CHUNK = 1 << 18  # states unpacked at a time where they are only looked at


@dataclass(frozen=True)
class Sections:
    """Where the sections of a packed layer begin, in bytes.

    Attributes:
        classes, channel_classes, scales, output_scale, states: First byte of each.
        end: Number of bytes.
    """

    classes: int
    channel_classes: int
    scales: int
    output_scale: int
    states: int
    end: int


def sections(plan: Plan) -> Sections:
    """Layout of a planned layer, as counted in :mod:`usllm.sketch.bits`."""
    size = {name: bits // 8 for name, bits in bit_breakdown(plan).items()}
    first = [HEADER_BYTES]
    for name in ("classes", "channel_classes", "scales", "output_scale", "states"):
        first.append(first[-1] + size[name])
    return Sections(*first)


def pack_layer(plan: Plan, states: States) -> Tensor:
    """A layer as it is stored, uint8 [``plan.total_bits / 8``], on the CPU.

    Args:
        plan: The layer's plan.
        states: Its states.
    """
    held = {name: tensor.detach().cpu() for name, tensor in states.items()}
    codes = held["codes"]
    runs = [(codes[b.first_state : b.first_state + b.num_states], b.choice.bits) for b in plan.blocks]
    # One bit holds the sign alone: the low bit of -1 and of +1 is the same.
    runs = [((run < 0).to(torch.uint8) if bits == 1 else run, bits) for run, bits in runs]
    entries = [
        byte
        for rows, number, bits in plan.classes
        for byte in (rows | (max(bits, 1) - 1) << 4, number & 255, number >> 8)
    ]
    output = plan.config.output_scale
    base = [int(held["scale_base"]), int(held["output_scale_base"]) if output else 0]
    channel_codes = code_bits(len(plan.classes))
    body = [
        torch.tensor(entries, dtype=torch.uint8),
        pack([(plan.channel_class, channel_codes)] if channel_codes else []),
        held["scales"],
        *([held["output_scales"]] if output else []),
        pack(runs),
    ]
    header = torch.tensor([len(plan.classes), *base, 0, 0, 0, 0, 0], dtype=torch.uint8)
    packed = torch.cat([header, *body])
    assert len(packed) * 8 == plan.total_bits, "the bit count and the packed layer disagree"
    packed[4:8] = torch.tensor(list(checksum(packed).to_bytes(4, "little")), dtype=torch.uint8)
    return packed


def checksum(packed: Tensor) -> int:
    """CRC-32 of a packed layer without the four bytes that hold it; ``packed`` is uint8 [bytes] on the CPU."""
    content = packed.contiguous().numpy().data
    return zlib.crc32(content[HEADER_BYTES:], zlib.crc32(content[:4]))


def read_plan(packed: Tensor, shape: tuple[int, int], config: SketchConfig, name: str) -> Plan:
    """The plan of a packed layer, every byte of it checked.

    Args:
        packed: uint8 [bytes], any device; only the tables are read into the plan.
        shape: ``(out, in)`` of the weight.
        config: Format constants: seed, group size, operator, query, hash, output scale.
        name: Layer name, part of the hash key and of messages.

    Raises:
        PackedFormatError: The bytes are not a layer of this shape; the message says what is wrong.
    """
    read = _Reader(packed.detach().cpu(), shape, config, name)
    return read.plan()


def read_states(packed: Tensor, plan: Plan) -> States:
    """The states of a packed layer whose plan was read, on the device of ``packed``.

    Args:
        packed: uint8 [bytes].
        plan: From :func:`read_plan`.
    """
    where = sections(plan)
    states = {
        "codes": unpack_codes(packed[where.states :], plan),
        "scales": packed[where.scales : where.output_scale],
        "scale_base": packed[1:2],
    }
    if plan.config.output_scale:
        states["output_scales"] = packed[where.output_scale : where.states]
        states["output_scale_base"] = packed[2:3]
    return states


def unpack_codes(stream: Tensor, plan: Plan) -> Tensor:
    """Codes, int8 or int16 [states], from the stream of states, uint8 [bytes]."""
    codes = torch.empty(plan.num_states, dtype=plan.code_dtype, device=stream.device)
    bit = 0
    for block in plan.blocks:
        bits = block.choice.bits
        values = unpack(stream, block.num_states, bits, bit)
        where = codes[block.first_state : block.first_state + block.num_states]
        if bits == 1:
            where.copy_(1 - 2 * values.to(torch.int8))
        elif bits <= 8:  # the sign bit moves to the top and is drawn down again
            where.copy_((values << (8 - bits)).view(torch.int8) >> (8 - bits))
        else:
            where.copy_(values.to(torch.int16))
        bit += block.num_states * bits
    return codes


class _Reader:
    """Checks a packed layer section by section, so that no size is trusted before it is bounded."""

    def __init__(self, packed: Tensor, shape: tuple[int, int], config: SketchConfig, name: str) -> None:
        self.packed, self.shape, self.config, self.name = packed, shape, config, name

    def fail(self, problem: str) -> NoReturn:
        raise PackedFormatError(f"{self.name}: {problem}; the file is damaged or not a usllm model, download it again")

    def plan(self) -> Plan:
        packed, (out_features, in_features) = self.packed, self.shape
        if packed.dtype != torch.uint8 or packed.dim() != 1:
            self.fail(f"is {packed.dtype} {list(packed.shape)}, expected a vector of bytes")
        if not (1 <= out_features <= MAX_DIMENSION and 1 <= in_features <= MAX_DIMENSION):
            self.fail(f"the shape {out_features}x{in_features} is impossible")
        if len(packed) < HEADER_BYTES + CLASS_BYTES:
            self.fail(f"has {len(packed)} bytes, too few for a header")
        if int.from_bytes(bytes(packed[4:8].tolist()), "little") != checksum(packed):
            self.fail("its checksum is wrong")
        count, _, output_base, reserved = packed[:4].tolist()
        if not 1 <= count <= MAX_CLASSES or reserved or (output_base and not self.config.output_scale):
            self.fail(f"its header {packed[:4].tolist()} is impossible")
        code_width = code_bits(count)
        codes_at = HEADER_BYTES + count * CLASS_BYTES
        scales_at = codes_at + whole_bytes(in_features * code_width) // 8
        if len(packed) < scales_at:
            self.fail(f"has {len(packed)} bytes, too few for {count} classes and {in_features} channels")
        classes = self._classes(packed[HEADER_BYTES:codes_at].view(count, CLASS_BYTES).tolist())
        channel_class = torch.zeros(in_features, dtype=torch.uint8)
        if code_width:
            stream = packed[codes_at:scales_at]
            channel_class = unpack(stream, in_features, code_width)
            self._check_padding(stream, in_features * code_width)
        if int(channel_class.max()) >= count:
            self.fail(f"a channel has class {int(channel_class.max())} of {count}")
        self._check_size(classes, channel_class, scales_at)
        plan = Plan(self.name, self.shape, self.config, classes, channel_class)
        self._check_codes(plan)
        self._check_scales(plan)
        return plan

    def _classes(self, entries: list[list[int]]) -> tuple[ChannelClass, ...]:
        largest = spans(self.shape[0], self.config.group_size)[0].size
        classes = []
        for first, low, high in entries:
            choice = ChannelClass(first & 15, low | high << 8, (first >> 4) + 1)
            if choice.rows == 0:
                choice = EMPTY if first == 0 and not choice.states else self.fail("an empty class has states")
            elif choice.bits not in WIDTHS or not 1 <= choice.states <= largest:
                self.fail(f"a class of {choice.states} states of {choice.bits} bits in groups of {largest}")
            classes.append(choice)
        return tuple(classes)

    def _check_size(self, classes: tuple[ChannelClass, ...], channel_class: Tensor, scales_at: int) -> None:
        runs = spans(self.shape[0], self.config.group_size)
        channels = torch.bincount(channel_class, minlength=len(classes)).tolist()
        scales = bits = 0
        for choice, number in zip(classes, channels, strict=True):
            states = number * states_per_channel(runs, choice.rows, choice.states)
            bits += states * choice.bits
            scales += number if states else 0
        output = self.shape[0] if self.config.output_scale else 0
        expected = scales_at + scales + output + whole_bytes(bits) // 8
        if len(self.packed) != expected:
            self.fail(f"has {len(self.packed)} bytes, its tables ask for {expected}")
        self._check_padding(self.packed[scales_at + scales + output :], bits)

    def _check_padding(self, stream: Tensor, bits: int) -> None:
        if bits % 8 and int(stream[-1]) >> bits % 8:
            self.fail("bits after the end of a section are set")

    def _check_codes(self, plan: Plan) -> None:
        """Refuse the one code of each width that has no opposite: its magnitude does not fit the type of the codes."""
        stream = self.packed[sections(plan).states :]
        bit = 0
        for block in plan.blocks:
            bits = block.choice.bits
            for first in range(0, block.num_states if bits > 1 else 0, _CHUNK):
                values = unpack(stream, min(_CHUNK, block.num_states - first), bits, bit + first * bits)
                if bool((values == 1 << (bits - 1)).any()):
                    self.fail(f"a state of {bits} bits is {-(1 << (bits - 1))}, which no sketch holds")
            bit += block.num_states * bits

    def _check_scales(self, plan: Plan) -> None:
        where = sections(plan)
        largest = float(max((largest_code(block.choice.bits) for block in plan.blocks), default=0))
        for base, part, mantissa in (
            (self.packed[1:2], self.packed[where.scales : where.output_scale], CHANNEL_MANTISSA),
            (self.packed[2:3], self.packed[where.output_scale : where.states], OUTPUT_MANTISSA),
        ):
            if not len(part):
                continue
            top = part.max()
            if int(base) + (int(top) >> mantissa) >= _INFINITE_EXPONENT:
                self.fail("a scale is not finite")
            largest *= float(decode_scale(top, base, mantissa))
            if largest > _LARGEST_WEIGHT:
                self.fail("its scales make weights that are not finite")
