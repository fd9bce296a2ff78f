"""What a stage keeps is found again by the same work, and by no other."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from usllm.compress import Statistics, as_compressor, compressed_layers, swap_linears_
from usllm.compress.surgery import plan_layers, start_
from usllm.models.random_model import random_model
from usllm.sketch import SketchConfig
from usllm.stages import Stage, Work

CONFIG = SketchConfig(bits_per_weight=3.0, rows=1, group_size=32)


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


def texts(first: int) -> Callable[[int], Iterable[dict[str, Tensor]]]:
    return lambda count: [{"input_ids": torch.arange(first, first + 4)[None]} for _ in range(min(count, 2))]


def work_in(folder: Path | None, **changed: Any) -> Work:
    """A started model on its way; what is no field of ``Work`` changes how it was made."""
    config = changed.pop("config", CONFIG)
    energy, weight = changed.pop("energy", 1.0), changed.pop("weight", 0.0)
    model = random_model("llama").eval()
    layers = swap_linears_(model)
    statistics = {name: Statistics(torch.full((layer.in_features,), energy)) for name, layer in layers.items()}
    compressor = as_compressor(config)
    bits, plans = plan_layers(model, compressor, statistics)
    start_(model, plans, statistics)
    with torch.no_grad():
        next(iter(compressed_layers(model).values())).get_parameter("weight")[0, 0] += weight
    found = Work(
        model=model,
        compressor=compressor,
        load_dense=lambda: random_model("llama"),
        batches=texts(0),
        device=torch.device("cpu"),
        context=contextlib.nullcontext,
        folder=folder,
        statistics=statistics,
        bits=bits,
        plans=plans,
        text={"data.train": {"text": "abc"}},
    )
    return replace(found, **changed)


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
