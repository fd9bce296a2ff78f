"""Runs in every state are read, and nothing that a dying process leaves stops the reader."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from synthetic import DENSE, STEPS, config, report, write_curves, write_run, write_sweep

from usllm.reports.directory import read_folder, read_run
from usllm.reports.runs import Run, TestText
from usllm.system.errors import UserError
from usllm.system.files import write_json
from usllm.system.lock import sole_user

TEXT = TestText("wikitext2", 512, 8, 301_948)


def by_name(runs: list[Run], part: str) -> Run:
    (found,) = [run for run in runs if part in run.name]
    return found


def test_every_run_of_a_sweep_is_found_with_its_state(runs: list[Run]) -> None:
    assert len(runs) == 9
    states = sorted(run.status for run in runs)
    assert states == ["failed", *["finished"] * 7, "interrupted"]


def test_a_finished_run_has_all_that_its_report_says(runs: list[Run]) -> None:
    run = by_name(runs, "proportional+sketch.bits_per_weight-0.5+sketch.rows-3")
    assert (run.bits_asked, run.rows, run.allocation, run.objective) == (0.5, 3, "proportional", "cross_entropy")
    assert run.bits == pytest.approx(0.5 * 0.9993)
    assert run.perplexity[TEXT].dense == DENSE["wikitext2"]
    assert (run.steps, run.tokens) == (STEPS, STEPS * 128)
    assert run.overrides == ("sketch.bits_per_weight=0.5", "sketch.rows=3", "allocation=proportional")
    assert len(run.layers) == 180
    assert (run.layers[0].block, run.layers[0].projection) == (0, "q")
    assert run.layers[0].facts["channels_with_states"] == pytest.approx(60 / 64)
    assert run.machine["cpu"] == "AMD EPYC"
    assert "perplexity 3786" in run.warnings[0]


def test_an_interrupted_run_has_what_it_measured_and_trained_so_far(runs: list[Run]) -> None:
    run = by_name(runs, "waterfill+sketch.bits_per_weight-1+sketch.rows-3")
    assert run.status == "interrupted"
    assert run.perplexity[TEXT].sketched is not None
    assert run.finetuned(TEXT) is None
    assert run.steps == STEPS // 2
    assert (run.bits_asked, run.rows, run.allocation) == (1.0, 3, "waterfill")


def test_a_failed_run_says_why(runs: list[Run]) -> None:
    run = by_name(runs, "proportional+sketch.bits_per_weight-1+sketch.rows-3")
    assert run.status == "failed"
    assert "OutOfMemoryError: tried to allocate 2 GiB" in run.warnings[0]


def test_a_run_in_progress_is_called_running(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", config(0.5, 1, "waterfill"), steps=10)
    with sole_user(folder):
        assert read_run(folder, "run").status == "running"
    assert read_run(folder, "run").status == "interrupted"


def test_a_dense_run_has_no_rate(runs: list[Run]) -> None:
    run = by_name(runs, "dense")
    assert run.dense
    assert (run.bits_asked, run.bits, run.rows, run.allocation) == (None, None, None, None)
    assert run.finetuned(TEXT) == pytest.approx(DENSE["wikitext2"] * 0.9)


@pytest.mark.parametrize("file", ["report.json", "baseline.json", "failure.json"])
@pytest.mark.parametrize("content", ["", '{"finished": tr', "[1]", "null", "\0"])
def test_a_damaged_file_is_noted_and_read_around(tmp_path: Path, file: str, content: str) -> None:
    folder = write_run(tmp_path / "run", config(0.5, 1, "waterfill"), steps=10)
    (folder / file).write_text(content, encoding="utf-8")
    run = read_run(folder, "run")
    assert run.status == "interrupted"
    assert run.warnings == (f"{file} cannot be read: it is damaged",)
    assert run.steps == 10


@pytest.mark.parametrize("content", ["", "a: [", "just text", "- 1", "\t\t:"])
def test_damaged_configurations_leave_gaps(tmp_path: Path, content: str) -> None:
    folder = write_run(tmp_path / "run", config(0.5, 1, "waterfill"), steps=10)
    for name in ("config.yaml", "overrides.yaml"):
        (folder / ".hydra" / name).write_text(content, encoding="utf-8")
    run = read_run(folder, "run")
    assert run.steps == 10
    assert run.rows is None


@pytest.mark.parametrize(
    "broken",
    [
        {"perplexity": None, "bits_per_weight": "x", "bytes": [], "compression": {"layers": [None, 3]}, "health": 1},
        {"perplexity": [{"test_set": "a"}, 7], "seconds": None, "machine": None, "config": None, "steps": 0},
    ],
)
def test_a_report_of_another_shape_leaves_gaps(tmp_path: Path, broken: dict) -> None:
    write_json(tmp_path / "report.json", {**report(config(0.5, 1, "waterfill"), 5.0), **broken})
    assert read_run(tmp_path, "run").status == "finished"


def test_a_run_that_only_began_is_there_but_studies_evaluations_and_refused_runs_are_not(tmp_path: Path) -> None:
    for name, content in {
        "begun": config(0.5, 1, "waterfill"),
        "study": {**config(0.5, 1, "waterfill"), "study": {"name": "layer_error"}},
        "eval": {"name": "eval", "ckpt": None},
        "refused": config(0.0, 1, "waterfill"),
    }.items():
        path = tmp_path / name / ".hydra" / "config.yaml"
        path.parent.mkdir(parents=True)
        path.write_text(yaml.safe_dump(content), encoding="utf-8")
        if name != "refused":  # a run whose configuration is refused never takes its directory
            (tmp_path / name / ".lock").touch()
    (run,) = read_folder(tmp_path)
    assert (run.name, run.status, run.rows) == ("begun", "interrupted", 1)


def test_the_configuration_of_a_variant_is_the_logger_s_copy(tmp_path: Path) -> None:
    folder = tmp_path / "study" / "waterfill"
    write_curves(folder, [3.0, 2.0])
    settings = config(0.25, 2, "waterfill")
    (folder / "csv" / "version_0" / "hparams.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    above = tmp_path / "study" / ".hydra"
    above.mkdir()
    study = {"study": {"variants": {"waterfill": {"sketch": {"rows": 2}, "allocation": {"name": "waterfill"}}}}}
    (above / "config.yaml").write_text(yaml.safe_dump(study, sort_keys=False), encoding="utf-8")
    (run,) = read_folder(tmp_path)
    assert (run.rows, run.bits_asked) == (2, 0.25)
    assert run.overrides == ("sketch.rows=2", "allocation.name=waterfill")


def test_references_that_are_not_resolved_are_no_numbers(tmp_path: Path) -> None:
    settings = config(0.5, 1, "waterfill")
    settings["sketch"] |= {"rows": "${oc.env:ROWS}", "bits_per_weight": "${oc.env:RATE}"}
    folder = write_run(tmp_path / "run", config(0.5, 1, "waterfill"), steps=5)
    (folder / ".hydra" / "config.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    run = read_run(folder, "run")
    assert (run.rows, run.bits_asked) == (None, None)


def test_checkpoints_alone_make_a_run(tmp_path: Path) -> None:
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "checkpoints" / "step=00000001.ckpt").write_bytes(b"")
    (run,) = read_folder(tmp_path)
    assert (run.name, run.status) == ("run", "interrupted")


@pytest.mark.parametrize("folders", [0, 1])
def test_no_run_is_a_clear_error(tmp_path: Path, folders: int) -> None:
    folder = tmp_path if folders else tmp_path / "none"
    with pytest.raises(UserError, match="holds no run" if folders else "no such folder"):
        read_folder(folder)


def test_names_are_what_folders_do_not_share(tmp_path: Path) -> None:
    write_sweep(tmp_path / "a" / "b")
    names = [run.name for run in read_folder(tmp_path)]
    assert "dense" in names
    assert all("/" not in name for name in names)
    (single,) = read_folder(tmp_path / "a" / "b" / "dense")
    assert single.name == "dense"
