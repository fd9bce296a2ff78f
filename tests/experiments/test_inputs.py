"""What studies start from is measured once for all studies and runs of the same weights and text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from composing import composed

from usllm.config import check_train, plain_config
from usllm.experiments import inputs
from usllm.experiments.inputs import importance_of, model_of, text_of
from usllm.runs.finetune import finetune
from usllm.stages import calibrate


@pytest.fixture
def measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Who measures, with an empty cache."""
    monkeypatch.setenv("USLLM_CACHE", str(tmp_path / "cache"))
    calls: list[str] = []
    ordinary = calibrate.measure_statistics
    for module, name in ((inputs, "study"), (calibrate, "run")):

        def call(*arguments: Any, name: str = name, **more: Any) -> Any:
            calls.append(name)
            return ordinary(*arguments, **more)

        monkeypatch.setattr(module, "measure_statistics", call)
    return calls


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_measurement_serves_other_studies_and_runs_bit_for_bit(
    precision: str, tiny_text: Path, tmp_path: Path, measured: list[str]
) -> None:
    few = ["trainer.max_steps=1", "~callbacks.progress", "logger=none", f"trainer.precision={precision}"]
    cfg = composed("experiment=tiny", f"data.train.path={tiny_text}", f"run_dir={tmp_path}/run", *few)
    config = check_train(cfg)
    _, data = text_of(config)
    sequences = config.stages["calibrate"]["sequences"]  # type: ignore[index]

    first = importance_of(config, model_of(config), data, sequences)
    assert measured == ["study"]
    second = importance_of(config, model_of(config), data, sequences)
    assert measured == ["study"]
    cfg.reuse_statistics = False
    third = importance_of(check_train(cfg), model_of(config), data, sequences)
    assert measured == ["study", "study"]
    assert first.keys() == second.keys() == third.keys() != set()
    assert all(torch.equal(first[name], second[name]) and torch.equal(first[name], third[name]) for name in first)

    measured.clear()
    cfg.reuse_statistics = True
    finetune(check_train(cfg), plain_config(cfg), "usllm-train")
    assert measured == []
    saved = torch.load(max((tmp_path / "run" / "checkpoints").glob("*.ckpt")), weights_only=True)["state_dict"]
    for name, value in first.items():
        (found,) = [tensor for key, tensor in saved.items() if key.endswith(f"{name}.importance")]
        assert torch.equal(found, value)
