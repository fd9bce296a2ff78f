import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import configs, layers
from torch import Tensor

from usllm.sketch import Plan, SketchConfig, build_plan, channel_scales, project, query
from usllm.sketch.hash import first_rotation
from usllm.sketch.layer_bytes import pack_layer, read_plan
from usllm.sketch.operators import OPERATORS


def slow_query(weight: Tensor, plan: Plan) -> Tensor:
    """AbsMaxMin without quantisation, one weight at a time, from the definition."""
    decoded = torch.zeros_like(weight)
    for span in plan.spans:
        turn = first_rotation(plan.key, span.size) + plan.rotation_step * span.first_group * plan.shape[1]
        for block in plan.blocks:
            buckets = plan.placement(block.choice, span.size).buckets.long()
            for channel in block.channels.tolist():
                for group in range(span.groups):
                    rows = slice(span.start + group * span.size, span.start + (group + 1) * span.size)
                    values = weight[rows, channel]
                    q = (
                        torch.arange(span.size) - turn - plan.rotation_step * (channel + group * plan.shape[1])
                    ) % span.size
                    best = torch.zeros_like(values)
                    for table in buckets:
                        for i in range(span.size):
                            members = values[table[q] == table[q[i]]]
                            candidate = members[members.abs().argmin()]
                            best[i] = candidate if candidate.abs() >= best[i].abs() else best[i]
                    decoded[rows, channel] = best
    return decoded


@given(
    layers(operator="absmaxmin", output_scale=False, state_bits=16, allocation="proportional", query="magnitude_max")
)
@settings(max_examples=25, deadline=None)
def test_absmaxmin_equals_its_definition(layer: tuple[Tensor, Plan, Tensor]) -> None:
    weight, plan, _ = layer
    decoded, expected = query(project(weight, plan), plan), slow_query(weight, plan)
    # The state quantiser may move a candidate by one step of its channel, and decide between two of equal magnitude.
    assert bool(((decoded.abs() - expected.abs()).abs() <= 1.01 * channel_scales(project(weight, plan), plan)).all())


@given(
    layers(
        operator="absmaxmin",
        output_scale=False,
        rounding="toward_zero",
        query="magnitude_max",
        allocation="proportional",
    )
)
@settings(max_examples=150, deadline=None)
def test_absmaxmin_underestimates_also_after_quantisation(layer: tuple[Tensor, Plan, Tensor]) -> None:
    weight, plan, _ = layer
    if plan.config.state_bits == 1:  # a one-bit state is sign times scale
        return
    decoded = query(project(weight, plan), plan)
    assert bool((decoded.abs() <= weight.abs()).all())
    if plan.config.hash == "balanced" and plan.config.rows == 1:
        assert bool((decoded * weight >= 0).all() or plan.load()[2] > 1)


@pytest.mark.parametrize(("bits", "tolerance"), [(16, 1e-4), (8, 0.03), (4, 0.3)])
@pytest.mark.parametrize("operator", ["absmaxmin", "countmin", "mean"])
@pytest.mark.parametrize(("shape", "rows"), [((40, 17), 1), ((40, 17), 3), ((600, 9), 1), ((577, 5), 2), ((1, 300), 1)])
def test_lossless_up_to_the_quantiser_where_every_weight_has_a_state(
    shape: tuple[int, int], rows: int, operator: str, bits: int, tolerance: float
) -> None:
    config = SketchConfig(bits_per_weight=300.0, rows=rows, operator=operator, state_bits=bits)
    plan = build_plan(shape, None, config, "layer")
    assert plan.load() == (1, 1.0, 1)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    decoded = query(project(weight, plan), plan)
    assert float((decoded - weight).norm() / weight.norm()) < tolerance


@given(layers())
@settings(max_examples=100, deadline=None)
def test_states_have_the_declared_shapes_and_decoding_is_finite(layer: tuple[Tensor, Plan, Tensor]) -> None:
    weight, plan, importance = layer
    states = project(weight, plan, importance)
    declared = plan.state_tensors()
    assert {n: (t.shape, t.dtype) for n, t in states.items()} == {n: (t.shape, t.dtype) for n, t in declared.items()}
    decoded = query(states, plan)
    assert decoded.shape == weight.shape
    assert decoded.dtype == torch.float32
    assert bool(torch.isfinite(decoded).all())


