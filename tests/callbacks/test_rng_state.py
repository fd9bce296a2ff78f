from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import tiny_run
import torch
from lightning.pytorch import Callback
from tiny_run import Settings

from usllm.system.rng import preserved_rng, restore, snapshot


def draw() -> list[float]:
    # gauss and normal keep a second value back, which is part of their state
    return [random.random(), random.gauss(0, 1), np.random.rand(), np.random.normal(), torch.rand(1).item()]  # noqa: NPY002


def test_restored_generators_draw_the_same_again() -> None:
    draw()
    state = snapshot()
    first = draw()
    draw()
    restore(state)
    assert draw() == first


def test_snapshot_survives_a_checkpoint_without_pickled_code(tmp_path: Path) -> None:
    torch.save(snapshot(), tmp_path / "state")
    expected = draw()
    restore(torch.load(tmp_path / "state", weights_only=True))
    assert draw() == expected


def test_preserved_generators_are_as_before_even_behind_an_error() -> None:
    state = snapshot()
    expected = draw()
    restore(state)
    try:
        with preserved_rng():
            draw()
            raise ValueError
    except ValueError:
        pass
    assert draw() == expected


def test_what_validation_draws_does_not_reach_training(tmp_path: Path) -> None:
    class DrawInValidation(Callback):
        def on_validation_batch_start(self, *_: Any) -> None:
            draw()

    tiny_run.run(tmp_path / "quiet" / "run", Settings(steps=4))
    tiny_run.run(tmp_path / "loud" / "run", Settings(steps=4), DrawInValidation())
    assert tiny_run.record(tmp_path / "loud" / "run") == tiny_run.record(tmp_path / "quiet" / "run")
