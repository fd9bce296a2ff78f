"""Callbacks, loggers and the Trainer from configuration; what cannot be made is named."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from composing import composed
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import Checkpoint, LearningRateMonitor, ProgressBar, TQDMProgressBar

from usllm.config import check_train
from usllm.runs.trainer import build_nodes, build_trainer, devices_in, steps_of
from usllm.system.errors import UserError
from usllm.training import StepCheckpoint


def test_nodes_are_built_by_name_and_null_is_left_out() -> None:
    nodes = build_nodes(
        "callbacks", {"lr": {"_target_": "lightning.pytorch.callbacks.LearningRateMonitor"}, "gone": None}
    )
    assert list(nodes) == ["lr"]
    assert isinstance(nodes["lr"], LearningRateMonitor)


@pytest.mark.parametrize(
    ("node", "named"),
    [
        ({"_target_": "usllm.callbacks.NoSuchCallback"}, "callbacks.mine"),
        ({"_target_": "lightning.pytorch.callbacks.LearningRateMonitor", "speed": 3}, "speed"),
        ({"_target_": "usllm.training.StepCheckpoint", "keep": 0}, "keep=0"),
    ],
)
def test_what_cannot_be_built_is_named(node: dict[str, object], named: str) -> None:
    with pytest.raises(UserError, match=named):
        build_nodes("callbacks", {"mine": node})


@pytest.mark.parametrize(
    ("budget", "devices", "accumulate", "steps"),
    [(1, 1, 1, 1), (64, 1, 1, 1), (65, 1, 1, 2), (768, 2, 3, 2), (769, 2, 3, 3), (10**15, 1, 1, 15_625_000_000_000)],
)
def test_budget_of_tokens_is_rounded_up_to_steps(
    budget: int, devices: int, accumulate: int, steps: int, tiny_text: Path
) -> None:
    overrides = [f"data.train.path={tiny_text}", "trainer.max_steps=null", f"trainer.tokens={budget}"]
    overrides += [f"trainer.devices={devices}", f"trainer.accumulate_grad_batches={accumulate}"]
    assert steps_of(check_train(composed("experiment=tiny", *overrides))) == steps  # of 2 sequences of 32 tokens


def test_tensorboard_writes_into_the_runs_folder_and_is_asked_for_where_it_is_missing(
    tiny_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = [f"data.train.path={tiny_text}", f"run_dir={tmp_path}", "logger=tensorboard"]
    logger = check_train(composed("experiment=tiny", *overrides)).logger
    monkeypatch.setattr("lightning.fabric.loggers.tensorboard._TENSORBOARD_AVAILABLE", True)
    built = build_nodes("logger", logger)
    assert list(built) == ["csv", "tensorboard"]
    assert built["tensorboard"].log_dir == f"{tmp_path}/tensorboard/version_0"
    for name in ("_TENSORBOARD_AVAILABLE", "_TENSORBOARDX_AVAILABLE"):
        monkeypatch.setattr(f"lightning.fabric.loggers.tensorboard.{name}", False)
    with pytest.raises(UserError, match=r"logger\.tensorboard .*pip install"):
        build_nodes("logger", logger)


def test_trainer_gets_the_whole_run_as_one_epoch(tiny_text: Path, tmp_path: Path) -> None:
    config = check_train(composed("experiment=tiny", f"data.train.path={tiny_text}", f"run_dir={tmp_path}"))
    trainer = build_trainer(config, 8, [], [])
    assert (trainer.max_steps, trainer.max_epochs) == (8, 1)
    assert trainer.precision == "32-true"


@pytest.mark.parametrize(("added", "present"), [([], False), ([StepCheckpoint(), TQDMProgressBar()], True)])
def test_lightning_adds_no_callback_of_its_own(
    added: list[Callback], present: bool, tiny_text: Path, tmp_path: Path
) -> None:
    config = check_train(composed("experiment=tiny", f"data.train.path={tiny_text}", f"run_dir={tmp_path}"))
    trainer = build_trainer(config, 8, added, [])
    assert [callback for callback in trainer.callbacks if isinstance(callback, Checkpoint | ProgressBar)] == added[::-1]
    assert (trainer.progress_bar_callback is not None) == present


@pytest.mark.parametrize("name", ["simple", "advanced", "pytorch"])
def test_profile_is_written_into_the_runs_folder(name: str, tiny_text: Path, tmp_path: Path) -> None:
    profiler = f"+trainer.profiler={name}"
    config = check_train(composed("experiment=tiny", f"data.train.path={tiny_text}", f"run_dir={tmp_path}", profiler))
    trainer = build_trainer(config, 8, [], [])
    assert trainer.profiler is not None
    assert str(trainer.profiler.dirpath) == str(tmp_path)


def test_an_argument_that_lightning_refuses_is_a_message(tiny_text: Path, tmp_path: Path) -> None:
    overrides = [f"data.train.path={tiny_text}", f"run_dir={tmp_path}", "trainer.accelerator=abacus"]
    config = check_train(composed("experiment=tiny", *overrides))
    with pytest.raises(UserError, match="abacus"):
        build_trainer(config, 8, [], [])


def test_devices_are_counted() -> None:
    assert devices_in({}) == 1
    assert devices_in({"devices": 2, "num_nodes": 3}) == 6
    assert devices_in({"devices": [0, 3]}) == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card here")
def test_a_machine_without_a_card_is_told_what_runs_on_it(tiny_text: Path) -> None:
    config = check_train(composed("experiment=tiny", f"data.train.path={tiny_text}", "trainer.accelerator=gpu"))
    with pytest.raises(UserError, match="trainer: No supported gpu backend found!; trainer=cpu runs on any machine"):
        build_trainer(config, 1, [], [])
