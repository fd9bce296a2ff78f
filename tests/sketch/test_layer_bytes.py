"""A layer's bytes: what is packed is read back, is as long as it is counted, and is refused when anything is off."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import layers
from torch import Tensor

from usllm.sketch import Plan, SketchConfig, project, query
from usllm.sketch.classes import ChannelClass
from usllm.sketch.layer_bytes import HEADER_BYTES, WIDTHS, checksum, pack_layer, read_plan, read_states, sections
from usllm.system.errors import PackedFormatError

NAME = "model.layers.3.mlp.up_proj"
CONFIG = SketchConfig(group_size=20, output_scale=True)
CLASSES = (ChannelClass(2, 3, 3), ChannelClass(1, 5, 2), ChannelClass(0, 0, 0))
CHANNELS = torch.tensor([0, 1, 2, 0, 0, 1, 2, 0, 1], dtype=torch.uint8)  # 18 bits: padding in the last byte


def plan_of(classes: tuple[ChannelClass, ...] = CLASSES, config: SketchConfig = CONFIG) -> Plan:
    return Plan(NAME, (43, 9), config, classes, CHANNELS % len(classes))


def packed_of(plan: Plan) -> Tensor:
    weight = torch.randn(plan.shape, generator=torch.Generator().manual_seed(0))
    return pack_layer(plan, project(weight, plan))


def sealed(packed: Tensor) -> Tensor:
    """With the checksum that fits, as a malicious writer would make it."""
    packed = packed.clone()
    packed[4:8] = torch.tensor(list(checksum(packed).to_bytes(4, "little")), dtype=torch.uint8)
    return packed


def read(packed: Tensor, shape: tuple[int, int] = (43, 9), config: SketchConfig = CONFIG) -> Plan:
    return read_plan(packed, shape, config, NAME)


def refused(packed: Tensor, why: str, **changed: object) -> None:
    with pytest.raises(PackedFormatError, match=rf"^{NAME}: .*{why}"):
        read(packed, **changed)  # type: ignore[arg-type]


# Round trips


@given(layers())
@settings(max_examples=60, deadline=None)
def test_plan_and_states_come_back(layer: tuple[Tensor, Plan, Tensor]) -> None:
    weight, plan, _ = layer
    states = project(weight, plan)
    packed = pack_layer(plan, states)
    found = read_plan(packed, plan.shape, plan.config, plan.name)
    assert found.classes == plan.classes
    assert torch.equal(found.channel_class, plan.channel_class)
    again = read_states(packed, found)
    assert again.keys() == states.keys()
    assert all(torch.equal(again[name], states[name]) and again[name].dtype == states[name].dtype for name in states)
    assert torch.equal(query(again, found), query(states, plan))


@given(layers())
@settings(max_examples=30, deadline=None)
def test_bytes_are_exactly_the_bits_that_are_counted(layer: tuple[Tensor, Plan, Tensor]) -> None:
    weight, plan, _ = layer
    packed = pack_layer(plan, project(weight, plan))
    assert packed.dtype == torch.uint8 and packed.dim() == 1
    assert len(packed) * 8 == plan.total_bits == sum(plan.bit_breakdown().values())
    assert sections(plan).end == len(packed)


@given(layers(), st.randoms(use_true_random=False))
@settings(max_examples=30, deadline=None)
def test_every_flipped_bit_is_noticed(layer: tuple[Tensor, Plan, Tensor], random: object) -> None:
    weight, plan, _ = layer
    packed = pack_layer(plan, project(weight, plan))
    for _ in range(5):
        damaged = packed.clone()
        damaged[random.randrange(len(packed))] ^= 1 << random.randrange(8)  # type: ignore[attr-defined]
        with pytest.raises(PackedFormatError, match=r"^layer: "):
            read_plan(damaged, plan.shape, plan.config, plan.name)


@pytest.mark.parametrize("bits", WIDTHS)
def test_any_codes_of_a_width_come_back(bits: int) -> None:
    plan = plan_of((ChannelClass(2, 3, bits), ChannelClass(1, 4, 3)))
    states = project(torch.randn(plan.shape), plan)
    largest = max((1 << (bits - 1)) - 1, 1)
    first = plan.blocks[0].num_states
    drawn = torch.randint(-largest, largest + 1, (first,), generator=torch.Generator().manual_seed(bits))
    states["codes"][:first] = torch.where(drawn < 0, -1, 1) if bits == 1 else drawn
    packed = pack_layer(plan, states)
    assert torch.equal(read_states(packed, read(packed))["codes"], states["codes"])


def test_a_layer_without_states_is_zero() -> None:
    plan = plan_of((ChannelClass(0, 0, 0),))
    packed = packed_of(plan)
    found = read(packed)
    assert len(packed) == HEADER_BYTES + 3 + 43
    assert torch.equal(query(read_states(packed, found), found), torch.zeros(plan.shape))


# Damage that the checksum finds


def test_every_damaged_byte_is_noticed() -> None:
    packed = packed_of(plan_of())
    for byte in range(len(packed)):
        damaged = packed.clone()
        damaged[byte] += 1
        refused(damaged, "checksum is wrong")


@pytest.mark.parametrize("length", [0, 1, 7, 8, 10])
def test_too_few_bytes_for_a_header(length: int) -> None:
    refused(packed_of(plan_of())[:length], f"has {length} bytes, too few for a header")


def test_truncated_and_extended() -> None:
    packed = packed_of(plan_of())
    refused(packed[:-1], "checksum is wrong")
    refused(torch.cat([packed, packed[:1]]), "checksum is wrong")


# Damage by someone who knows the checksum


@pytest.mark.parametrize("length", [11, 12, 17, 19, 30, -1])
def test_truncated_at_a_section(length: int) -> None:
    packed = packed_of(plan_of())
    refused(sealed(packed[:length]), "bytes, (too few for|its tables ask for)")


@pytest.mark.parametrize("more", [1, 1000])
def test_extended(more: int) -> None:
    packed = packed_of(plan_of())
    longer = sealed(torch.cat([packed, torch.zeros(more, dtype=torch.uint8)]))
    refused(longer, f"has {len(longer)} bytes, its tables ask for {len(packed)}")


def put(byte: int, value: int) -> Callable[[Tensor], None]:
    def change(packed: Tensor) -> None:
        packed[byte] = value

    return change


CLASS_AT, CODES_AT = HEADER_BYTES, HEADER_BYTES + 3 * len(CLASSES)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (put(0, 0), "header .* is impossible"),
        (put(0, 17), "header .* is impossible"),
        (put(0, 255), "header .* is impossible"),
        (put(3, 1), "header .* is impossible"),
        (put(0, 2), "asks? for|class|empty"),
        (put(0, 4), "asks? for|class|empty"),
        (put(CODES_AT, 0b11), "a channel has class 3 of 3"),
        (put(CODES_AT + 2, 0b10000001), "bits after the end of a section are set"),
        (put(CLASS_AT + 1, 21), "class of 21 states of 3 bits in groups of 15"),
        (put(CLASS_AT + 1, 16), "class of 16 states of 3 bits in groups of 15"),
        (put(CLASS_AT + 2, 255), "class of 65283 states of 3 bits in groups of 15"),
        (put(CLASS_AT + 1, 0), "class of 0 states"),
        (put(CLASS_AT, 2 | 8 << 4), "class of 3 states of 9 bits"),
        (put(CLASS_AT, 2 | 14 << 4), "class of 3 states of 15 bits"),
        (put(CLASS_AT, 3 | 2 << 4), "its tables ask for"),
        (put(CLASS_AT, 0 | 2 << 4), "an empty class has states"),
        (put(CLASS_AT + 6, 1 << 4), "an empty class has states"),
        (put(CLASS_AT + 7, 1), "an empty class has states"),
        (put(CLASS_AT + 6, 1), "class of 0 states"),
        (put(1, 255), "a scale is not finite"),
        (put(2, 255), "a scale is not finite"),
    ],
)
def test_tables_that_no_writer_makes(change: Callable[[Tensor], None], why: str) -> None:
    packed = packed_of(plan_of())
    change(packed)
    refused(sealed(packed), why)


def test_padding_after_the_states() -> None:
    plan = plan_of()
    assert sum(block.num_states * block.choice.bits for block in plan.blocks) % 8
    packed = packed_of(plan)
    packed[-1] |= 0x80
    refused(sealed(packed), "bits after the end of a section are set")


def test_scales_that_are_infinite_or_overflow_together() -> None:
    plan = plan_of()
    packed, where = packed_of(plan), sections(plan)
    packed[where.scales : where.output_scale] = 0
    packed[where.scales], packed[1] = 8, 254
    refused(sealed(packed), "a scale is not finite")
    packed[where.scales], packed[1] = 0, 190  # 2^63, and 2^63 for the rows
    packed[where.output_scale : where.states], packed[2] = 0, 188
    read(sealed(packed))
    packed[2] = 191  # times the code 3 it is above 2^128
    refused(sealed(packed), "weights that are not finite")


def test_output_scale_base_without_output_scales() -> None:
    config = replace(CONFIG, output_scale=False)
    packed = packed_of(plan_of(config=config))
    packed[2] = 1
    refused(sealed(packed), "header .* is impossible", config=config)


@pytest.mark.parametrize("bits", [bits for bits in WIDTHS if bits > 1])
@pytest.mark.parametrize("which", [0, -1])
def test_the_code_without_an_opposite(bits: int, which: int) -> None:
    """-2^(b-1): its magnitude does not fit the codes' type, so that backends would differ; no writer makes it."""
    plan = plan_of((ChannelClass(1, 3, 3), ChannelClass(2, 5, bits)))
    states = project(torch.randn(plan.shape), plan)
    states["codes"][plan.blocks[1].first_state :][which] = -(1 << (bits - 1))
    refused(pack_layer(plan, states), f"a state of {bits} bits is {-(1 << (bits - 1))}, which no sketch holds")


