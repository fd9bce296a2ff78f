"""The estimator alone: what goes forward is the decoded weight, what comes back reaches only the latent one."""

from __future__ import annotations

import pytest
import torch

from usllm.compress.straight_through import straight_through


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