@given(layers())
@settings(max_examples=50, deadline=None)
def test_every_element_is_written(layer: tuple[Tensor, Plan, Tensor]) -> None:
    weight, plan, importance = layer
    states = project(weight, plan, importance)
    empty, poisoned = torch.empty, {"on": True}

    def poison(*args: object, **kwargs: object) -> Tensor:
        tensor = empty(*args, **kwargs)  # type: ignore[call-overload]
        return tensor.fill_(float("nan") if tensor.is_floating_point() else 77) if poisoned["on"] else tensor

    expected = query(states, plan)
    torch.empty = poison  # type: ignore[assignment]
    try:
        again, decoded = project(weight, plan, importance), query(states, plan)
    finally:
        torch.empty = empty
    assert torch.equal(decoded, expected)
    assert all(torch.equal(again[name], states[name]) for name in states)


@given(layers(), st.randoms(use_true_random=False))
@settings(max_examples=50, deadline=None)
def test_a_channel_does_not_depend_on_the_others(layer: tuple[Tensor, Plan, Tensor], random: object) -> None:
    """Storing the channels in another class order, as a permutation of the others would, leaves each decoded alike."""
    weight, plan, _ = layer
    if plan.config.output_scale:
        return
    order = torch.randperm(len(plan.classes), generator=torch.Generator().manual_seed(0))
    renumbered = torch.argsort(order).to(torch.uint8)[plan.channel_class.long()]
    classes = tuple(plan.classes[i] for i in order.tolist())
    other = Plan(plan.name, plan.shape, plan.config, classes, renumbered)
    assert torch.equal(query(project(weight, plan), plan), query(project(weight, other), other))


def test_permuting_the_channels_permutes_the_allocation() -> None:
    importance = torch.rand(64, generator=torch.Generator().manual_seed(0)).pow(4) + 1e-3
    order = torch.randperm(64, generator=torch.Generator().manual_seed(1))
    for allocation in ("proportional", "waterfill"):
        config = SketchConfig(bits_per_weight=1.0, allocation=allocation)
        plain = build_plan((256, 64), importance, config, "layer")
        moved = build_plan((256, 64), importance[order], config, "layer")

        def choices(plan: Plan) -> list[object]:
            return [plan.classes[i] for i in plan.channel_class.tolist()]

        assert [choices(plain)[i] for i in order.tolist()] == choices(moved)


@pytest.mark.parametrize("operator", ["absmaxmin", "countmin", "mean"])
def test_projection_is_deterministic_and_leaves_the_weight_alone(operator: str) -> None:
    weight = torch.randn(100, 30)
    kept = weight.clone()
    plan = build_plan((100, 30), torch.rand(30), SketchConfig(operator=operator, bits_per_weight=2.0), "layer")
    first, second = project(weight, plan), project(weight, plan)
    assert torch.equal(weight, kept)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_bf16_and_non_contiguous_weights_project_like_their_fp32_copies() -> None:
    weight = torch.randn(60, 48).to(torch.bfloat16)
    plan = build_plan((48, 60), None, SketchConfig(bits_per_weight=3.0), "layer")
    states = project(weight.t(), plan)
    copied = project(weight.t().float().contiguous(), plan)
    assert all(torch.equal(states[name], copied[name]) for name in states)


def test_signed_max_takes_the_largest_candidate() -> None:
    config = SketchConfig(bits_per_weight=4.0, rows=2, query="signed_max", state_bits=8)
    weight = torch.randn(64, 20, generator=torch.Generator().manual_seed(0))
    plan = build_plan((64, 20), None, config, "layer")
    by_magnitude = Plan(
        plan.name, plan.shape, SketchConfig(bits_per_weight=4.0, rows=2, state_bits=8), plan.classes, plan.channel_class
    )
    signed, magnitude = (query(project(weight, p), p) for p in (plan, by_magnitude))
    assert bool((signed >= magnitude).all())
    assert bool((signed > magnitude).any())
    assert float(signed.mean()) > 0.05 > abs(float(magnitude.mean()))  # the bias that docs/method.md §3 names


