"""Every method the whole way, through the real commands: train, kill, resume, eval, export, load, generate, report."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import command, killed_after

from usllm.compress import METHODS

SETTINGS = {
    "sketch": ["sketch=absmaxmin", "sketch.bits_per_weight=1"],
    "rounding": ["sketch=rounding", "sketch.bits=2"],
    "sign": ["sketch=sign", "sketch.bits_per_weight=1.5"],  # with latents besides the weight
    "littlebit": ["sketch=littlebit", "sketch.bits_per_weight=1.5"],  # scales are most of layers as small as these
}
IN_THE_FAST_SUITE = "sketch"
CASES = [pytest.param(name, marks=[] if name == IN_THE_FAST_SUITE else pytest.mark.slow) for name in sorted(SETTINGS)]


def train(text: Path, folder: Path, name: str, *more: str, **options: Any) -> Any:
    arguments = ["experiment=tiny", f"data.train.path={text}", "run_dir=run", "trainer.max_steps=6", *SETTINGS[name]]
    every = ["callbacks.checkpoint.every_n_train_steps=2", "~callbacks.progress", "logger=csv"]
    return command("train", *arguments, *every, *more, folder=folder, **options)


def final(folder: Path) -> dict[str, Any]:
    path = max((folder / "run" / "checkpoints").glob("*.ckpt"))
    loaded: dict[str, Any] = torch.load(path, weights_only=True)
    return loaded


@pytest.mark.parametrize("name", CASES)
def test_method_goes_the_whole_way(name: str, tiny_text: Path, tmp_path: Path) -> None:
    whole = train(tiny_text, tmp_path / "whole", name)
    assert whole.status == 0, whole.output
    folder = tmp_path / "killed"
    step = killed_after("usllm.training.module", "SketchFinetuner.on_train_batch_end", 5)
    assert train(tiny_text, folder, name, before=step).status == -signal.SIGKILL
    resumed = train(tiny_text, folder, name, "resume=true")
    assert resumed.status == 0, resumed.output
    ours, theirs = final(folder), final(tmp_path / "whole")
    assert ours["state_dict"].keys() == theirs["state_dict"].keys()
    assert all(torch.equal(tensor, theirs["state_dict"][key]) for key, tensor in ours["state_dict"].items())

    report = json.loads((folder / "run" / "report.json").read_text())
    bits = report["bits_per_weight"]
    assert bits["asked"] is None or bits["achieved"] <= bits["asked"]
    assert {*report["perplexity"][0]} >= {"dense", "sketched", "finetuned"}

    precise = ["evaluation.precision=fp32", "run_dir=eval"]
    checkpoint = command("eval", "ckpt=run", *precise, folder=folder)
    assert checkpoint.status == 0, checkpoint.output
    measured = json.loads((folder / "eval" / "evaluation.json").read_text())

    exported = command("export", "ckpt=run", "out=packed", "rest.dtype=float32", folder=folder)
    assert exported.status == 0, exported.output
    ids = torch.arange(24)[None]
    assert torch.equal(packed_logits(folder / "packed", ids), checkpoint_logits(folder / "run", ids))

    inspected = command("inspect", "model=packed", "json=account.json", folder=folder)
    assert inspected.status == 0, inspected.output
    account = json.loads((folder / "account.json").read_text())
    assert account["accounted_bytes"] == account["disk_bytes"]
    weights = sum(layer["shape"][0] * layer["shape"][1] for layer in account["layers"])
    stored = 8 * sum(layer["bytes"] for layer in account["layers"]) / weights
    assert stored == pytest.approx(bits["achieved"]) == pytest.approx(measured["compression"]["bits_per_weight"])

    written = command("generate", "ckpt=run", "prompt=abc", "max_new_tokens=4", folder=folder)
    assert written.status == 0, written.output
    shown = command("report", "runs=run", "out=page", folder=folder)
    assert shown.status == 0, shown.output
    assert (folder / "page" / "report.html").stat().st_size > 0


def packed_logits(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    import usllm

    with torch.no_grad():
        logits: torch.Tensor = usllm.load(folder)(ids).logits
    return logits


def checkpoint_logits(run_dir: Path, ids: torch.Tensor) -> torch.Tensor:
    from usllm.models import ModelSpec
    from usllm.models.loading import load_dense
    from usllm.runs.saved_run import find_checkpoint, load_sketched_
    from usllm.training import load_checkpoint

    model = load_dense(ModelSpec(kind="random", name="llama"))
    load_sketched_(model, load_checkpoint(find_checkpoint(str(run_dir))))
    with torch.no_grad():
        logits: torch.Tensor = model.eval()(ids).logits
    return logits


def test_every_method_has_settings_here() -> None:
    assert SETTINGS.keys() >= METHODS.keys()
