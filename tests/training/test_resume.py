"""A killed and resumed run equals the one that was never killed, bit for bit."""

from __future__ import annotations

import multiprocessing
import random
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_run
import torch
from lightning.pytorch import Callback
from tiny_run import Killed, Settings, differences, final_checkpoint, record, resumed

DISTILL = {"name": "distill", "temperature": 2.0, "hidden_weight": 0.5, "cross_entropy_weight": 0.5}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Folder of the run that was never killed, made once per settings."""
    root = tmp_path_factory.mktemp("runs")
    known: dict[str, Path] = {}

    def get(settings: Settings) -> Path:
        key = repr(resumed(settings))
        if key not in known:
            known[key] = root / f"whole{len(known)}"
            tiny_run.run(known[key], resumed(settings))
        return known[key]

    return get


def kill_then_resume(folder: Path, settings: Settings, *kills: tuple[str, int]) -> None:
    for kill in kills:
        with pytest.raises(Killed):
            tiny_run.run(folder, replace(settings, kill_at=kill))
    tiny_run.run(folder, settings)


def assert_equal_runs(whole: Path, killed: Path) -> None:
    """Losses, data order and validations; then latents, states, plans, optimizer, generators, loop counters."""
    assert record(killed) == record(whole)
    assert not differences(final_checkpoint(whole), final_checkpoint(killed))


# 6 steps of 2 micro batches, a checkpoint every 2 steps, validation after micro batches 4, 8 and 12.
KILLS = {
    "before-the-first-checkpoint": ("on_train_batch_start", 2),
    "behind-a-checkpoint": ("on_train_batch_start", 5),
    "inside-accumulation": ("on_train_batch_start", 6),
    "in-the-backward-pass": ("on_after_backward", 7),
    "before-an-optimizer-step": ("on_before_optimizer_step", 4),
    "on-a-validation-step-before-validation": ("on_train_batch_end", 8),
    "in-a-validation-batch": ("on_validation_batch_start", 3),
    "at-the-end-of-validation": ("on_validation_end", 2),
    "while-saving": ("on_save_checkpoint", 2),
    "on-the-last-step": ("on_train_batch_end", 12),
    "at-the-end-of-the-epoch": ("on_train_epoch_end", 1),
    "at-the-end-of-training": ("on_train_end", 1),
}


@pytest.mark.parametrize("kill", KILLS.values(), ids=KILLS)
def test_resumed_run_is_equal_wherever_it_was_killed(kill: tuple[str, int], uninterrupted: Any, tmp_path: Path) -> None:
    whole = uninterrupted(Settings())
    kill_then_resume(tmp_path / "run", Settings(), kill)
    assert_equal_runs(whole, tmp_path / "run")


VARIANTS = {
    "projection-every-3": Settings(project_every=3, validate_every=3),
    "validation-inside-accumulation": Settings(accumulate=3, validate_every=4, project_every=2),
    "reallocation": Settings(reallocate_every=2, checkpoint_every=1),
    "distill": Settings(objective=DISTILL),
    "bf16": Settings(precision="bf16-mixed"),
    "gradient-checkpointing": Settings(gradient_checkpointing=True),
    "waterfill": Settings(sketch={"bits_per_weight": 2.0, "allocation": "waterfill", "output_scale": True}),
}


@pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS)
def test_resumed_run_is_equal_under_other_settings(settings: Settings, uninterrupted: Any, tmp_path: Path) -> None:
    whole = uninterrupted(settings)
    kill_then_resume(tmp_path / "run", settings, ("on_before_optimizer_step", 4))
    assert_equal_runs(whole, tmp_path / "run")


def test_second_kill_right_behind_a_resume_leaves_the_checkpoint_whole(uninterrupted: Any, tmp_path: Path) -> None:
    # The resumed run is at the checkpoint's step until its first optimizer step; saving there would lose gradients.
    settings = Settings(accumulate=3)
    whole = uninterrupted(settings)
    kill_then_resume(
        tmp_path / "run", settings, ("on_train_batch_start", 8), ("on_train_batch_start", 3), ("on_after_backward", 2)
    )
    assert_equal_runs(whole, tmp_path / "run")


def test_the_comparison_sees_a_run_that_draws_other_dropout_masks(uninterrupted: Any, tmp_path: Path) -> None:
    class Disturb(Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            torch.rand(1)

    whole = uninterrupted(Settings())
    tiny_run.run(tmp_path / "run", Settings(), Disturb())
    assert record(tmp_path / "run") != record(whole)
    assert differences(final_checkpoint(whole), final_checkpoint(tmp_path / "run"))


def test_training_moves_latents_and_states_at_every_checkpoint(uninterrupted: Any) -> None:
    files = sorted((uninterrupted(Settings()) / "checkpoints").glob("*.ckpt"))
    first, second = (torch.load(file, weights_only=True)["state_dict"] for file in files[-2:])
    changed = differences(first, second)
    assert any(name.endswith("q_proj.weight") for name in changed)
    assert any("state_codes" in name for name in changed)


def run_and_expect_sigkill(folder: Path, settings: Settings) -> None:
    # Children of the fork server start without the test process's threads and with the imports done.
    context = multiprocessing.get_context("forkserver")
    child = context.Process(target=tiny_run.run, args=(folder, settings))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL


def test_run_killed_by_sigkill_inside_accumulation_is_resumed_equal(uninterrupted: Any, tmp_path: Path) -> None:
    whole = uninterrupted(Settings())
    run_and_expect_sigkill(tmp_path / "run", Settings(kill_at=("on_train_batch_start", 8), sigkill=True))
    tiny_run.run(tmp_path / "run", Settings())
    assert_equal_runs(whole, tmp_path / "run")


LONG = Settings(steps=12, accumulate=2, checkpoint_every=3, project_every=2, reallocate_every=5, validate_every=6)
_random = random.Random(0)
HOOKS = ("on_train_batch_start", "on_after_backward", "on_train_batch_end")
RANDOM_KILLS = [(_random.choice(HOOKS), _random.randint(1, LONG.steps * LONG.accumulate)) for _ in range(20)]


@pytest.mark.slow
@pytest.mark.parametrize("kill", RANDOM_KILLS, ids=lambda kill: f"{kill[0]}-{kill[1]}")
def test_run_killed_by_sigkill_at_a_random_step_is_resumed_equal(
    kill: tuple[str, int], uninterrupted: Any, tmp_path: Path
) -> None:
    whole = uninterrupted(LONG)
    run_and_expect_sigkill(tmp_path / "run", replace(LONG, kill_at=kill, sigkill=True))
    tiny_run.run(tmp_path / "run", LONG)
    assert_equal_runs(whole, tmp_path / "run")
