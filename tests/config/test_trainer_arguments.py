"""Every argument of ``lightning.Trainer`` is decided on: its values have an effect, or are refused with a way out."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
from composing import composed
from lightning import Trainer

from usllm.config import check_train
from usllm.config.trainer_arguments import ARGUMENTS, argument_problems, length_problems
from usllm.system.errors import UserError

NAN, INFINITY = float("nan"), float("inf")

# argument: (values that have an effect, values that are refused)
VALUES: dict[str, tuple[list[Any], list[Any]]] = {
    "max_steps": ([8], []),  # ranges of these five: tests/config/test_validation.py
    "epochs": ([1, 0.5], []),
    "tokens": ([1_000_000], []),
    "accumulate_grad_batches": ([1, 4], []),
    "precision": (["auto"], []),
    "accelerator": (["cpu", "auto"], []),
    "devices": ([1, "auto", [0]], []),
    "strategy": (["auto", "ddp"], []),
    "max_time": ([None, "00:00:10:00", {"minutes": 1}], [0, "soon", "00:00:00:00", {"hours": -1}, {"years": 1}, True]),
    "min_steps": ([None, 1], [0, -1, 1.5, True, "3"]),
    "num_nodes": ([1, 2], [0, -1, "2", None]),
    "gradient_clip_val": ([None, 0, 1, 0.5], [-1, -0.1, NAN, INFINITY, "1", True]),
    "gradient_clip_algorithm": ([None, "norm", "value"], ["Norm", "l2", 2]),
    "val_check_interval": ([None, 0.25, 1.0, 1, 3, "00:00:10:00"], [0, 0.0, -1, 1.5, -0.5, NAN, True, "often"]),
    "limit_val_batches": ([None, 0, 0.0, 0.5, 1.0, 2], [-1, 1.5, -0.5, NAN, True, "2"]),
    "num_sanity_val_steps": ([None, 0, 2, -1], [-2, 0.5, True]),
    "check_val_every_n_epoch": ([1], [0, 2, True]),
    "inference_mode": ([True, False], [None, 1, "no"]),
    "enable_checkpointing": ([None, True], [False, 1]),
    "enable_progress_bar": ([None, True, False], [0, "no"]),
    "enable_model_summary": ([None, True, False], [0, "no"]),
    "log_every_n_steps": ([None, 1, 50], [0, -1, 0.5, True]),
    "deterministic": ([None, True, False, "warn"], [1, "yes"]),
    "benchmark": ([None, True, False], [1, "yes"]),
    "detect_anomaly": ([True, False], [None, 1, "yes"]),
    "profiler": ([None, "simple", "advanced", "pytorch"], ["fast", True]),
}
REFUSED: dict[str, Any] = {
    "max_epochs": 2,
    "min_epochs": 1,
    "limit_train_batches": 10,
    "overfit_batches": 4,
    "fast_dev_run": True,
    "barebones": True,
    "plugins": "x",
    "sync_batchnorm": True,
    "use_distributed_sampler": True,
    "reload_dataloaders_every_n_epochs": 1,
    "limit_test_batches": 1,
    "limit_predict_batches": 1,
    "logger": False,
    "callbacks": [],
    "default_root_dir": "x",
    "enable_autolog_hparams": False,
    "model_registry": "x",
}
RIGHT = {"gradient_clip_algorithm": {"gradient_clip_val": 1.0}}  # what an argument needs beside it


def test_every_argument_of_lightning_is_decided_on_and_tried() -> None:
    known = set(inspect.signature(Trainer.__init__).parameters) - {"self"} | {"epochs", "tokens"}
    assert set(ARGUMENTS) == known
    assert set(VALUES) | set(REFUSED) == known
    assert set(VALUES).isdisjoint(REFUSED)


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, (right, _) in VALUES.items() for value in right])
def test_value_that_has_an_effect_is_accepted(key: str, value: Any) -> None:
    assert argument_problems({key: value, **RIGHT.get(key, {})}) == []


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, (_, wrong) in VALUES.items() for value in wrong])
def test_other_value_is_refused(key: str, value: Any) -> None:
    (line,) = argument_problems({key: value, **RIGHT.get(key, {})})
    assert line.startswith(f"trainer.{key}={value}: must be") or key in (
        "check_val_every_n_epoch",
        "enable_checkpointing",
    )


@pytest.mark.parametrize("key", REFUSED)
def test_argument_without_an_effect_is_refused_with_a_way_out(key: str, tiny_text: Path) -> None:
    (line,) = argument_problems({key: REFUSED[key]})
    assert line.startswith(f"trainer.{key}={REFUSED[key]}: ")
    assert len(line) > len(f"trainer.{key}={REFUSED[key]}: ") + 20
    with pytest.raises(UserError, match=rf"trainer\.{key}="):
        check_train(composed("experiment=tiny", f"data.train.path={tiny_text}", f"+trainer.{key}={REFUSED[key]}"))


def test_unknown_argument_is_refused() -> None:
    assert argument_problems({"gpus": 2}) == ["trainer.gpus=2: not an argument of lightning.Trainer that usllm knows"]


@pytest.mark.parametrize("clip", [None, 0, 0.0])
def test_way_of_clipping_needs_something_to_clip(clip: float | None) -> None:
    (line,) = argument_problems({"gradient_clip_algorithm": "value", "gradient_clip_val": clip})
    assert "nothing is clipped" in line


@pytest.mark.parametrize(
    ("trainer", "warmup", "named"),
    [
        ({"val_check_interval": 17, "accumulate_grad_batches": 2}, 0, "trainer.val_check_interval=17: the run has 16"),
        ({"min_steps": 9}, 0, "trainer.min_steps=9: the run has 8 steps"),
        ({}, 9, "optimizer.warmup_steps=9: longer than the run's 8 steps"),
    ],
)
def test_what_does_not_fit_into_the_run_is_named(trainer: dict[str, Any], warmup: int, named: str) -> None:
    (line,) = length_problems(trainer, warmup, 8)
    assert line.startswith(named)


@pytest.mark.parametrize(
    "trainer",
    [
        {"val_check_interval": 16, "accumulate_grad_batches": 2},
        {"val_check_interval": 99, "limit_val_batches": 0},
        {"val_check_interval": 1.0, "min_steps": 8},
    ],
)
def test_what_fits_is_accepted(trainer: dict[str, Any]) -> None:
    assert length_problems(trainer, 8, 8) == []
