"""A run is killed in every stage, for every method; all continue to the bits of a run that was left alone."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import torch
from commands import killed_after
from killing import STAGES
from test_methods import SETTINGS, final, train

from usllm.compress import METHODS
from usllm.compress import method as registered

RECONSTRUCT = [
    "stages=[default,reconstruct]",
    "stages.reconstruct.sequences=4",
    "stages.reconstruct.batch_size=2",
    "stages.reconstruct.steps=4",
    "stages.reconstruct.warmup_steps=1",
    "stages.reconstruct.save_every_n_steps=1",
]
FAST = ("sketch", "reconstruct, in a block")


def cases() -> list[object]:
    found = []
    for method in sorted(SETTINGS):
        for place in STAGES:
            if place == "calibrate" and not registered("sketch" if method == "sign" else method).needs:
                continue  # it needs no statistics: there is nothing to be killed in
            marks = [] if (method, place) == FAST else [pytest.mark.slow]
            found.append(pytest.param(method, place, marks=marks, id=f"{method}, {place}"))
    return found


@pytest.fixture(scope="module")
def whole(tiny_text: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Runs that were left alone, by method, made when they are asked for."""
    return {}


@pytest.mark.parametrize("method, place", cases())
def test_run_killed_in_a_stage_continues_bit_for_bit(
    method: str, place: str, whole: dict[str, Path], tiny_text: Path, tmp_path: Path
) -> None:
    if method not in whole:
        alone = tmp_path / "whole"
        done = train(tiny_text, alone, method, *RECONSTRUCT)
        assert done.status == 0, done.output
        whole[method] = alone
    folder = tmp_path / "killed"
    killed = train(tiny_text, folder, method, *RECONSTRUCT, before=killed_after(*STAGES[place]))
    assert killed.status == -signal.SIGKILL, killed.output
    resumed = train(tiny_text, folder, method, *RECONSTRUCT, "resume=true")
    assert resumed.status == 0, resumed.output
    assert [
        json.loads((place / "run" / "report.json").read_text())["seconds"]["continued"]
        for place in (whole[method], folder)
    ] == [False, True]
    ours, theirs = final(folder)["state_dict"], final(whole[method])["state_dict"]
    assert ours.keys() == theirs.keys()
    assert [key for key in ours if not torch.equal(ours[key], theirs[key])] == []


def test_every_method_has_settings() -> None:
    assert SETTINGS.keys() - {"sign"} == METHODS.keys()  # that is a sketch whose scales are trained


def test_without_stages_the_dense_model_is_finetuned(tiny_text: Path, tmp_path: Path) -> None:
    done = train(tiny_text, tmp_path, "sketch", "stages=none")
    assert done.status == 0, done.output
    assert "the model was finetuned dense" in done.output
    assert "Compressing nothing" in done.output and "Compressing 12 layers" not in done.output
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    (row,) = report["perplexity"]
    assert report["bits_per_weight"] is None and row["finetuned"] < row["dense"]
