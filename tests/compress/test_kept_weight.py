"""The weight that a layer keeps between forward passes, for every method and every kind of optimizer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from every_method import cases, compressor_of, planned, random
from torch import Tensor, nn

from usllm.compress import CompressedLinear

OPTIMIZERS = {
    "plain": lambda latents: torch.optim.AdamW(latents, 0.5, foreach=False),
    "foreach": lambda latents: torch.optim.AdamW(latents, 0.5, foreach=True),
    "fused": lambda latents: torch.optim.AdamW(latents, 0.5, fused=True),
    "fused SGD": lambda latents: torch.optim.SGD(latents, 0.02, fused=True),
}


@cases
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("looks", [False, True], ids=["", "measured before the step"])
def test_every_forward_pass_is_that_of_the_latents_after_each_step(
    name: str, options: dict[str, Any], optimizer: str, precision: torch.dtype, looks: bool
) -> None:
    plan, weight, statistics = planned(compressor_of(name, options), (33, 41))
    latents, x = plan.start(weight, statistics), random(5, 41, seed=3)

    def built(latents: dict[str, Tensor]) -> CompressedLinear:
        layer = CompressedLinear(nn.Linear(41, 33, bias=False), "layer")
        layer.set_plan(plan, statistics.energy, latents)
        layer.reproject()
        return layer

    def computed(layer: CompressedLinear, trains: bool) -> Tensor:
        with torch.set_grad_enabled(trains), torch.autocast("cpu", torch.bfloat16, precision == torch.bfloat16):
            return layer(x)

    layer = built(latents)
    steps = OPTIMIZERS[optimizer](layer.latents.values())
    seen = []
    for _ in range(3):
        computed(layer, False)  # measured, trained, measured
        computed(layer, True).float().square().sum().backward()
        if looks:  # as a callback may
            computed(layer, False)
        steps.step()
        steps.zero_grad()
        if plan.stored_states:
            layer.reproject()
        fresh = built(layer.whole_latents())
        for trains in (False, True):
            seen.append(computed(layer, trains))
            assert torch.equal(seen[-1], computed(fresh, trains))
    assert not torch.equal(seen[0], seen[-1])


@cases
@pytest.mark.parametrize("keeps", [True, False])
def test_off_its_devices_a_decoded_weight_is_multiplied_where_one_is_kept_anyway(
    name: str, options: dict[str, Any], keeps: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, weight, statistics = planned(compressor_of(name, options), (33, 41))
    decodes, stored = bool(plan.decodes_on), plan.stored_states
    monkeypatch.setattr(type(plan), "decodes_on", frozenset({"elsewhere"}) if decodes else frozenset())
    layer = CompressedLinear(nn.Linear(41, 33, bias=False), "layer")
    layer.set_plan(plan, statistics.energy, plan.start(weight, statistics))
    layer.keeps_decoded = keeps
    layer.reproject()
    given: list[bool] = []
    linear = type(plan).linear

    def noted(self: Any, *args: Any, decoded: Tensor | None = None) -> Tensor:
        given.append(decoded is not None)
        return linear(self, *args, decoded=decoded)

    monkeypatch.setattr(type(plan), "linear", noted)
    layer(random(5, 41, seed=3))
    assert given == [decodes and stored and keeps]
