"""``usllm-train`` end to end on a tiny Llama: train, kill, resume, report, refuse."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from usllm.cli import train

KILLER = [
    "+callbacks.killer._target_=killing.KillAt",
    "+callbacks.killer.step=5",
    "callbacks.checkpoint.every_n_train_steps=3",
]


def arguments(text: Path, root: Path, *more: str) -> list[str]:
    return ["experiment=tiny", f"data.train.path={text}", f"output_root={root}", "~callbacks.progress", *more]


def run_here(monkeypatch: pytest.MonkeyPatch, *argv: str) -> None:
    """Run the command in this process: as good as another one, and 8 seconds faster."""
    monkeypatch.setattr(sys, "argv", ["usllm-train", *argv])
    train.main()


def run_apart(*argv: str) -> subprocess.CompletedProcess[str]:
    """Run the command in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "usllm.cli.train", *argv],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent)},
    )


def saved_state(run_dir: Path) -> dict[str, torch.Tensor]:
    path = max((run_dir / "checkpoints").glob("*.ckpt"))
    loaded = torch.load(path, weights_only=True)
    moments = {f"adam.{i}.{k}": v for i, s in loaded["optimizer_states"][0]["state"].items() for k, v in s.items()}
    return {**loaded["state_dict"], **moments}


