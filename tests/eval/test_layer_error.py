"""The output error and its lower bound, against explicit activations and closed forms."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from usllm.eval.layer_error import rate_distortion_bound, relative_output_error
from usllm.sketch import SketchConfig, build_plan, project, query

RATES = (0.25, 0.5, 1.0, 3.0)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def signs(out: int, channels: int) -> Tensor:
    """A weight whose channels all have the same energy."""
    return random(out, channels).sign()


def test_error_is_that_of_the_outputs_for_explicit_activations() -> None:
    mixing = random(12, 12, seed=1)
    activations = random(500, 12, seed=2) @ mixing  # correlated channels
    weight, decoded = random(20, 12, seed=3), random(20, 12, seed=4)
    expected = (activations @ (decoded - weight).T).square().sum() / (activations @ weight.T).square().sum()
    found = relative_output_error(weight, decoded, activations.T @ activations / 500)
    assert found == pytest.approx(float(expected), rel=1e-5)
    diagonal = relative_output_error(weight, decoded, (activations.square().mean(0)).diag())
    assert found != pytest.approx(diagonal, rel=0.01)  # the full moment enters, not only its diagonal


def test_layer_of_zeros_has_error_one_and_the_layer_itself_none() -> None:
    weight, moment = random(20, 12), torch.eye(12)
    assert relative_output_error(weight, torch.zeros(20, 12), moment) == 1.0
    assert relative_output_error(weight, weight, moment) == 0.0


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("scale", [1.0, 1e-4, 1e4])
def test_bound_of_white_inputs_is_two_to_minus_two_rate(rate: float, scale: float) -> None:
    assert rate_distortion_bound(random(20, 12), scale * torch.eye(12), rate) == pytest.approx(2 ** (-2 * rate))


@pytest.mark.parametrize("rate", [1.0, 2.0, 4.0])
def test_bound_of_two_levels_is_their_geometric_mean_where_both_are_coded(rate: float) -> None:
    spectrum = torch.tensor([4.0, 1.0]).repeat(6)
    expected = 2 ** (-2 * rate) * (4 * 1) ** 0.5 / 2.5
    assert rate_distortion_bound(signs(20, 12), spectrum.diag(), rate) == pytest.approx(expected)


@pytest.mark.parametrize("rate", [0.1, 0.25, 0.5])
def test_bound_of_two_levels_spends_a_low_rate_on_the_higher_alone(rate: float) -> None:
    # Half of the channels take all bits, twice the rate each; at rate 1/2 they have come down to the others.
    spectrum = torch.tensor([4.0, 1.0]).repeat(6)
    expected = (4 * 2 ** (-2 * (2 * rate)) + 1) / 5
    assert rate_distortion_bound(signs(20, 12), spectrum.diag(), rate) == pytest.approx(expected)


def test_bound_depends_on_the_spectrum_not_on_the_axes() -> None:
    rotation = torch.linalg.qr(random(12, 12, seed=5).double())[0]
    moment = rotation @ torch.linspace(0.1, 5, 12).double().diag() @ rotation.T
    weight = torch.linalg.qr(random(12, 12, seed=6).double())[0]  # the same energy along every direction
    aligned = rate_distortion_bound(weight, torch.linspace(0.1, 5, 12).diag(), 0.7)
    assert rate_distortion_bound(weight, moment, 0.7) == pytest.approx(aligned)


def test_bound_of_inputs_that_span_few_directions_is_lower() -> None:
    activations = random(100, 3, seed=7) @ random(3, 12, seed=8)
    moment = activations.T @ activations / 100
    assert rate_distortion_bound(random(200, 12), moment, 0.5) < 0.5 * 2 ** (-2 * 0.5)


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("allocation", ["proportional", "waterfill"])
def test_no_sketch_of_normal_weights_is_below_the_bound(rate: float, allocation: str) -> None:
    weight = random(512, 320)
    importance = torch.logspace(-1, 1, 320)
    plan = build_plan(weight.shape, importance, SketchConfig(bits_per_weight=rate, allocation=allocation), "layer")
    decoded = query(project(weight, plan, importance), plan)
    error = relative_output_error(weight, decoded, importance.diag())
    assert rate_distortion_bound(weight, importance.diag(), plan.bits_per_weight) < error
