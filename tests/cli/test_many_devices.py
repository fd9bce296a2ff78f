"""``usllm-train`` on two processes, as Lightning starts them: one run, one report, and resumed by one process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_train import KILLER, arguments, run_apart, run_here


def perplexities(run_dir: Path) -> list[float]:
    """Figures of all stages."""
    (row,) = json.loads((run_dir / "report.json").read_text())["perplexity"]
    return [row[stage] for stage in ("dense", "before", "after")]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_sharded_run_is_killed_continued_by_one_process_and_reported_as_if_it_had_always_been_one(
    tiny_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    two = ["trainer.devices=2", "trainer.strategy=fsdp2", "data.batch_size=1", "reuse_statistics=false"]
    run_here(monkeypatch, *arguments(tiny_text, tmp_path, f"run_dir={tmp_path}/one", "reuse_statistics=false"))

    whole = run_apart(*arguments(tiny_text, tmp_path, f"run_dir={tmp_path}/two", *two))
    assert whole.returncode == 0, whole.stderr
    assert whole.stderr.count("Reading and tokenising") == 1
    assert whole.stdout.count("Perplexity, tiny") == 1
    assert perplexities(tmp_path / "two") == pytest.approx(perplexities(tmp_path / "one"), rel=1e-5)
    report = json.loads((tmp_path / "two" / "report.json").read_text())
    assert (report["steps"], report["tokens"]) == (8, 8 * 2 * 32)

    killed = run_apart(*arguments(tiny_text, tmp_path, f"run_dir={tmp_path}/killed", *two, *KILLER))
    assert killed.returncode != 0
    assert not (tmp_path / "killed" / "report.json").exists()
    capsys.readouterr()
    again = arguments(tiny_text, tmp_path, f"run_dir={tmp_path}/killed", "resume=true", "reuse_statistics=false")
    with pytest.raises(SystemExit):
        run_here(monkeypatch, *again, "data.batch_size=3")
    assert "1 x 1 x 2 = 2 in the checkpoint, 3 x 1 x 1 = 3 in this run" in capsys.readouterr().err
    run_here(monkeypatch, *again)
    assert perplexities(tmp_path / "killed") == pytest.approx(perplexities(tmp_path / "one"), rel=1e-5)
