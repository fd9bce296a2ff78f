"""E[a²] streamed while a model runs, against a direct computation over all inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from usllm.calibration import SecondMoments
from usllm.models.random_model import random_model


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def direct(inputs: list[Tensor]) -> Tensor:
    """E[a aᵀ] in double precision."""
    rows = torch.cat([value.reshape(-1, value.shape[-1]) for value in inputs]).double()
    return rows.T @ rows / len(rows)


def assert_moments(found: Tensor, inputs: list[Tensor]) -> None:
    torch.testing.assert_close(found.double(), direct(inputs).diagonal(), rtol=1e-5, atol=0)
    assert found.dtype == torch.float32


class TwoLayers(nn.Module):
    """``b`` reads what ``between`` makes of the input of ``a``."""

    def __init__(self, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 4), nn.Linear(6, 4)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        first: Tensor = self.a(x)
        return first + self.b(self.between(x))

    def layers(self) -> dict[str, nn.Module]:
        return {"a": self.a, "b": self.b}


@pytest.fixture
def computations(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The inputs whose moment was computed, one for each computation."""
    seen: list[Tensor] = []
    compute = SecondMoments._moment

    def counted(self: SecondMoments, value: Tensor) -> Tensor:
        seen.append(value.clone())
        return compute(self, value)

    monkeypatch.setattr(SecondMoments, "_moment", counted)
    return seen


