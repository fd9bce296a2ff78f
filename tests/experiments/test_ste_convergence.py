"""The sketched run beside the floating-point run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from usllm.experiments.ste_convergence import start_perplexity

SETTINGS = (
    "data.max_sequences=4",
    "data.batch_size=1",
    "trainer.limit_val_batches=4",
    "optimizer.lr=1e-3",
    "study.variants.sketched.callbacks.sketch_health.warmup_steps=2",
)


@pytest.fixture(scope="module")
def finished(run_study: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("convergence")
    return folder, run_study("ste_convergence", folder, *SETTINGS)


def test_every_epoch_has_loss_and_perplexity_of_both_runs(finished: tuple[Path, dict[str, Any]]) -> None:
    for variant in finished[1]["variants"].values():
        points = variant["points"]
        assert [point["epoch"] for point in points] == [0, 1, 2, 3, 4, 5]
        assert [point["step"] for point in points] == [0, 4, 8, 12, 16, 20]
        assert all(point["train_loss"] > 0 for point in points[1:])
        assert all(point["val_ppl"] > 1 for point in points)
        assert variant["losses"]["step"] == list(range(1, 21))
        first = sum(variant["losses"]["loss"][:4]) / 4
        assert points[1]["train_loss"] == pytest.approx(first)
    assert (finished[0] / "ste_convergence.png").read_bytes().startswith(b"\x89PNG")


def test_both_runs_learn_and_the_dense_one_has_no_rate(finished: tuple[Path, dict[str, Any]]) -> None:
    variants = finished[1]["variants"]
    assert variants["dense"]["bits_per_weight"] is None
    assert 0.5 < variants["sketched"]["bits_per_weight"] <= 1.0
    for variant in variants.values():
        assert variant["points"][-1]["train_loss"] < variant["points"][1]["train_loss"]
        assert variant["points"][-1]["val_ppl"] < variant["points"][0]["val_ppl"]


def test_last_validation_is_the_perplexity_of_the_report(finished: tuple[Path, dict[str, Any]]) -> None:
    for variant in finished[1]["variants"].values():
        (row,) = variant["perplexity"]
        assert variant["points"][-1]["val_ppl"] == pytest.approx(row["finetuned"], rel=1e-4)


def test_loss_stability_is_against_the_floating_point_run(finished: tuple[Path, dict[str, Any]]) -> None:
    assert finished[1]["variants"]["dense"]["instability"] is None
    assert finished[1]["variants"]["sketched"]["instability"] > 0


def test_resumed_study_reads_its_runs_back(finished: tuple[Path, dict[str, Any]], run_study: Any) -> None:
    again = run_study("ste_convergence", finished[0], *SETTINGS, "resume=true")
    assert again["variants"] == finished[1]["variants"]


@pytest.mark.parametrize(
    ("limit", "windows", "window", "known"),
    [(4, 4, 32, True), (4, 3, 32, False), (4, 4, 64, False), (1.0, 10, 32, True), (1.0, 4, 32, False)],
)
def test_start_is_known_only_on_the_sequences_of_validation(
    limit: float, windows: int, window: int, known: bool
) -> None:
    report = {
        "config": {"data": {"context_length": 32, "batch_size": 1}, "trainer": {"limit_val_batches": limit}},
        "perplexity": [
            {"test_set": "validation", "window": window, "windows": windows, "tokens": 10 * window, "sketched": 7.0}
        ],
    }
    assert start_perplexity(report) == (7.0 if known else None)


def test_missing_csv_log_is_refused_before_training(
    run_study: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run_study("ste_convergence", tmp_path, "logger=none")
    assert "logger=csv" in capsys.readouterr().err
    assert not (tmp_path / "dense").exists()
