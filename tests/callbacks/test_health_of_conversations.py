"""The loss that health is judged by is the step's mean over its targets, whatever share of the places they are."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from usllm.callbacks import SketchHealth
from usllm.sketch import SketchConfig
from usllm.training import CrossEntropy, OptimizerConfig, SketchFinetuner


def test_health_reads_what_the_log_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    module = SketchFinetuner(lambda: cast(Any, None), SketchConfig(), CrossEntropy(), OptimizerConfig())
    health = SketchHealth(warmup_steps=100)
    monkeypatch.setattr(health, "_check_structure", lambda trainer, module: None)
    monkeypatch.setattr("usllm.callbacks.sketch_health._plans", lambda module: [])
    trainer: Any = SimpleNamespace(global_step=0, strategy=SimpleNamespace(reduce=lambda value, reduce_op: value))
    health.on_train_start(trainer, module)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))])
    for step, targets in enumerate((1, 8, 3), start=1):
        ids = torch.arange(18).view(2, 9)
        labels = ids.where(torch.arange(9) <= targets, -100)
        module.step_loss.add({"input_ids": ids, "labels": labels}, torch.tensor(2.0 * targets / 8), {})
        means = module.step_loss.finish_(optimizer, lambda share: share)
        assert float(means["loss"]) == pytest.approx(2.0)
        trainer.global_step = step
        health.on_train_batch_end(trainer, module, {"loss": torch.tensor(0.1)}, {}, step)
    assert health._loss.mean == pytest.approx(2.0)