@pytest.mark.parametrize("full", [False, True], ids=["diagonal", "full"])
def test_several_batches_of_any_shape_equal_a_direct_computation(full: bool) -> None:
    layer = nn.Linear(6, 4)
    batches = [random(3, 5, 6, seed=1), random(7, 6, seed=2) * 10, random(1, 1, 1, 6, seed=3), random(6, seed=4)]
    with SecondMoments({"layer": layer}, full) as moments:
        for batch in batches:
            layer(batch)
    assert_moments(moments.mean()["layer"], batches)
    if full:
        torch.testing.assert_close(moments.full_mean()["layer"].double(), direct(batches), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("full", [False, True], ids=["diagonal", "full"])
@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_every_linear_of_a_model_equals_a_direct_computation(architecture: str, full: bool) -> None:
    model = random_model(architecture).eval()
    layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    inputs: dict[str, list[Tensor]] = {name: [] for name in layers}
    for name, layer in layers.items():
        layer.register_forward_pre_hook(lambda _, args, name=name: inputs[name].append(args[0].detach().clone()))
    with torch.no_grad(), SecondMoments(layers, full) as moments:
        for seed in range(3):
            ids = torch.randint(0, 256, (2, 8 + seed), generator=torch.Generator().manual_seed(seed))
            model(input_ids=ids, use_cache=False)
    for name, found in moments.mean().items():
        assert_moments(found, inputs[name])


def test_inputs_shared_by_layers_are_computed_once_and_counted_for_each(computations: list[Tensor]) -> None:
    model = TwoLayers(lambda x: x)
    batches = [random(5, 6, seed=1), random(5, 6, seed=2)]
    with SecondMoments(model.layers()) as moments:
        for batch in batches:
            model(batch)
    assert len(computations) == len(batches)
    for name in ("a", "b"):
        assert_moments(moments.mean()[name], batches)


def test_sums_of_layers_that_share_an_input_are_their_own() -> None:
    model = TwoLayers(lambda x: x)
    first, second = random(5, 6, seed=1), random(5, 6, seed=2)
    with SecondMoments(model.layers()) as moments:
        model(first)
        model.a(second)
    assert_moments(moments.mean()["a"], [first, second])
    assert_moments(moments.mean()["b"], [first])


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_input_modified_in_place_is_not_taken_for_the_shared_one(mode: Callable[[], Any]) -> None:
    model = TwoLayers(lambda x: x.mul_(3))
    with mode(), SecondMoments(model.layers()) as moments:
        batch = random(5, 6)
        original = batch.clone()
        model(batch)
    assert_moments(moments.mean()["a"], [original])
    assert_moments(moments.mean()["b"], [original * 3])


def test_buffer_filled_anew_for_each_batch_is_measured_anew() -> None:
    layer, buffer = nn.Linear(6, 4), torch.empty(5, 6)
    batches = [random(5, 6, seed=seed) for seed in range(3)]
    with SecondMoments({"layer": layer}) as moments:
        for batch in batches:
            layer(buffer.copy_(batch))
    assert_moments(moments.mean()["layer"], batches)


def test_memory_of_a_freed_input_that_comes_back_is_measured_anew() -> None:
    layer = nn.Linear(6, 4)
    batches = [random(5, 6, seed=seed) for seed in range(20)]
    with torch.no_grad(), SecondMoments({"layer": layer}) as moments:
        for batch in batches:
            layer(batch * 1)  # freed after the call
    assert_moments(moments.mean()["layer"], batches)


@pytest.mark.parametrize(
    "view",
    [lambda x: x[:, :6], lambda x: x[:, 6:], lambda x: x[:2, :6], lambda x: x.as_strided((5, 6), (1, 5))],
    ids=["same", "other-columns", "fewer-rows", "other-strides"],
)
def test_views_of_one_tensor_are_told_apart(view: Callable[[Tensor], Tensor]) -> None:
    model = nn.ModuleDict({"a": nn.Linear(6, 4), "b": nn.Linear(6, 4)})
    base = random(5, 12)
    with SecondMoments({"a": model["a"], "b": model["b"]}) as moments:
        model["a"](base[:, :6])
        model["b"](view(base))
    assert_moments(moments.mean()["a"], [base[:, :6]])
    assert_moments(moments.mean()["b"], [view(base)])


def test_squares_of_bf16_inputs_are_summed_in_fp32() -> None:
    # In bf16 the sum would stop growing at 256.
    layer = nn.Linear(6, 4).bfloat16()
    batches = [random(4096, 6, seed=seed).bfloat16() for seed in range(2)]
    with torch.no_grad(), SecondMoments({"layer": layer}) as moments:
        for batch in batches:
            layer(batch)
    assert_moments(moments.mean()["layer"], batches)


@pytest.mark.parametrize("full", [False, True], ids=["diagonal", "full"])
def test_autocast_does_not_reach_the_sums(full: bool) -> None:
    layer, batch = nn.Linear(6, 4), random(512, 6)
    with torch.autocast("cpu", torch.bfloat16), SecondMoments({"layer": layer}, full) as moments:
        layer(batch)
    assert_moments(moments.mean()["layer"], [batch])


def test_measurement_goes_on_outside_of_inference_mode() -> None:
    layer, batch = nn.Linear(6, 4), random(5, 6)
    with SecondMoments({"layer": layer}) as moments:
        with torch.inference_mode():
            layer(batch)
        layer(batch)
    assert_moments(moments.mean()["layer"], [batch, batch])


def test_outputs_and_gradients_of_the_model_are_left_alone() -> None:
    model, batch = TwoLayers(lambda x: x), random(5, 6).requires_grad_()
    plain = model(batch)
    with SecondMoments(model.layers()) as moments:
        watched = model(batch)
    assert torch.equal(plain, watched)
    watched.sum().backward()
    assert not any(value.requires_grad for value in moments.mean().values())


def test_nothing_is_measured_outside_of_the_block_even_after_an_error() -> None:
    layer, batch = nn.Linear(6, 4), random(5, 6)
    moments = SecondMoments({"layer": layer})

    def run() -> None:
        with moments:
            layer(batch)
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        run()
    layer(batch * 100)
    assert not layer._forward_pre_hooks
    assert_moments(moments.mean()["layer"], [batch])


def test_layer_that_saw_nothing_is_named() -> None:
    model = TwoLayers(lambda x: x)
    with SecondMoments(model.layers()) as moments:
        model.a(random(5, 6))
    with pytest.raises(ValueError, match="b saw no input"):
        moments.mean()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_layer_whose_input_is_not_finite_is_named(value: float) -> None:
    model = TwoLayers(lambda x: torch.full_like(x, value))
    with SecondMoments(model.layers()) as moments:
        model(random(5, 6))
    with pytest.raises(ValueError, match="the input of b is not finite"):
        moments.mean()


def test_full_moments_that_were_not_asked_for_are_refused() -> None:
    layer = nn.Linear(6, 4)
    with SecondMoments({"layer": layer}) as moments:
        layer(random(5, 6))
    with pytest.raises(ValueError, match="full=True"):
        moments.full_mean()