def test_the_code_without_an_opposite_is_found_behind_the_first_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("usllm.sketch.layer_bytes._CHUNK", 8)
    plan = plan_of((ChannelClass(1, 3, 3), ChannelClass(2, 5, 4)))
    states = project(torch.randn(plan.shape), plan)
    read(pack_layer(plan, states))
    states["codes"][-2] = -8
    refused(pack_layer(plan, states), "a state of 4 bits is -8")


@pytest.mark.parametrize(
    "shape", [(42, 9), (44, 9), (43, 8), (43, 10), (9, 43), (1, 1), (0, 9), (-43, 9), (1 << 40, 9), (43, 1 << 40)]
)
def test_wrong_shape(shape: tuple[int, int]) -> None:
    refused(packed_of(plan_of()), "", shape=shape)


@pytest.mark.parametrize("field", [{"group_size": 7}, {"output_scale": False}])
def test_wrong_constants_that_move_sections(field: dict[str, int]) -> None:
    refused(packed_of(plan_of()), "", config=replace(CONFIG, **field))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "packed", [torch.zeros(40), torch.zeros(40, dtype=torch.int8), torch.zeros(4, 10, dtype=torch.uint8)]
)
def test_wrong_type(packed: Tensor) -> None:
    refused(packed, "expected a vector of bytes")


@given(layers(), st.data())
@settings(max_examples=100, deadline=None)
def test_sealed_damage_is_refused_or_decodes_to_finite_weights(
    layer: tuple[Tensor, Plan, Tensor], data: st.DataObject
) -> None:
    weight, plan, _ = layer
    packed = pack_layer(plan, project(weight, plan))
    tables = sections(plan).scales
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.one_of(st.integers(0, tables - 1), st.integers(0, len(packed) - 1)))
        packed[at] = data.draw(st.integers(0, 255))
    packed = sealed(packed)
    try:
        found = read_plan(packed, plan.shape, plan.config, plan.name)
    except PackedFormatError:
        return
    decoded = query(read_states(packed, found), found)
    assert decoded.shape == plan.shape and bool(decoded.isfinite().all())
    assert torch.equal(pack_layer(found, read_states(packed, found))[8:], packed[8:])  # one form of each layer
