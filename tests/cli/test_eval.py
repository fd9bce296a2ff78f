"""``usllm-eval`` on a checkpoint, a folder and a test set of one's own."""

from __future__ import annotations

import bz2
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from usllm.cli import eval as evaluation
from usllm.cli import train
from usllm.models import ModelSpec
from usllm.models.loading import load_dense, load_tokenizer


def evaluate(monkeypatch: pytest.MonkeyPatch, folder: Path, *argv: str) -> dict:
    """Run the command in this process; the content of its result file."""
    monkeypatch.setattr(sys, "argv", ["usllm-eval", f"run_dir={folder}", *argv])
    evaluation.main()
    return json.loads((folder / "evaluation.json").read_text())


@pytest.fixture(scope="module")
def run_dir(tiny_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a finished run of four steps."""
    folder = tmp_path_factory.mktemp("run") / "run"
    with pytest.MonkeyPatch.context() as patch:
        argv = ["experiment=tiny", f"data.train.path={tiny_text}", f"run_dir={folder}", "trainer.max_steps=4"]
        patch.setattr(sys, "argv", ["usllm-train", *argv, "~callbacks.progress"])
        train.main()
    return folder


def test_checkpoint_of_a_run_gives_the_figures_of_its_report(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = json.loads((run_dir / "report.json").read_text())
    result = evaluate(monkeypatch, tmp_path, f"ckpt={run_dir}")
    after = [row["finetuned"] for row in report["perplexity"]]
    assert [row["perplexity"] for row in result["perplexity"]] == pytest.approx(after, rel=1e-6)
    assert result["compression"]["bits_per_weight"] == report["bits_per_weight"]["achieved"]


def test_checkpoint_that_was_finetuned_dense_has_no_bits(
    tiny_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = ["experiment=tiny", f"data.train.path={tiny_text}", f"run_dir={tmp_path}/run", "trainer.max_steps=2"]
    without = [f"~callbacks.{name}" for name in ("importance_calibration", "sketch_reprojection", "sketch_health")]
    monkeypatch.setattr(sys, "argv", ["usllm-train", *argv, *without, "~callbacks.progress"])
    train.main()
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    result = evaluate(monkeypatch, tmp_path, f"ckpt={tmp_path}/run")
    assert result["compression"] is None
    after = [row["finetuned"] for row in report["perplexity"]]
    assert [row["perplexity"] for row in result["perplexity"]] == pytest.approx(after, rel=1e-6)


def test_test_sets_and_windows_of_ones_own(
    run_dir: Path, tiny_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = max((run_dir / "checkpoints").glob("*.ckpt"))
    result = evaluate(
        monkeypatch,
        tmp_path,
        f"ckpt='{checkpoint}'",
        "evaluation=files",
        f"evaluation.test_sets.text.path={tiny_text}",
        "evaluation.windows=[16,64]",
        "evaluation.max_windows=3",
        "evaluation.validation_split=false",
        "evaluation.allow_shared=[text]",
    )
    assert [(row["test_set"], row["window"], row["windows"]) for row in result["perplexity"]] == [
        ("text", 16, 3),
        ("text", 64, 3),
    ]


def test_model_takes_a_folder(
    tiny_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = ModelSpec(kind="random", name="llama")
    load_dense(spec).save_pretrained(tmp_path / "model")
    load_tokenizer(spec).save_pretrained(tmp_path / "model")
    result = evaluate(
        monkeypatch,
        tmp_path / "result",
        f"model={tmp_path}/model",
        "evaluation=files",
        f"evaluation.test_sets.text.path={tiny_text}",
        "evaluation.windows=[32]",
    )
    assert result["compression"] is None
    assert result["perplexity"][0]["perplexity"] > 100  # an untrained model of 264 tokens
    assert "Perplexity" in capsys.readouterr().out


def test_data_names_files_as_test_sets(
    run_dir: Path, tiny_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = tmp_path / "tiny.jsonl"
    rows.write_text(json.dumps({"text": tiny_text.read_text()}) + "\n")
    arguments = [f"data=[{tiny_text},{rows}]", "evaluation.windows=[32]", "evaluation.validation_split=false"]
    arguments.append("evaluation.allow_shared=[tiny]")  # the run was trained on it
    result = evaluate(monkeypatch, tmp_path / "result", f"ckpt={run_dir}", *arguments)
    as_text, as_rows = result["perplexity"]
    assert (as_text["test_set"], as_rows["test_set"]) == ("tiny", "tiny_2")
    assert as_text["perplexity"] == as_rows["perplexity"]


def _marked(text: str) -> bytes:
    return b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode()


@pytest.mark.parametrize(
    ("name", "pack"),
    [("x.txt", str.encode), ("x.txt", _marked), ("x.jsonl", None), ("x.json", None), ("x.jsonl.bz2", bz2.compress)],
)
def test_one_text_measures_the_same_in_every_file(
    name: str, pack: Any, tiny_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = tiny_text.read_text()
    line = (json.dumps({"text": text}) + "\n").encode()
    content = pack(text) if name == "x.txt" else line if pack is None else pack(line)
    (tmp_path / name).write_bytes(content)
    arguments = ["model=random", "evaluation.windows=[32]", "evaluation.max_windows=4"]
    plain = evaluate(monkeypatch, tmp_path / "a", f"data=[{tiny_text}]", *arguments)
    found = evaluate(monkeypatch, tmp_path / "b", f"data=[{tmp_path / name}]", *arguments)
    assert found["perplexity"][0]["test_set"] == "x"
    for key in ("perplexity", "tokens"):
        assert found["perplexity"][0][key] == plain["perplexity"][0][key]


def test_override_keeps_the_windows_and_test_sets_of_the_run(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = json.loads((run_dir / "report.json").read_text())
    result = evaluate(monkeypatch, tmp_path, f"ckpt={run_dir}", "evaluation.batch_size=2")
    shared = ("test_set", "window", "windows", "tokens", "window_start")
    assert [[row[key] for key in shared] for row in result["perplexity"]] == [
        [row[key] for key in shared] for row in report["perplexity"]
    ]
    assert result["perplexity"][0]["window_start"] == "none"


def test_window_start_is_measured_and_said(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (row,) = evaluate(monkeypatch, tmp_path / "a", f"ckpt={run_dir}")["perplexity"]
    result = evaluate(monkeypatch, tmp_path / "b", f"ckpt={run_dir}", "evaluation.window_start=each")
    assert result["perplexity"][0]["window_start"] == "each"
    assert result["perplexity"][0]["perplexity"] != row["perplexity"]
    assert "32, each" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argument", "named"),
    [
        ("data=[{json}]", "is one JSON document, not JSON lines"),
        ("data=[{utf16}]", "is UTF-16 text"),
        ("ckpt={run}", "is also data.train"),
        ("ckpt={run} model=random", "model=random: ckpt="),
        ("ckpt=/no/such/run", "no such file or folder"),
        ("ckpt={empty}", "holds no checkpoint; give the directory of a run"),
        ("ckpt={above}", "holds no checkpoint; give ckpt={run}"),
        ("ckpt={text}", "cannot be read"),
        ("model=/no/such/folder", "/no/such/folder"),
        ("model={text}.gguf", "no such file"),
    ],
)
def test_bad_input_ends_in_one_message(
    argument: str,
    named: str,
    run_dir: Path,
    tiny_text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "x.json").write_text('[{"text": "one"}]')
    (tmp_path / "x.txt").write_bytes("text".encode("utf-16"))
    places = {
        "empty": tmp_path / "empty",
        "above": run_dir.parent,
        "json": tmp_path / "x.json",
        "utf16": tmp_path / "x.txt",
    }
    arguments = argument.format(text=tiny_text, run=run_dir, **places).split()
    with pytest.raises(SystemExit) as ended:
        evaluate(monkeypatch, tmp_path, *arguments, "evaluation=files", f"evaluation.test_sets.text.path={tiny_text}")
    assert ended.value.code == 2
    assert named.format(run=run_dir) in capsys.readouterr().err
