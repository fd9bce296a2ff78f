"""A plug-in is chosen, trained, resumed, exported and loaded through the real commands, like what is built in."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from commands import Outcome, command, killed_after

from usllm_kernels.dispatch import installed

PLUGIN = "plugins=[example_plugin]"
SKETCH = [
    "sketch=lower_median",
    "allocation=every_second",
    "allocation.layer_budget=square_root",
    "sketch.bits_per_weight=2",
]


def train(
    text: Path,
    folder: Path,
    *more: str,
    kill_at: int | None = None,
    before: Callable[[], None] | None = None,
) -> Outcome:
    arguments = ["experiment=tiny", f"data.train.path={text}", "run_dir=run", "trainer.max_steps=4", PLUGIN]
    every = ["callbacks.checkpoint.every_n_train_steps=2", "~callbacks.progress", "logger=none"]
    if kill_at is not None:
        before = killed_after("usllm.training.module", "SketchFinetuner.on_train_batch_end", kill_at)
    return command("train", *arguments, *every, *more, folder=folder, before=before)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = torch.load(
        max((folder / "run" / "checkpoints").glob("*.ckpt")), weights_only=True
    )["state_dict"]
    return state


def test_method_of_a_plug_in_goes_the_whole_way(tiny_text: Path, tmp_path: Path) -> None:
    trained = train(tiny_text, tmp_path, "sketch=row_sign", "stages=[default,noise]")
    assert trained.status == 0, trained.output
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert 1 < report["bits_per_weight"]["achieved"] < 2

    without = command("export", "ckpt=run", "out=packed", folder=tmp_path)
    assert without.status == 2, without.output
    assert "sketch.method='row_sign' is unknown" in without.output and "plugins=[…]" in without.output
    exported = command("export", "ckpt=run", "out=packed", PLUGIN, folder=tmp_path)
    assert exported.status == 0, exported.output

    unknown = command("inspect", "model=packed", folder=tmp_path)
    assert unknown.status == 2
    assert "it comes with the plug-in example_plugin.row_sign" in unknown.output
    for name, arguments in (("inspect", []), ("generate", ["prompt=abc", "max_new_tokens=3"])):
        done = command(name, "model=packed", PLUGIN, *arguments, folder=tmp_path)
        assert done.status == 0, done.output


@pytest.mark.slow
def test_operator_rules_and_stage_of_a_plug_in_resume_bit_for_bit(tiny_text: Path, tmp_path: Path) -> None:
    settings = [*SKETCH, "stages=[default,noise]"]
    whole = train(tiny_text, tmp_path / "whole", *settings)
    assert whole.status == 0, whole.output
    assert train(tiny_text, tmp_path / "killed", *settings, kill_at=3).status == -signal.SIGKILL
    resumed = train(tiny_text, tmp_path / "killed", *settings, "resume=true")
    assert resumed.status == 0, resumed.output
    ours, theirs = weights(tmp_path / "killed"), weights(tmp_path / "whole")
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    quiet = train(tiny_text, tmp_path / "quiet", *SKETCH)
    assert quiet.status == 0, quiet.output
    assert any(not torch.equal(tensor, theirs[name]) for name, tensor in weights(tmp_path / "quiet").items())


@pytest.mark.slow
@pytest.mark.skipif(not installed("triton"), reason="triton is not installed")
def test_kernel_of_a_plug_in_is_chosen_by_name_and_decodes_what_the_reference_does(
    tiny_text: Path, tmp_path: Path
) -> None:
    model = ["model=random", "data=text", f"data.train.path={tiny_text}", "data.context_length=32", "out=packed"]
    packing = [*model, "sketch=tiny", "allocation=every_second", "sketch.bits_per_weight=2", "rest.dtype=float32"]
    exported = command("export", PLUGIN, *packing, "calibration_sequences=2", folder=tmp_path)
    assert exported.status == 0, exported.output

    text = ["evaluation=files", f"evaluation.test_sets.text.path={tiny_text}", "evaluation.windows=[32]"]
    few = ["evaluation.max_windows=2", "evaluation.precision=fp32", "evaluation.validation_split=false"]
    arguments = ["model=packed", PLUGIN, *text, *few]
    plain = command("eval", *arguments, "run_dir=plain", folder=tmp_path)
    assert plain.status == 0, plain.output
    chosen = {"USLLM_KERNELS": "triton", "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    watched = subprocess.run(
        [sys.executable, "-m", "watched_kernel", *arguments, "run_dir=kernel"],
        env={**os.environ, **chosen, "PYTHONPATH": os.pathsep.join(sys.path)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert watched.returncode == 0, watched.stderr
    decoded = {line for line in watched.stdout.splitlines() if line.startswith("the plug-in's kernel decodes ")}
    assert len(decoded) == 12  # all layers that are compressed
    ours, theirs = (json.loads((tmp_path / name / "evaluation.json").read_text()) for name in ("kernel", "plain"))
    assert [row["perplexity"] for row in ours["perplexity"]] == [row["perplexity"] for row in theirs["perplexity"]]


@pytest.mark.slow
@pytest.mark.parametrize("resume", [[], ["resume=true"]], ids=["anew", "resumed"])
def test_files_of_a_killed_stage_are_not_taken_by_another_configuration(
    resume: list[str], tiny_text: Path, tmp_path: Path
) -> None:
    settings = ["stages=[default,noise]", "sketch.bits_per_weight=2"]
    killer = killed_after("example_plugin.noise", "Noise.run")
    killed = train(tiny_text, tmp_path / "killed", *settings, before=killer)
    assert killed.status == -signal.SIGKILL, killed.output
    (kept,) = (tmp_path / "killed" / "run" / "stages" / "noise").iterdir()
    other = train(tiny_text, tmp_path / "killed", *settings, "sketch.seed=7", *resume)
    assert other.status == 0, other.output
    folders = set((tmp_path / "killed" / "run" / "stages" / "noise").iterdir())
    assert kept in folders and len(folders) == 2
    alone = train(tiny_text, tmp_path / "alone", *settings, "sketch.seed=7")
    assert alone.status == 0, alone.output
    ours, theirs = weights(tmp_path / "killed"), weights(tmp_path / "alone")
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def test_stages_in_the_wrong_order_are_refused_in_one_line(tiny_text: Path, tmp_path: Path) -> None:
    done = train(tiny_text, tmp_path, "stages=[noise,default]")
    assert done.status == 2
    assert "stages: noise needs start before it" in done.output and "Traceback" not in done.output


@pytest.mark.parametrize("flags", [["--cfg", "job"], ["--help"]], ids=" ".join)
def test_flag_behind_the_overrides_shows_what_a_plug_in_brings(flags: list[str], tmp_path: Path) -> None:
    shown = command("train", PLUGIN, "sketch=lower_median", *flags, folder=tmp_path)
    assert shown.status == 0, shown.output
    assert "operator: lower_median" in shown.output


def test_plug_in_that_is_not_there_is_named(tiny_text: Path, tmp_path: Path) -> None:
    done = command("train", "plugins=[no_such_plugin]", "experiment=tiny", folder=tmp_path)
    assert done.status == 2
    assert "plugins=no_such_plugin: cannot be imported" in done.output
    assert "Traceback" not in done.output