@pytest.fixture(scope="module")
def finished(tiny_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a run that was never killed."""
    root = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        run_here(patch, *arguments(tiny_text, root, f"run_dir={root}/run"))
    return root / "run"


def test_report_has_what_the_closing_table_shows(finished: Path) -> None:
    report = json.loads((finished / "report.json").read_text())
    (row,) = report["perplexity"]
    assert row["test_set"] == "validation"
    assert row["window"] == 32
    assert row["finetuned"] < row["sketched"] > row["dense"]  # the sketch hurts, finetuning heals
    bits = report["bits_per_weight"]
    assert bits["achieved"] <= bits["asked"] == 1.0
    assert bits["model"] > bits["achieved"]  # embeddings stay at 16 bits
    assert report["bytes"]["sketched"] < report["bytes"]["dense_bf16"]
    assert report["steps"] == 8
    assert report["tokens"] == 8 * 2 * 32
    assert Path(report["checkpoint"]).is_file()
    assert report["machine"]["versions"]["torch"] == torch.__version__


def test_killed_and_resumed_run_equals_the_one_never_killed(
    finished: Path, tiny_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "killed"
    killed = run_apart(*arguments(tiny_text, tmp_path, f"run_dir={run_dir}", "resume=true", *KILLER))
    assert killed.returncode == -9, killed.stderr
    assert "a new run begins" in killed.stderr  # asked for, and not there
    assert not (run_dir / "report.json").exists()
    run_here(monkeypatch, *arguments(tiny_text, tmp_path, f"run_dir={run_dir}", "resume=true", KILLER[-1]))
    told = capsys.readouterr().err
    assert "step=00000003.ckpt" in told.replace("\n", "")
    assert "a new run begins" not in told
    expected, resumed = saved_state(finished), saved_state(run_dir)
    assert expected.keys() == resumed.keys()
    unequal = [name for name, tensor in expected.items() if not torch.equal(tensor, resumed[name])]
    assert not unequal
    reports = [json.loads((folder / "report.json").read_text())["perplexity"] for folder in (finished, run_dir)]
    assert reports[0] == reports[1]


def test_finished_run_prints_its_report_again(
    finished: Path, tiny_text: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (finished / "report.json").read_bytes()
    run_here(monkeypatch, *arguments(tiny_text, finished.parent, f"run_dir={finished}", "resume=true"))
    assert "Perplexity, tiny" in capsys.readouterr().out
    assert (finished / "report.json").read_bytes() == before


def test_used_directory_is_refused_with_the_way_out(
    finished: Path, tiny_text: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        run_here(monkeypatch, *arguments(tiny_text, finished.parent, f"run_dir={finished}"))
    assert ended.value.code == 2
    assert "resume=true" in capsys.readouterr().err


def test_another_configuration_is_refused_naming_the_differing_keys(
    finished: Path, tiny_text: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    run_dir = tmp_path / "other"
    (run_dir / "checkpoints").mkdir(parents=True)
    checkpoint = max((finished / "checkpoints").glob("*.ckpt"))
    (run_dir / "checkpoints" / checkpoint.name).write_bytes(checkpoint.read_bytes())
    with pytest.raises(SystemExit) as ended:
        run_here(
            monkeypatch,
            *arguments(tiny_text, tmp_path, f"run_dir={run_dir}", "resume=true", "sketch.rows=1", "allocation=uniform"),
            "optimizer.lr=0.5",
            "trainer.log_every_n_steps=2",
        )
    assert ended.value.code == 2
    message = capsys.readouterr().err
    assert "sketch.rows" in message
    assert "allocation.name" in message
    assert "optimizer.lr: 0.001 in the checkpoint, 0.5 in this run" in message
    assert "log_every_n_steps" not in message


def test_epochs_are_counted_in_passes_over_the_text(
    tiny_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_here(
        monkeypatch,
        *arguments(tiny_text, tmp_path, f"run_dir={tmp_path}/run", "trainer.max_steps=null", "trainer.epochs=0.05"),
    )
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    log = report["config"]["trainer"]
    assert log["max_steps"] is None
    sequences = report["tokens"] / 32
    assert 0 < report["steps"] < 100
    assert sequences == report["steps"] * 2


def test_coverage_is_said_before_the_run_and_kept_in_its_report(
    tiny_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_here(
        monkeypatch,
        *arguments(tiny_text, tmp_path, "name=a", "model.patterns=[up_proj,gate_prj]", "trainer.max_steps=2"),
    )
    shown = capsys.readouterr()
    assert "Compressing 2 layers, 23.8% of the decoder's linear weights; left out: gate_proj (2 x)" in shown.err
    assert "warning: model.patterns: gate_prj matched no layer of this model" in shown.err
    assert "Add to model.patterns: gate_proj, down_proj" in shown.err
    assert "2 layers, 23.8%" in shown.out
    (report,) = tmp_path.rglob("report.json")
    covered = json.loads(report.read_text())["coverage"]
    assert covered["unmatched"] == ["gate_prj"]
    assert covered["left_out"]["q_proj"] == [2, 8192]


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("sketch.bits_per_weight=0", "sketch.bits_per_weight"),
        ("data.context_length=99999", "data.context_length=99999"),
        ("data.train.path=/no/such/file", "/no/such/file"),
        ("model.patterns=[nothing_like_it]", "matches no linear layer"),
    ],
)
def test_bad_input_ends_in_one_message_without_traceback(
    override: str,
    named: str,
    tiny_text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as ended:
        run_here(monkeypatch, *arguments(tiny_text, tmp_path, f"run_dir={tmp_path}/run", override))
    assert ended.value.code == 2
    captured = capsys.readouterr()
    assert captured.err.count("error:") == 1
    assert named in captured.err
    assert "Traceback" not in captured.err + captured.out


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["sketch.bits_per_weight=0.001"], "is too little for a 64x64 layer"),
        (["sketch=littlebit", "sketch.bits_per_weight=0.01"], "for rank 1 and its scales; raise it"),
        (["sketch=littlebit", "sketch.bits_per_weight=30"], "can use no more than"),
        (["sketch=rounding", "sketch.bits=null", "sketch.bits_per_weight=1.01"], "and their scales; raise it"),
        (["allocation.layer_budget=importance", "sketch.bits_per_weight=0.001"], "too little"),
        (["model.patterns=[nothing_like_it]"], "matches no linear layer"),
    ],
)
def test_what_no_layer_can_hold_is_refused_before_any_text_is_read(
    overrides: list[str],
    named: str,
    tiny_text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as ended:
        run_here(monkeypatch, *arguments(tiny_text, tmp_path, f"run_dir={tmp_path}/run", *overrides))
    assert ended.value.code == 2
    shown = capsys.readouterr().err
    assert named in shown
    assert "tokenising" not in shown


def test_empty_text_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    empty = tmp_path / "empty.txt"
    empty.write_text("\n \n")
    with pytest.raises(SystemExit) as ended:
        run_here(monkeypatch, *arguments(empty, tmp_path))
    assert ended.value.code == 2
    assert "holds no text" in capsys.readouterr().err


def test_unknown_option_and_key_are_explained_without_traceback(tmp_path: Path) -> None:
    for override, named in (("sketch=minhash", "absmaxmin"), ("sketch.row=2", "sketch.row")):
        done = run_apart("experiment=tiny", override, f"output_root={tmp_path}")
        assert done.returncode != 0
        assert named in done.stderr
        assert "Traceback" not in done.stderr


def test_traceback_is_there_when_asked_for(tiny_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from usllm.system.errors import UserError

    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(UserError, match=r"optimizer\.lr"):
        run_here(monkeypatch, *arguments(tiny_text, tmp_path, "optimizer.lr=0"))


def test_help_and_composed_configuration_are_printed(
    tiny_text: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="0"):
        run_here(monkeypatch, "--help")
    shown = capsys.readouterr().out
    assert "usllm-train experiment=demo" in shown
    assert "absmaxmin, countmin" in shown and "littlebit" in shown
    run_here(monkeypatch, "experiment=tiny", f"data.train.path={tiny_text}", "--cfg", "job", "--resolve")
    shown = capsys.readouterr().out
    assert "run_dir: runs/tiny/" in shown
    assert "bits_per_weight: 1.0" in shown
