"""A whole run on a card that is not there: no tensor of the host meets one of the card."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("emulated_card.py")
RECIPE = (
    "experiment=tiny",
    "stages=recipe",
    "stages.calibrate.sequences=4",
    "stages.reconstruct.steps=4",
    "stages.reconstruct.warmup_steps=1",
    "stages.reconstruct.sequences=4",
    "stages.reconstruct.save_every_n_steps=2",
    "stages.reconstruct.calibration_sequences=4",
    "trainer.max_steps=2",
)
METHODS = {
    "sign": ("sketch=sign", "sketch.bits_per_weight=2.0", "allocation.layer_budget=sensitivity"),
    "absmaxmin": ("sketch=absmaxmin", "sketch.bits_per_weight=4.0"),
    "rounding": ("sketch=rounding", "sketch.bits=2", "sketch.group_size=32", "sketch.bits_per_weight=8"),
}
TEACHER = ("objective=distill", "objective.kl_weight=1.0", "objective.hidden_weight=0.0")
ROWS = [
    pytest.param("sign", TEACHER, id="sign"),
    pytest.param("absmaxmin", (), id="absmaxmin", marks=pytest.mark.slow),
    pytest.param("rounding", TEACHER, id="rounding", marks=pytest.mark.slow),
]


def emulated(*overrides: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    line = [sys.executable, str(PROGRAM), *overrides]
    return subprocess.run(line, capture_output=True, text=True, env=environment, timeout=280)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    words = "the cat and the dog were seen by a man who had never been to the sea"
    path.write_text("\n\n".join(f"{number}: {words} {number * 7} times." for number in range(80)))
    return path


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("method", "objective"), ROWS)
def test_stages_finetuning_and_measuring_keep_devices_apart(
    method: str, objective: tuple[str, ...], text: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    done = emulated(*RECIPE, *METHODS[method], *objective, f"data.train.path={text}", f"run_dir={run}")
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads((run / "report.json").read_text(encoding="utf-8"))
    assert report["machine"]["gpus"] == ["emulated card"]
    assert report["devices"]["kind"] == "cuda" and report["devices"]["processes"] == 1
    for row in report["perplexity"]:
        assert all(row[point] > 1 for point in ("dense", "sketched", "reconstructed", "finetuned"))


MEETING = """
import sys
sys.path.insert(0, {folder!r})
import torch
from emulated_card import install
install()
weight = torch.nn.Linear(3, 2).to("cuda").weight
assert weight.device.type == "cuda" and weight.sum().device.type == "cuda"
assert (weight + 1).cpu().device.type == "cpu"
with torch.device("cuda"):
    made = torch.ones(2)
assert made.device.type == "cuda"
try:
    made + torch.ones(2)
except RuntimeError as error:
    assert "same device" in str(error)
else:
    raise SystemExit("devices met unseen")
"""


def test_devices_that_meet_are_seen() -> None:
    program = MEETING.format(folder=str(PROGRAM.parent))
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
