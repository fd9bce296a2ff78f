"""Binary factors: the formula and its gradients, the Dual-SVID start, ranks from budgets, bytes without trust."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy_littlebit import factors
from torch import Tensor

from usllm.compress import Statistics
from usllm.compress.budgets import BUDGETS, BudgetProblem, LayerDemand
from usllm.compress.methods.littlebit import LittleBitCompressor, LittleBitPlan
from usllm.littlebit import LittleBitConfig
from usllm.system.errors import PackedFormatError, UserError

NOTHING = Statistics(None)
SHAPE = (24, 40)


def random(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def of_rank(rank: int, shape: tuple[int, int] = SHAPE, **options: object) -> LittleBitPlan:
    config = LittleBitConfig(**options)  # type: ignore[arg-type]
    return LittleBitPlan("layer", shape, config, rank, config.paths)


def with_gradients(plan: LittleBitPlan, seed: int = 1) -> dict[str, Tensor]:
    """Latents and scales that fp16 holds exactly, some of them negative."""
    latents = {
        name: random(*spec.shape, seed=seed + number).half().float()
        for number, (name, spec) in enumerate(plan.latent_specs().items())
    }
    return {name: latent.requires_grad_() for name, latent in latents.items()}


class SmoothSign(torch.autograd.Function):
    @staticmethod
    def forward(ctx, latent: Tensor, slope: float) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(latent)
        ctx.slope = slope
        return torch.where(torch.signbit(latent), -1.0, 1.0).double()

    @staticmethod
    def backward(ctx, gradient: Tensor):  # type: ignore[no-untyped-def]
        (latent,) = ctx.saved_tensors
        slope = ctx.slope
        return (gradient * slope / torch.cosh(slope * latent).square() if slope else gradient), None


def by_formula(x: Tensor, latents: dict[str, Tensor], paths: int, slope: float) -> Tensor:
    """``Σ h ∘ (sign(U) (l ∘ (sign(V)ᵀ (g ∘ x))))`` in fp64."""
    total = torch.zeros((), dtype=torch.float64)
    for p in range(paths):
        u, v, h, l, g = (latents[f"{key}_{p}"] for key in ("u", "v", "h", "l", "g"))  # noqa: E741
        total = total + h * ((l * ((g * x) @ SmoothSign.apply(v, slope))) @ SmoothSign.apply(u, slope).T)
    return total


@pytest.mark.parametrize("slope", [0.0, 2.0])
@pytest.mark.parametrize("paths", [1, 2])
def test_forward_and_gradients_are_those_of_the_formula(paths: int, slope: float) -> None:
    plan = of_rank(7, paths=paths, slope=slope)
    latents = with_gradients(plan)
    wide = {name: latent.detach().double().requires_grad_() for name, latent in latents.items()}
    x = random(3, 5, SHAPE[1], seed=50).requires_grad_()
    bias, upstream = random(SHAPE[0], seed=51), random(3, 5, SHAPE[0], seed=52)
    wide_x = x.detach().double().requires_grad_()
    y = plan.linear(x, {}, latents, bias)
    expected = by_formula(wide_x, wide, paths, slope) + bias.double()
    torch.testing.assert_close(y, expected.float(), rtol=1e-4, atol=1e-3)
    y.backward(upstream)
    expected.backward(upstream.double())
    for name, latent in [*latents.items(), ("x", x)]:
        reference = wide[name].grad if name in wide else wide_x.grad
        assert latent.grad is not None
        assert reference is not None
        torch.testing.assert_close(latent.grad, reference.float(), rtol=1e-4, atol=2e-3, msg=name)


def test_scales_are_read_as_they_are_stored_and_their_gradient_passes() -> None:
    plan = of_rank(3)
    latents = {name: latent.detach() for name, latent in with_gradients(plan).items()}
    between = (latents["h_0"] * (1 + 2**-13)).requires_grad_()  # nearest in fp16: the old value
    x = random(2, SHAPE[1])
    y = plan.linear(x, {}, latents | {"h_0": between})
    assert torch.equal(y, plan.linear(x, {}, latents))
    y.sum().backward()
    assert between.grad is not None
    assert bool((between.grad != 0).all())


@given(
    shape=st.tuples(st.integers(1, 21), st.integers(1, 30)),
    rank=st.integers(1, 21),
    paths=st.sampled_from([1, 2]),
    seed=st.integers(0, 9),
)
@settings(max_examples=60, deadline=None)
def test_second_reader_finds_the_same_factors(shape: tuple[int, int], rank: int, paths: int, seed: int) -> None:
    plan = of_rank(min(rank, *shape), shape, paths=paths)
    states = plan.encode({n: v.detach() for n, v in with_gradients(plan, seed).items()}).states
    packed = plan.pack(states)
    read = plan.compressor.read(packed, shape, "layer")
    assert torch.equal(read.pack(read.unpack(packed)), packed)
    found = factors(packed.numpy().tobytes(), shape)
    for mine, theirs in zip(plan.factors(states, {}, torch.float32), found, strict=True):
        assert np.array_equal(theirs.view(np.int32), mine.numpy().view(np.int32))
    torch.testing.assert_close(plan.decode(states), torch.from_numpy(found[0] @ found[1].T), rtol=1e-5, atol=1e-4)


def test_negative_zero_is_one_sign_in_training_and_in_the_packed_layer() -> None:
    plan = of_rank(2, (2, 2))
    latents = {name: latent.detach() for name, latent in with_gradients(plan).items()}
    latents["u_0"] = torch.tensor([[0.0, -0.0], [-0.0, 0.0]])
    states = plan.unpack(plan.pack(plan.encode(latents).states))
    for trained, stored in zip(
        plan.factors({}, latents, torch.float32), plan.factors(states, {}, torch.float32), strict=True
    ):
        assert torch.equal(trained, stored)


def test_start_of_a_matrix_of_lower_rank_is_finite() -> None:
    plan = of_rank(6, paths=2)
    for weight in (torch.zeros(SHAPE), torch.outer(random(SHAPE[0]), random(SHAPE[1], seed=2))):
        assert all(latent.isfinite().all() for latent in plan.start(weight, NOTHING).values())
    with pytest.raises(UserError, match="layer: its weights are not finite"):
        plan.start(torch.full(SHAPE, torch.nan), NOTHING)


def error_of(plan: LittleBitPlan, weight: Tensor) -> float:
    decoded = plan.decode(plan.encode(plan.start(weight, NOTHING)).states)
    return float((weight - decoded).square().sum() / weight.square().sum())


def test_second_path_fits_what_the_first_one_leaves_and_ranks_lower_the_error() -> None:
    weight = random(64, 64) @ torch.diag(torch.linspace(2, 0.1, 64)) @ random(64, 64, seed=2)
    errors = [error_of(of_rank(rank, (64, 64), paths=paths), weight) for rank, paths in ((4, 1), (16, 1), (16, 2))]
    assert errors[0] < 1.0
    assert errors[0] > errors[1] > errors[2] + 0.05


def planned(shape: tuple[int, int], rate: float, **options: object) -> LittleBitPlan:
    compressor = LittleBitCompressor(LittleBitConfig(bits_per_weight=rate, **options))  # type: ignore[arg-type]
    return compressor.plan(shape, "layer", NOTHING, int(rate * shape[0] * shape[1]))


@pytest.mark.parametrize("paths", [1, 2])
@pytest.mark.parametrize("rate", [0.3, 0.5, 1.0])
@pytest.mark.parametrize("shape", [(576, 576), (192, 576), (1536, 577)])
def test_rank_is_the_largest_whose_signs_scales_and_header_fit(shape: tuple[int, int], rate: float, paths: int) -> None:
    plan = planned(shape, rate, paths=paths)
    (out, inputs), rank = shape, plan.rank
    signs = 8 * (-(-out * rank // 8) + -(-inputs * rank // 8))
    assert plan.total_bits == 32 + paths * (signs + 16 * (out + inputs + rank))
    assert plan.bits_per_weight <= rate
    more = of_rank(rank + 1, shape, paths=paths)
    assert more.bits_per_weight > rate


def test_rate_out_of_reach_is_refused_with_the_nearest_that_works() -> None:
    for rate, paths, way_out in (
        (0.01, 2, "raise it or take sketch.paths=1"),
        (2.0, 1, "lower it or take sketch.paths=2"),
    ):
        with pytest.raises(ValueError, match=rf"^sketch.bits_per_weight={rate:g}: layer \(192x576\)") as raised:
            planned((192, 576), rate, paths=paths)
        message = str(raised.value)
        assert message.endswith(way_out)
        works = next(float(word) for word in message.replace(",", "").split() if word.replace(".", "").isdigit())
        rank = planned((192, 576), works, paths=paths).rank
        assert rank == 1 if rate < 1 else rank >= 191  # of 192: the rate is said with four digits


def test_layer_too_small_takes_bits_from_the_others_where_the_budget_is_shared() -> None:
    compressor = LittleBitCompressor(LittleBitConfig(bits_per_weight=0.5, layer_budget="importance"))
    shapes = {"small": (32, 32), "large": (576, 576)}
    demands = {
        name: LayerDemand(shape[0] * shape[1], 1.0, compressor.least_bits(shape), compressor.most_bits(shape))
        for name, shape in shapes.items()
    }
    problem = BudgetProblem(demands, 0.5)
    shares = BUDGETS["importance"](problem)
    plans = {name: compressor.plan(shape, name, NOTHING, shares[name]) for name, shape in shapes.items()}
    assert plans["small"].rank == 1
    assert sum(plan.total_bits for plan in plans.values()) <= problem.bits


def replaced(data: Tensor, at: int, value: int) -> Tensor:
    changed = data.clone()
    changed[at] = value
    return changed


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda data: data[:3], "too few"),
        (lambda data: data[:-1], "asks for"),
        (lambda data: torch.cat([data, data[:1]]), "asks for"),
        (lambda data: replaced(data, 0, 3), "header"),
        (lambda data: replaced(data, 0, 2), "asks for"),
        (lambda data: replaced(data, 1, 0), "header"),
        (lambda data: replaced(data, 1, 6), "header"),
        (lambda data: replaced(data, 1, 2), "asks for"),
        (lambda data: replaced(data, 3, 1), "header"),
        (lambda data: replaced(data, 5, 0x7C), "not finite"),
        (lambda data: replaced(data, 11, 0xFC), "not finite"),
        (lambda data: replaced(data, -1, int(data[-1]) | 0x80), "after the end"),
        (lambda data: replaced(data, -4, int(data[-4]) | 0x80), "after the end"),
    ],
)
def test_damaged_layer_is_refused(damage: object, said: str) -> None:
    plan = of_rank(3, (5, 7))  # 15 and 21 bits of signs: both end inside a byte
    data = plan.pack(plan.encode({n: v.detach() for n, v in with_gradients(plan).items()}).states)
    with pytest.raises(PackedFormatError, match=f"^layer: .*{said}"):
        plan.compressor.read(damage(data), (5, 7), "layer")  # type: ignore[operator]


def test_unknown_format_is_refused_by_name_and_unknown_options_are_passed_over() -> None:
    assert LittleBitCompressor.from_format({}, {"paths": 2, "rotation": "itq"}).options.paths == 2
    with pytest.raises(ValueError, match="rotation"):
        LittleBitCompressor.from_format({"rotation": "itq"}, {})
