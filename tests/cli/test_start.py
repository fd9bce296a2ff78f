"""From what was typed to Hydra: everything is composed once, unless something could say in which mode Hydra runs."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from commands import command
from hydra._internal.hydra import Hydra
from omegaconf import DictConfig, OmegaConf

from usllm.cli import inspect

CONF = Path(__file__).parents[2] / "conf"


@pytest.mark.parametrize(
    ("typed", "times"), [([], 1), (["hydra.verbose=false"], 2)], ids=["ours", "a-setting-of-hydra"]
)
def test_times_that_everything_is_composed(
    typed: list[str], times: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, ordinary = [], Hydra.compose_config
    monkeypatch.setattr(
        Hydra, "compose_config", lambda *given, **options: made.append(1) or ordinary(*given, **options)
    )
    monkeypatch.setattr(sys, "argv", ["usllm-inspect", f"model={tmp_path}/nowhere", *typed])
    with pytest.raises(SystemExit):
        inspect.main()
    assert len(made) == times


def test_mode_that_is_typed_is_hydras(tmp_path: Path) -> None:
    status, output = command("train", "hydra.mode=MULTIRUN", "sketch.rows=0,99", "model=random", folder=tmp_path)
    assert status == 2
    assert "sketch.rows=0 must be" in output and "sketch.rows=99 must be" in output


def test_no_configuration_says_in_which_mode_hydra_runs() -> None:
    read = {path: OmegaConf.load(path) for path in CONF.rglob("*.yaml")}
    assert read
    for path, content in read.items():
        hydra = content if path.parent.name == "hydra" else content.get("hydra")
        assert not isinstance(hydra, DictConfig) or "mode" not in hydra, path
