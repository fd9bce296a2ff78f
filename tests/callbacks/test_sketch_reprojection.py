from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import tiny_run
import torch
from lightning.pytorch import Callback
from tiny_run import Settings
from torch import Tensor

from usllm.callbacks import SketchReprojection, sketch_reprojection
from usllm.compress import Statistics, compressed_layers
from usllm.sketch import project
from usllm.system.errors import UserError
from usllm.training import SketchFinetuner

LAYER = "model.layers.0.mlp.up_proj"


def states_of(module: SketchFinetuner) -> Tensor:
    return compressed_layers(module.network)[LAYER].states["codes"].clone()


def is_projected(module: SketchFinetuner) -> bool:
    """Whether every layer's states are those of its latent weight."""
    for layer in compressed_layers(module.network).values():
        assert layer.plan is not None
        fresh = project(layer.weight.detach(), layer.plan, layer.importance)
        if any(not torch.equal(fresh[name], tensor) for name, tensor in layer.states.items()):
            return False
    return True


class Watch(Callback):
    """States at the start of each micro batch, and whether they follow the latents there and at validation."""

    def __init__(self) -> None:
        self.states: list[Tensor] = []
        self.projected: list[bool] = []
        self.projected_in_validation: list[bool] = []
        self.metrics: list[dict[str, float]] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.states.append(states_of(pl_module))
        self.projected.append(is_projected(pl_module))
        self.metrics.append({name: float(value) for name, value in trainer.callback_metrics.items()})

    def on_validation_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.projected_in_validation.append(is_projected(pl_module))


def moved(states: list[Tensor]) -> list[bool]:
    return [not torch.equal(a, b) for a, b in pairwise(states)]


def test_states_follow_each_optimizer_step_and_no_micro_batch_in_between(tmp_path: Path) -> None:
    watch = Watch()
    tiny_run.run(tmp_path / "run", Settings(steps=4, lr=0.01, validate_every=8, checkpoint_every=100), watch)
    # the first step's learning rate is 0
    assert moved(watch.states) == [False, False, False, True, False, True, False]
    assert all(watch.projected)


def test_states_stay_between_projections_while_latents_move(tmp_path: Path) -> None:
    watch = Watch()
    settings = Settings(steps=6, accumulate=1, lr=0.01, project_every=3, validate_every=6, checkpoint_every=100)
    tiny_run.run(tmp_path / "run", settings, watch)
    assert moved(watch.states) == [False, False, True, False, False]
    assert watch.projected == [True, True, False, True, False, False]


def test_validation_sees_the_sketch_of_the_latents(tmp_path: Path) -> None:
    watch = Watch()
    settings = Settings(steps=4, accumulate=1, lr=0.01, project_every=100, validate_every=2, checkpoint_every=100)
    tiny_run.run(tmp_path / "run", settings, watch)
    assert watch.projected_in_validation
    assert all(watch.projected_in_validation)
    assert watch.projected == [True, True, True, False]


def test_checkpoint_and_end_of_training_hold_the_sketch_of_the_latents(tmp_path: Path) -> None:
    settings = Settings(steps=5, accumulate=1, lr=0.01, project_every=100, validate_every=5, checkpoint_every=3)
    _, module = tiny_run.run(tmp_path / "run", settings)
    assert is_projected(module)
    saved = torch.load(tmp_path / "run" / "checkpoints" / "step=00000003.ckpt", weights_only=True)["state_dict"]
    layer = compressed_layers(module.network)[LAYER]
    assert layer.plan is not None
    name = f"model.{LAYER}"
    fresh = project(saved[f"{name}.weight"], layer.plan, saved[f"{name}.importance"])
    assert torch.equal(saved[f"{name}.state_codes"], fresh["codes"])


def test_change_and_error_are_logged_as_means_over_layers(tmp_path: Path) -> None:
    watch = Watch()
    settings = Settings(steps=4, accumulate=1, lr=0.01, validate_every=4, checkpoint_every=100)
    trainer, _ = tiny_run.run(tmp_path / "run", settings, watch)
    last = next(c for c in trainer.callbacks if isinstance(c, SketchReprojection)).last  # type: ignore[attr-defined]
    for name in ("winner_change", "relative_error"):
        values = [getattr(layer, name) for layer in last.values()]
        assert trainer.callback_metrics[f"sketch/{name}"].item() == pytest.approx(sum(values) / len(values))
        assert 0 < sum(values) / len(values) < 1


def test_space_is_shared_out_anew_every_m_steps_and_the_optimizer_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[int] = []
    whole = sketch_reprojection.measure_statistics

    def spy(*arguments: Any, **options: Any) -> dict[str, Statistics]:
        steps.append(len(watch.states))  # a micro batch is a step here
        measured = whole(*arguments, **options)
        # so that plans have to change
        return {name: Statistics(energy=found.energy.flip(0)) for name, found in measured.items()}

    monkeypatch.setattr(sketch_reprojection, "measure_statistics", spy)
    watch = Watch()
    settings = Settings(steps=4, accumulate=1, reallocate_every=2, validate_every=4, checkpoint_every=100)
    trainer, module = tiny_run.run(tmp_path / "run", settings, watch)
    assert steps == [2]  # and not behind the last step, where it would only do harm
    assert watch.states[2].shape != watch.states[1].shape or moved(watch.states)[1]
    assert all(watch.projected)
    weight = compressed_layers(module.network)[LAYER].weight
    assert trainer.optimizers[0].state[weight]["step"].item() == 4


@pytest.mark.parametrize("name", ["every_n_steps", "reallocate_every_n_steps", "calibration_sequences"])
def test_interval_below_one_is_refused(name: str) -> None:
    with pytest.raises(UserError, match=rf"callbacks\.sketch_reprojection\.{name}=0"):
        SketchReprojection(**{name: 0})
