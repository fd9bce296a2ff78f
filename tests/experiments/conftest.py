"""Studies on the tiny random model, driven through the command."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from usllm.cli import train

Study = Callable[..., dict[str, Any]]


def study_arguments(name: str, text: Path, run_dir: Path, *more: str) -> list[str]:
    """A study of the configurations with the tiny model and text in place of the real ones."""
    return [
        f"experiment={name}",
        "model=random",
        "data=text",
        f"data.train.path={text}",
        "data.context_length=32",
        "data.batch_size=2",
        "data.validation_fraction=0.1",
        "data.num_proc=1",
        "sketch.group_size=64",
        "trainer.precision=32-true",
        "evaluation.windows=[32]",
        "evaluation.max_windows=4",
        "evaluation.precision=fp32",
        f"run_dir={run_dir}",
        "~callbacks.progress",
        *more,
    ]


@pytest.fixture(scope="session")
def run_study(tiny_text: Path) -> Study:
    """Run a study in this process and return the content of its JSON file."""

    def run(name: str, run_dir: Path, *more: str) -> dict[str, Any]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["usllm-train", *study_arguments(name, tiny_text, run_dir, *more)])
            train.main()
        result: dict[str, Any] = json.loads((run_dir / f"{name}.json").read_text())
        return result

    return run
