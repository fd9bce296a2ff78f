from __future__ import annotations

import json
import warnings
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_run
import torch
from tiny_run import Settings

from usllm.callbacks import SketchHealth, sketch_health
from usllm.callbacks.running_loss import RunningLoss
from usllm.callbacks.sketch_health import explosion_cause
from usllm.compress import CompressionReport, Fact, LayerReport
from usllm.training import SketchFinetuner

QUIET = {"perplexity_max": 1e9, "occupancy_min": 0.0, "allocation_variation_max": 1e9, "warmup_steps": 0}


def trained(folder: Path, settings: Settings | None = None, **health: Any) -> tuple[SketchHealth, list[str], Any]:
    """Run with an own health callback; its warnings are returned."""
    callback = SketchHealth(**(QUIET | health))

    def replaced(*extra: Any, **_: Any) -> SketchHealth:
        return callback

    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        patch.setattr(tiny_run, "SketchHealth", replaced)
        trainer, _ = tiny_run.run(folder, settings or Settings(steps=4))
    return callback, [str(w.message) for w in caught if "sketch health" in str(w.message)], trainer


def layer(name: str = "layer", **changes: Any) -> LayerReport:
    values: dict[str, Any] = {
        "name": name,
        "shape": (8, 8),
        "bits": 32,
        "bits_per_weight": 0.5,
        "importance": 1.0,
        "relative_error": 0.5,
        "sections": {},
        "facts": {"states": Fact(8), "occupancy": Fact(1.0), "load_mean": Fact(8.0)},
    }
    return LayerReport(**(values | changes))


def report(*layers: LayerReport) -> CompressionReport:
    return CompressionReport(layers=layers, compressed_weights=64 * len(layers), other_parameters=10)


def losses(*values: float) -> RunningLoss:
    running = RunningLoss()
    for step, value in enumerate(values, start=1):
        running.update(value, step)
    return running


def test_healthy_run_warns_of_nothing_and_says_so(tmp_path: Path) -> None:
    callback, messages, _ = trained(tmp_path / "run")
    assert not messages
    assert callback.health["healthy"]
    assert callback.health["warnings"] == []
    assert callback.health["occupancy"]["value"] == 1.0
    assert callback.health["perplexity"]["source"] == "validation"
    assert callback.health["loss_stability"] == {"value": None, "limit": 2.0, "ok": None}


def test_report_is_plain_python(tmp_path: Path) -> None:
    callback, _, _ = trained(tmp_path / "run")
    json.dumps(callback.health, allow_nan=False)


def test_explosion_is_warned_of_once_with_a_cause_and_training_goes_on(tmp_path: Path) -> None:
    callback, messages, trainer = trained(tmp_path / "run", perplexity_max=2.0)
    assert len(messages) == 1
    assert "limit 2. Likely cause:" in messages[0]
    assert trainer.global_step == 4
    assert not callback.health["healthy"]
    assert [warning["check"] for warning in callback.health["warnings"]] == ["perplexity"]


def test_explosion_during_warm_up_is_none(tmp_path: Path) -> None:
    _, messages, _ = trained(tmp_path / "run", perplexity_max=2.0, warmup_steps=4)
    assert not messages


def test_run_stops_when_told_to_and_its_last_step_is_saved(tmp_path: Path) -> None:
    callback, _, trainer = trained(tmp_path / "run", perplexity_max=2.0, warmup_steps=2, stop=True)
    assert trainer.global_step == 3
    assert (tmp_path / "run" / "checkpoints" / "step=00000003.ckpt").exists()
    assert not callback.health["healthy"]


def test_training_loss_of_a_distillation_is_no_perplexity(tmp_path: Path) -> None:
    settings = Settings(steps=2, objective={"name": "distill"}, validate_every=4)
    callback, messages, _ = trained(tmp_path / "run", settings, perplexity_max=2.0)
    assert len(messages) == 1
    assert "(validation)" in messages[0]
    assert callback.health["warnings"][0]["step"] == 2


def test_empty_states_are_warned_of_with_layer_and_cause(tmp_path: Path) -> None:
    settings = Settings(steps=1, validate_every=2, sketch={"bits_per_weight": 2.0, "hash": "uniform"})
    callback, messages, _ = trained(tmp_path / "run", settings, occupancy_min=0.999)
    assert len(messages) == 1
    assert "have no member" in messages[0]
    assert "sketch.hash=balanced leaves none" in messages[0]
    assert callback.health["occupancy"]["layer"] in messages[0]


def test_uneven_layers_are_warned_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uneven = report(layer(), layer(bits_per_weight=1.5))
    monkeypatch.setattr(sketch_health, "compression_report", lambda model: uneven)
    callback, messages, _ = trained(tmp_path / "run", allocation_variation_max=0.2)
    assert len(messages) == 1
    assert "vary by 50% across layers (limit 20%)" in messages[0]
    assert callback.health["allocation_variation"] == {"value": 0.5, "limit": 0.2, "ok": False}


