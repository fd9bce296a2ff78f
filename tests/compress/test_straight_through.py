"""The estimator alone: what goes forward is the decoded weight, what comes back reaches only the latent one."""

from __future__ import annotations

import pytest
import torch

from usllm.compress.straight_through import scale_gradient, straight_through


@pytest.fixture
def latent() -> torch.Tensor:
    return torch.randn(5, 7, generator=torch.Generator().manual_seed(0)).requires_grad_()


def test_forward_is_the_decoded_weight_bit_for_bit(latent: torch.Tensor) -> None:
    decoded = torch.randn(5, 7)
    assert torch.equal(straight_through(latent, decoded), decoded)


def test_gradient_reaches_the_latent_weight_unchanged(latent: torch.Tensor) -> None:
    gradient = torch.randn(5, 7)
    straight_through(latent, torch.zeros(5, 7)).backward(gradient)
    assert latent.grad is not None
    assert torch.equal(latent.grad, gradient)


def test_gradient_of_a_bf16_weight_arrives_in_fp32(latent: torch.Tensor) -> None:
    gradient = torch.randn(5, 7).bfloat16()
    straight_through(latent, torch.zeros(5, 7, dtype=torch.bfloat16)).backward(gradient)
    assert latent.grad is not None
    assert latent.grad.dtype == torch.float32
    assert torch.equal(latent.grad, gradient.float())


def test_no_gradient_reaches_the_decoded_weight(latent: torch.Tensor) -> None:
    decoded = torch.randn(5, 7, requires_grad=True)
    straight_through(latent, decoded).sum().backward()
    assert decoded.grad is None


def test_values_of_the_latent_weight_do_not_enter(latent: torch.Tensor) -> None:
    decoded = torch.randn(5, 7)
    with torch.no_grad():
        latent.fill_(torch.nan)
    result = straight_through(latent, decoded)
    result.square().sum().backward()
    assert latent.grad is not None
    assert torch.equal(latent.grad, 2 * decoded)


def test_nothing_is_recorded_for_a_frozen_latent_weight(latent: torch.Tensor) -> None:
    assert not straight_through(latent.detach(), torch.zeros(5, 7)).requires_grad


@pytest.mark.parametrize("tokens", [(6,), (2, 3)])
@pytest.mark.parametrize("bias", [None, torch.arange(5.0)], ids=["", "bias"])
def test_a_gain_gets_the_gradient_of_the_scales_that_it_is_the_logarithm_of(
    tokens: tuple[int, ...], bias: torch.Tensor | None
) -> None:
    x, weight, gradient = torch.randn(*tokens, 4), torch.randn(5, 4), torch.randn(*tokens, 5)
    gain = torch.randn(5).requires_grad_()
    (x @ (weight * gain.exp()[:, None]).t()).backward(gradient)
    ours = gain.detach().clone().requires_grad_()
    y = torch.nn.functional.linear(x, weight * gain.detach().exp()[:, None], bias)
    assert torch.equal(scale_gradient(y, ours, bias), y)
    scale_gradient(y, ours, bias).backward(gradient)
    assert ours.grad is not None and gain.grad is not None
    torch.testing.assert_close(ours.grad, gain.grad)
