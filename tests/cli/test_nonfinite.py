"""A model with NaN in it: every command ends with status 1 and names where it begins."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch

from usllm.cli import eval as evaluation
from usllm.cli import export, generate, train
from usllm.models import ModelSpec
from usllm.models.loading import load_dense, load_tokenizer

COMMANDS = {"train": train, "eval": evaluation, "export": export, "generate": generate}
TINY = ["experiment=tiny", "~callbacks.progress"]


@pytest.fixture(scope="module")
def poisoned_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense model with one NaN."""
    folder = tmp_path_factory.mktemp("dense") / "model"
    spec = ModelSpec(kind="random", name="llama")
    model = load_dense(spec)
    with torch.no_grad():
        model.get_parameter("model.layers.1.self_attn.o_proj.weight")[5, 6] = math.nan
    model.save_pretrained(folder)
    load_tokenizer(spec).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def poisoned_run(tiny_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with one infinite number in its newest checkpoint."""
    folder = tmp_path_factory.mktemp("run") / "run"
    with pytest.MonkeyPatch.context() as patch:
        argv = [*TINY, f"data.train.path={tiny_text}", f"run_dir={folder}", "trainer.max_steps=2"]
        patch.setattr(sys, "argv", ["usllm-train", *argv])
        train.main()
    path = max((folder / "checkpoints").glob("*.ckpt"))
    saved = torch.load(path, weights_only=True)
    saved["state_dict"]["model.model.norm.weight"][3] = math.inf
    torch.save(saved, path)
    return folder


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        ("train", [*TINY, "model={dense}", "data.train.path={text}", "run_dir={out}/run"]),
        ("eval", ["model={dense}", "run_dir={out}", "evaluation=files", "evaluation.test_sets.text.path={text}"]),
        (
            "export",
            ["model={dense}", "out={out}/packed", "data=text", "data.train.path={text}", "data.context_length=32"],
        ),
        ("eval", ["ckpt={run}", "run_dir={out}"]),
        ("export", ["ckpt={run}", "out={out}/packed"]),
        ("generate", ["ckpt={run}", "prompt=the cat"]),
    ],
)
def test_first_tensor_is_named_with_status_1(
    command: str,
    arguments: list[str],
    poisoned_folder: Path,
    poisoned_run: Path,
    tiny_text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    places = {"dense": poisoned_folder, "run": poisoned_run, "text": tiny_text, "out": tmp_path}
    argv = [argument.format(**places) for argument in arguments]
    monkeypatch.setattr(sys, "argv", [f"usllm-{command}", *argv])
    with pytest.raises(SystemExit) as ended:
        COMMANDS[command].main()  # type: ignore[attr-defined]
    error = capsys.readouterr().err
    assert ended.value.code == 1
    assert "not finite" in error
    named = "model.norm.weight" if "{run}" in arguments[0] else "model.layers.1.self_attn.o_proj.weight"
    assert named in error
    assert not (tmp_path / "packed").exists()


def test_scores_that_become_nan_on_the_way_stop_a_generation(
    tiny_text: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [*TINY, f"data.train.path={tiny_text}", f"run_dir={tmp_path}/run", "trainer.max_steps=2"]
    monkeypatch.setattr(sys, "argv", ["usllm-train", *argv])
    train.main()
    path = max((tmp_path / "run" / "checkpoints").glob("*.ckpt"))
    saved = torch.load(path, weights_only=True)
    saved["state_dict"]["model.model.norm.weight"].fill_(3e38)  # finite, but no sum of it is
    torch.save(saved, path)
    monkeypatch.setattr(sys, "argv", ["usllm-generate", f"ckpt={tmp_path}/run", "prompt=the cat"])
    with pytest.raises(SystemExit) as ended:
        generate.main()
    assert ended.value.code == 1
    assert "are NaN" in capsys.readouterr().err