def test_layers_that_were_to_differ_are_not_warned_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sketch_health, "compression_report", lambda model: report(layer(), layer(bits_per_weight=1.5)))
    monkeypatch.setattr(sketch_health, "_even", lambda module: False)
    callback, messages, _ = trained(tmp_path / "run", allocation_variation_max=0.2)
    assert not messages
    assert callback.health["allocation_variation"] == {"value": 0.5, "limit": None, "ok": None}


def test_new_allocation_is_looked_at_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[int] = []

    def look(self: SketchHealth, trainer: Any, module: SketchFinetuner) -> None:
        looked.append(trainer.global_step)
        whole(self, trainer, module)

    whole = SketchHealth._check_structure
    monkeypatch.setattr(SketchHealth, "_check_structure", look)
    trained(tmp_path / "run", Settings(steps=5, accumulate=1, reallocate_every=2, validate_every=5))
    assert looked == [0, 2, 4]


def test_loss_as_steady_as_the_reference_s_is_stable(tmp_path: Path) -> None:
    reference = reference_of(tmp_path, scale=1.0)
    callback, messages, _ = trained(tmp_path / "run", reference_losses=reference)
    assert not messages
    assert callback.health["loss_stability"]["value"] == pytest.approx(1.0, rel=1e-3)


def test_loss_that_jumps_more_than_the_reference_s_is_warned_of(tmp_path: Path) -> None:
    reference = reference_of(tmp_path, scale=0.25)
    callback, messages, _ = trained(tmp_path / "run", reference_losses=reference)
    assert len(messages) == 1
    assert "4.0 times as much from step to step as in the floating-point run" in messages[0]
    assert callback.health["loss_stability"]["ok"] is False


def reference_of(tmp_path: Path, scale: float) -> str:
    """Losses whose relative changes are ``scale`` times those of the run."""
    tiny_run.run(tmp_path / "first" / "run", Settings(steps=4))
    recorded = tiny_run.record(tmp_path / "first" / "run")
    micro = [float.fromhex(value[0]) for (kind, _), value in recorded.items() if kind == "train"]
    own = [sum(micro[i : i + 2]) for i in range(0, len(micro), 2)]
    reference = own[:1]
    for before, after in pairwise(own):
        reference.append(reference[-1] * (1 + scale * (after - before) / before))
    path = tmp_path / "metrics.csv"
    path.write_text("step,train/loss\n" + "".join(f"{i},{value!r}\n" for i, value in enumerate(reference)))
    return str(path)


def test_resumed_run_gives_the_same_report(tmp_path: Path) -> None:
    settings = Settings(steps=6)
    whole, _, _ = trained(tmp_path / "whole" / "run", settings, perplexity_max=2.0)
    with pytest.raises(tiny_run.Killed):
        trained(
            tmp_path / "killed" / "run", replace(settings, kill_at=("on_train_batch_start", 10)), perplexity_max=2.0
        )
    resumed, messages, _ = trained(tmp_path / "killed" / "run", settings, perplexity_max=2.0)
    assert not messages  # it had warned before the kill
    assert resumed.health == whole.health


def test_run_resumed_behind_its_last_step_still_reports(tmp_path: Path) -> None:
    whole, _, _ = trained(tmp_path / "run")
    again, _, trainer = trained(tmp_path / "run")
    assert trainer.global_step == 4
    assert again.health == whole.health


def test_cause_of_a_loss_that_rose_is_divergence() -> None:
    cause = explosion_cause(losses(5.0, *[4.0] * 50, *[12.0] * 20), report(layer()), "proportional")
    assert "divergence" in cause
    assert "optimizer.lr" in cause


def test_cause_under_uniform_allocation_is_the_allocation() -> None:
    assert "allocation.name=uniform" in explosion_cause(losses(9.0), report(layer()), "uniform")


def test_cause_with_a_layer_worse_than_zero_is_the_initialisation() -> None:
    cause = explosion_cause(losses(9.0), report(layer(), layer("broken", relative_error=1.3)), "proportional")
    assert "a broken initialisation, broken" in cause


def test_cause_otherwise_is_collisions_with_the_worst_layer_s_load() -> None:
    worst = layer("worst", relative_error=0.9, facts={"load_mean": Fact(24.0)})
    cause = explosion_cause(losses(9.0), report(layer(), worst), "proportional")
    assert "too many collisions, 24.0 weights share a state on average in worst" in cause


def test_sanity_check_before_training_is_not_judged() -> None:
    callback = SketchHealth(**QUIET | {"perplexity_max": 1.0})
    trainer: Any = SimpleNamespace(sanity_checking=True, callback_metrics={"val/ppl": torch.tensor(5.0)})
    callback.on_validation_end(trainer, SketchFinetuner.__new__(SketchFinetuner))
    assert callback.state_dict()["warnings"] == []
