"""What a stage keeps is found again by the same work, and by no other."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from started import CONFIG, texts, work_in

from usllm.compress import Compressor, registry
from usllm.compress.methods.sketch import SketchCompressor
from usllm.stages import Stage, Work, store


class Mine(Stage):
    """A stage with an option."""

    name = "mine"

    def __init__(self, size: float = 0.5) -> None:
        self.size = size

    def run(self, work: Work) -> None:
        """Keep three numbers."""
        self.made = False
        store = work.store(self)

        def make() -> dict[str, Any]:
            self.made = True
            return {"numbers": torch.arange(3), "size": self.size}

        self.found = store.kept("numbers", make)


class Other(Mine):
    """Another stage of the same name."""


def made(work: Work, stage: Mine) -> bool:
    """Whether the stage had to do its work."""
    stage.run(work)
    assert torch.equal(stage.found["numbers"], torch.arange(3)) and stage.found["size"] == stage.size
    return stage.made


def test_same_work_is_found_again(tmp_path: Path) -> None:
    assert made(work_in(tmp_path), Mine())
    assert not made(work_in(tmp_path), Mine())
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


@pytest.mark.parametrize(
    "changed",
    [
        {"config": replace(CONFIG, seed=1)},
        {"config": replace(CONFIG, rounding="nearest")},
        {"weight": 1e-3},
        {"energy": 1.5},
        {"seed": 1},
        {"text": {"data.train": {"text": "abd"}}},
        {"batches": texts(1)},
        {"context": lambda: torch.autocast("cpu", torch.bfloat16)},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_work_of_another_configuration_is_done_anew(changed: dict[str, Any], tmp_path: Path) -> None:
    assert made(work_in(tmp_path), Mine())
    assert made(work_in(tmp_path, **changed), Mine())
    assert not made(work_in(tmp_path), Mine())


@pytest.mark.parametrize("stage", [Mine(0.25), Other()], ids=["option", "class"])
def test_another_option_or_stage_of_the_same_name_is_done_anew(stage: Mine, tmp_path: Path) -> None:
    assert made(work_in(tmp_path), Mine())
    assert made(work_in(tmp_path), stage)


@pytest.mark.parametrize(("share", "found"), [(1.0, True), (0.5, False)])
def test_an_option_that_came_later_changes_nothing_at_its_first_value(
    share: float, found: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work, stage = work_in(tmp_path), Mine()
    work.store(stage).save("x", {"a": 1})
    monkeypatch.setattr(Mine, "later_options", {"share": 1.0})
    vars(stage)["share"] = share
    assert (work.store(stage).load("x") is not None) == found


@pytest.mark.parametrize(("rounding", "found"), [("toward_zero", True), ("nearest", False)])
def test_an_option_that_the_method_got_later_changes_nothing_at_its_first_value(
    rounding: str, found: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SketchCompressor, "later_options", {})
    section = registry.to_section
    with monkeypatch.context() as patch:  # as the method was before it had the option

        def older(compressor: Compressor) -> dict[str, Any]:
            written = section(compressor)
            return {**written, "options": {k: v for k, v in written["options"].items() if k != "rounding"}}

        patch.setattr(store, "to_section", older)
        work_in(tmp_path).store(Mine()).save("x", {"a": 1})
    monkeypatch.setattr(SketchCompressor, "later_options", {"rounding": "toward_zero"})
    work = work_in(tmp_path, config=replace(CONFIG, rounding=rounding))
    assert (work.store(Mine()).load("x") is not None) == found


def test_what_a_stage_names_besides_decides_too(tmp_path: Path) -> None:
    work, stage = work_in(tmp_path), Mine()
    work.store(stage, rounds=torch.tensor(1.5)).save("x", {"a": 1})
    assert work.store(stage, rounds=torch.tensor(1.5)).load("x") == {"a": 1}
    assert work.store(stage, rounds=torch.tensor(1.25)).load("x") is None
    assert work.store(stage).load("x") is None


def test_only_the_rank_that_writes_writes_and_drops(tmp_path: Path) -> None:
    writer, reader = work_in(tmp_path).store(Mine()), work_in(tmp_path, writes=False).store(Mine())
    reader.save("x", {"a": 1})
    assert writer.load("x") is None
    writer.save("x", {"a": 1})
    reader.drop("x")
    assert reader.load("x") == {"a": 1}
    writer.drop("x")
    assert writer.load("x") is None


def test_without_a_folder_nothing_is_kept() -> None:
    work = work_in(None)
    assert made(work, Mine()) and made(work, Mine())