def test_the_mean_of_buckets_is_linear() -> None:
    config = SketchConfig(bits_per_weight=8.0, operator="mean", state_bits=16, rounding="nearest")
    plan = build_plan((96, 24), None, config, "layer")
    a, b = torch.randn(96, 24), torch.randn(96, 24)
    joined = query(project(a + 2 * b, plan), plan)
    parts = query(project(a, plan), plan) + 2 * query(project(b, plan), plan)
    torch.testing.assert_close(joined, parts, atol=2e-3, rtol=0)


def test_output_scale_lowers_the_weighted_error() -> None:
    weight = torch.randn(200, 64, generator=torch.Generator().manual_seed(0))
    moment = torch.rand(64, generator=torch.Generator().manual_seed(1)).pow(3) + 1e-3
    plans = [
        build_plan(
            (200, 64), moment, SketchConfig(bits_per_weight=2.0, output_scale=scaled), "layer", bits_per_weight=rate
        )
        for scaled, rate in ((False, 2.0), (True, 2.0 + 8 / 64))
    ]
    errors = [float(((query(project(weight, p, moment), p) - weight).square() * moment).sum()) for p in plans]
    assert errors[1] < errors[0]


@given(configs(), st.integers(0, 3))
@settings(max_examples=40, deadline=None)
def test_degenerate_weights_decode_to_something_finite(config: SketchConfig, kind: int) -> None:
    shape = (80, 40)  # in a smaller one tables of wide states in several rows alone take more than some of the rates
    weight = [torch.zeros(shape), torch.full(shape, -3.0), torch.full(shape, 1e-38), torch.eye(*shape)][kind]
    plan = build_plan(shape, None, config, "layer")
    decoded = query(project(weight, plan), plan)
    assert bool(torch.isfinite(decoded).all())
    if kind == 0 and config.state_bits > 1 and config.allocation != "waterfill":
        assert not bool(decoded.any())


@pytest.mark.parametrize("size", [1e18, 1e25, 1e37, 1e38, 3.4e38])
@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_sums_beyond_float32_decode_to_something_finite(operator: str, bits: int, size: float) -> None:
    sign = torch.randn(48, 20, generator=torch.Generator().manual_seed(0)).sign()
    weight = size * (0.5 + 0.5 * torch.rand(48, 20, generator=torch.Generator().manual_seed(1))) * sign
    config = SketchConfig(bits_per_weight=8.0, rows=2, operator=operator, state_bits=bits, output_scale=True)
    plan = build_plan((48, 20), None, config, "layer")
    states = project(weight, plan)
    assert bool(torch.isfinite(query(states, plan)).all())
    assert read_plan(pack_layer(plan, states), plan.shape, config, "layer").classes == plan.classes


def test_shape_mismatch_names_both_shapes() -> None:
    plan = build_plan((64, 32), None, SketchConfig(bits_per_weight=2.0), "layer.q")
    with pytest.raises(ValueError, match=r"layer\.q.*\(32, 64\).*\(64, 32\)"):
        project(torch.zeros(32, 64), plan)


@given(layers(operator="absmaxmin", state_bits=16, allocation="proportional", output_scale=False))
@settings(max_examples=40, deadline=None)
def test_winners_are_the_members_that_states_keep(layer: tuple[Tensor, Plan, Tensor]) -> None:
    weight, plan, _ = layer
    winners = torch.zeros(plan.num_states, dtype=torch.int16)
    states = project(weight, plan, winners=winners)
    scales = channel_scales(states, plan)
    for block in plan.blocks:
        for at, channel in enumerate(block.channels.tolist()):
            place = block.first_state + at * block.states_per_channel
            for span in plan.spans:
                load = plan.placement(block.choice, span.size).load
                for group in range(span.first_group, span.first_group + span.groups):
                    turn = first_rotation(plan.key, span.size) + plan.rotation_step * (group * plan.shape[1] + channel)
                    for row_load in load:
                        for members in row_load.tolist():
                            first_row = span.start + (group - span.first_group) * span.size
                            kept = weight[first_row + (int(winners[place]) + turn) % span.size, channel]
                            value = float(states["codes"][place]) * float(scales[channel])
                            if members:
                                assert abs(value - float(kept)) <= 1.01 * float(scales[channel])
                            place += 1
