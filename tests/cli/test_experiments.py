"""Every experiment runs: its settings on a tiny model and text, two micro batches of everything."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from usllm.cli import train

EXPERIMENTS = [
    # Three runs, of which recipe is one.
    pytest.param(name, marks=pytest.mark.slow) if name == "smollm2_quality" else name
    for name in sorted(path.stem for path in (Path(__file__).parents[2] / "conf" / "experiment").glob("*.yaml"))
]


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_experiment_passes_fast_dev_run(
    experiment: str, tiny_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = [
        "usllm-train",
        f"experiment={experiment}",
        "model=random",
        "data=text",
        f"data.train.path={tiny_text}",
        "data.validation_fraction=0.1",
        "data.context_length=32",
        "data.batch_size=1",
        "data.num_proc=1",
        "trainer=fast_dev_run",
        "trainer.max_steps=2",  # an experiment's own length stands above that of trainer=fast_dev_run
        "trainer.epochs=null",
        "stages.calibrate.sequences=2",
        "optimizer.warmup_steps=0",
        "evaluation=default",
        "evaluation.validation_split=true",
        "evaluation.windows=[32]",
        "evaluation.max_windows=2",
        f"output_root={tmp_path}",
        "~callbacks.progress",
    ]
    if experiment == "recipe":
        argv += [f"stages.reconstruct.{few}" for few in ("sequences=8", "steps=2", "warmup_steps=0")]
    if experiment in ("collision_rate", "importance_threshold", "layer_error"):
        argv.append("study.sequences=2")
    if experiment == "layer_error":
        argv.append("study.rates=[2.0]")
    if experiment == "importance_threshold":
        argv.append("study.thresholds=[0,0.1]")
    monkeypatch.setattr(sys, "argv", argv)
    train.main()
    results = [json.loads(path.read_text(encoding="utf-8")) for path in tmp_path.rglob("*.json")]
    assert any(result.get("finished") or result.get("rows") for result in results)
