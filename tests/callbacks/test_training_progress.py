from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import DataLoader

from usllm.callbacks import TrainingProgress
from usllm.system.errors import UserError


class Slope(LightningModule):
    """One weight, and a loss that is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        loss = (self.weight * batch).sum()
        self.log("train/loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.0)


def train(folder: Path, steps: int, callback: TrainingProgress, **options: Any) -> Trainer:
    trainer = Trainer(
        accelerator="cpu",
        max_steps=steps,
        log_every_n_steps=1,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=[callback],
        **options,
    )
    trainer.fit(Slope(), DataLoader(torch.full((100, 1), 2.0)))
    return trainer


def lines_of(text: str) -> list[str]:
    return [line.partition(",")[0] for line in text.splitlines() if line.startswith("step ")]


def test_a_log_has_a_line_for_each_part_of_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(tmp_path, 8, TrainingProgress(lines=4), accumulate_grad_batches=2)
    written = capsys.readouterr().out
    assert lines_of(written) == [f"step {step} of 8" for step in (2, 4, 6, 8)]
    assert "step 2 of 8, loss 2.000, " in written and " left" in written
    assert "step 8 of 8, loss 2.000\n" in written


@pytest.mark.parametrize("lines", [0, 10])
def test_never_more_lines_than_steps(lines: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(tmp_path, 3, TrainingProgress(lines=lines))
    assert len(lines_of(capsys.readouterr().out)) == (3 if lines else 0)


def test_a_terminal_has_the_bar_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    train(tmp_path, 3, TrainingProgress())
    assert not lines_of(capsys.readouterr().out)


@pytest.mark.parametrize("lines", [-1, 1.5, True])
def test_an_impossible_number_of_lines_is_refused(lines: Any) -> None:
    with pytest.raises(UserError, match=r"callbacks\.progress\.lines="):
        TrainingProgress(lines=lines)
