"""Perplexity against the importance threshold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from usllm.compress import compressed_layers, swap_linears_
from usllm.experiments.importance_threshold import kept_channels, zeroed
from usllm.sketch import SketchConfig, build_plan

SETTINGS = ("study.thresholds=[0,0.9,1.3]", "study.sequences=4", "sketch.bits_per_weight=6")


@pytest.fixture(scope="module")
def finished(run_study: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("thresholds")
    return folder, run_study("importance_threshold", folder, *SETTINGS)


def test_higher_thresholds_keep_less(finished: tuple[Path, dict[str, Any]]) -> None:
    rows = finished[1]["rows"]
    assert [row["threshold"] for row in rows] == [0, 0.9, 1.3]
    for key in ("channels_kept", "energy_kept", "channels_with_states"):
        shares = [row[key] for row in rows]
        assert shares == sorted(shares, reverse=True)
        assert shares[0] > shares[-1]
    assert rows[0]["channels_kept"] == rows[0]["energy_kept"] == 1
    assert all(row["channels_with_states"] <= row["channels_kept"] for row in rows)


def test_each_threshold_has_both_figures_and_a_picture(finished: tuple[Path, dict[str, Any]]) -> None:
    first, _, last = (row["perplexity"] for row in finished[1]["rows"])
    (name,) = first["zeroed"]
    assert first["sketched"][name] != first["zeroed"][name]
    assert last["zeroed"][name] != first["zeroed"][name]
    assert (finished[0] / "importance_threshold.png").read_bytes().startswith(b"\x89PNG")


def test_unfinished_study_measures_only_what_is_missing(
    finished: tuple[Path, dict[str, Any]], run_study: Any, tmp_path: Path
) -> None:
    result = json.loads(json.dumps(finished[1]))
    result["finished"] = False
    result["rows"][0]["perplexity"]["zeroed"] = {"validation/32": 1.5}  # kept as it is found
    del result["rows"][2]["perplexity"]["sketched"]
    (tmp_path / "importance_threshold.json").write_text(json.dumps(result))
    again = run_study("importance_threshold", tmp_path, *SETTINGS, "resume=true")
    assert again["finished"]
    assert again["rows"][0]["perplexity"]["zeroed"] == {"validation/32": 1.5}
    assert again["rows"][2] == finished[1]["rows"][2]


def test_kept_channels_are_those_that_a_plan_may_give_states() -> None:
    importance = torch.linspace(0.1, 2.0, 40)
    config = SketchConfig(bits_per_weight=8.0, rows=1, group_size=64, min_importance=0.5)
    plan = build_plan((64, 40), importance, config, "layer")
    kept = kept_channels({"layer": importance}, 0.5)["layer"]
    assert 0 < int(kept.sum()) < 40
    assert set(plan.channel_order.tolist()) <= set(kept.nonzero().flatten().tolist())


def test_zeroed_weights_come_back_also_after_an_error() -> None:
    model = nn.Sequential(nn.Linear(4, 3))
    (layer,) = swap_linears_(model, ["0"]).values()
    before = layer.weight.detach().clone()
    kept = {name: torch.tensor([True, False, True, False]) for name in compressed_layers(model)}

    def failing() -> None:
        with zeroed(model, kept):
            assert torch.equal(layer.weight[:, 1::2], torch.zeros(3, 2))
            assert torch.equal(layer.weight[:, ::2], before[:, ::2])
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        failing()
    assert torch.equal(layer.weight, before)


@pytest.mark.parametrize("values", ["[]", "[0.1,0.1]", "[-1,0]", "[1,0]"])
def test_bad_thresholds_are_refused(
    values: str, run_study: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run_study("importance_threshold", tmp_path, f"study.thresholds={values}")
    assert "study.thresholds=" in capsys.readouterr().err
