"""The examples of the page do what they say."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from started import work_in

from usllm.compress import compressed_layers
from usllm.sketch import SketchConfig, build_plan, project, query
from usllm.sketch.operators import OPERATORS
from usllm.stages import Work

pytestmark = pytest.mark.usefixtures("example_plugin")


def plan_of(importance: torch.Tensor, rows: int, **options: Any) -> Any:
    config = SketchConfig(bits_per_weight=2.0, rows=rows, rounding="nearest", **options)
    return build_plan((32, len(importance)), importance, config, "layer")


def test_rule_leaves_out_channels_of_little_importance() -> None:
    importance = torch.tensor([0.01, 1.0, 1.0, 0.01, 1.0, 1.0, 1.0, 1.0]).repeat(4)
    plan = plan_of(importance, 1, group_size=32, allocation="every_second", min_importance=0.5)
    held = plan.channel_class.bool()
    assert bool(held.any()) and not bool(held[importance < 0.5].any())
    kept = (importance >= 0.5).nonzero().flatten()
    assert held.nonzero().flatten().tolist() == kept[::2].tolist()


@pytest.mark.parametrize("load", [1, 2, 3, 4])
def test_operator_takes_the_lower_median(load: int) -> None:
    operator = OPERATORS["lower_median"]
    members = torch.randn(1, load, 5, 7, generator=torch.Generator().manual_seed(load))
    slots = torch.cat([members, torch.full_like(members[:, :2], operator.pad)], 1)
    states = operator.decode(operator.reduce(slots, torch.full((1, 5, 1), load, dtype=torch.int32)))
    assert torch.equal(states, members.median(1).values)
    empty = operator.reduce(torch.full((1, 2, 5, 7), operator.pad), torch.zeros(1, 5, 1, dtype=torch.int32))
    assert bool((operator.decode(empty) == 0).all())


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("hash_name", ["balanced", "uniform"])
def test_operator_goes_from_weights_to_weights(rows: int, hash_name: str) -> None:
    importance, weight = torch.ones(16), torch.randn(32, 16, generator=torch.Generator().manual_seed(0))
    plan = plan_of(importance, rows, group_size=16, operator="lower_median", hash=hash_name, straight_through="state")
    decoded = query(project(weight, plan), plan)
    assert bool(decoded.isfinite().all()) and bool((decoded != 0).any())
    assert float((decoded - weight).norm()) < float(weight.norm())


def test_stage_that_was_killed_reads_what_it_had_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    noise = import_module("example_plugin.noise").Noise

    def after(work: Work) -> list[torch.Tensor]:
        noise().run(work)
        return [latent for layer in compressed_layers(work.model).values() for latent in layer.latents.values()]

    first = after(work_in(tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr(noise, "noise", None)  # whoever calls it fails
        again = after(work_in(tmp_path))
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
    other = after(work_in(tmp_path, seed=1))
    assert not any(torch.equal(one, two) for one, two in zip(first, other, strict=True))
