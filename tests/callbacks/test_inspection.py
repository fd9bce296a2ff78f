"""Callbacks that only look: when they look, what they show, and that nobody notices."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_run
import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers.logger import DummyLogger
from tiny_run import Killed, Settings, differences, final_checkpoint, record

from usllm.callbacks import AllocationPicture, LayerTable, SketchHistograms, TextSamples, inspection, text_samples
from usllm.callbacks.allocation_picture import allocation_figure, allocation_grid
from usllm.callbacks.inspection import Inspection
from usllm.callbacks.layer_table import layer_table
from usllm.callbacks.sketch_histograms import importance_histogram, state_histogram
from usllm.callbacks.text_samples import continuations
from usllm.compress import allocate_, compressed_layers, compression_report, reproject_, swap_linears_
from usllm.models.random_model import byte_tokenizer, random_model
from usllm.sketch import SketchConfig
from usllm.system.errors import UserError

SETTINGS = Settings()  # 6 steps of 2 micro batches, validation after steps 2, 4 and 6


class Look(Inspection):
    """Notes the steps at which it is asked to show something, and draws random numbers."""

    def __init__(self, every_n_validations: int = 1) -> None:
        super().__init__(every_n_validations)
        self.steps: list[int] = []

    def show(self, trainer: Any, module: Any, step: int) -> None:
        self.steps.append(step)
        torch.rand(3)


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trainers here have no logger; let callbacks believe that one takes everything."""
    monkeypatch.setattr(inspection, "takes_media", lambda _: True)
    loggers = [DummyLogger()]
    monkeypatch.setattr("lightning.pytorch.Trainer.loggers", property(lambda _: loggers, lambda *_: None))


@pytest.fixture(scope="module")
def model() -> Any:
    """A tiny sketched model with uneven importance."""
    model = random_model("llama")
    swap_linears_(model)
    generator = torch.Generator().manual_seed(0)
    importance = {n: torch.rand(x.in_features, generator=generator) ** 4 for n, x in compressed_layers(model).items()}
    allocate_(model, SketchConfig(bits_per_weight=1.0, rows=2, group_size=64, allocation="waterfill"), importance)
    return model


@pytest.mark.usefixtures("shown")
def test_looks_before_the_first_step_after_validations_and_at_the_end_and_disturbs_nothing(tmp_path: Path) -> None:
    every, second = Look(), Look(every_n_validations=2)
    tiny_run.run(tmp_path / "looked", SETTINGS, every)
    tiny_run.run(tmp_path / "rarely", SETTINGS, second)
    assert every.steps == [0, 1, 3, 5]
    assert second.steps == [0, 3, 5]
    assert record(tmp_path / "looked") == record(tmp_path / "rarely")


@pytest.mark.usefixtures("shown")
def test_resumed_run_looks_at_the_same_validations(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        tiny_run.run(tmp_path / "run", Settings(kill_at=("on_train_batch_start", 8)), Look(every_n_validations=2))
    resumed = Look(every_n_validations=2)
    tiny_run.run(tmp_path / "run", SETTINGS, resumed)
    assert resumed.steps == [3, 5]


def test_without_a_logger_nothing_is_computed(tmp_path: Path) -> None:
    look = Look()
    tiny_run.run(tmp_path / "run", Settings(steps=2), look)
    assert look.steps == []


@pytest.mark.usefixtures("shown")
def test_run_with_everything_shown_is_the_run_without_bit_for_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logged: list[str] = []
    for module, name in (
        ("layer_table", "log_table"),
        ("layer_table", "log_scalars"),
        ("sketch_histograms", "log_histogram"),
        ("allocation_picture", "log_figure"),
        ("text_samples", "log_table"),
    ):
        monkeypatch.setattr(f"usllm.callbacks.{module}.{name}", lambda _, key, *rest: logged.append(str(key)))
    callbacks: list[Callback] = [
        LayerTable(),
        SketchHistograms(per_layer=True),
        AllocationPicture(),
        TextSamples(["a"], 3),
    ]
    tiny_run.run(tmp_path / "shown", SETTINGS, *callbacks)
    monkeypatch.setattr("lightning.pytorch.Trainer.loggers", property(lambda _: [], lambda *_: None))
    tiny_run.run(tmp_path / "plain", SETTINGS)
    assert record(tmp_path / "shown") == record(tmp_path / "plain")
    plain, seen = final_checkpoint(tmp_path / "plain"), final_checkpoint(tmp_path / "shown")
    seen["callbacks"] = {key: value for key, value in seen["callbacks"].items() if key in plain["callbacks"]}
    assert not differences(plain, seen)
    assert logged.count("allocation") == 1  # the allocation never changed
    assert logged.count("layers") == logged.count("samples") == 4
    assert "histograms/states/model.layers.0.mlp.up_proj" in logged


def test_row_of_a_layer_agrees_with_the_report(model: Any) -> None:
    report = {layer.name: layer for layer in compression_report(model).layers}
    changes = reproject_(model)
    for (columns, rows), churn in ((layer_table(model, {}), None), (layer_table(model, changes), 0.0)):
        assert [row[0] for row in rows] == list(report)
        for row in rows:
            values, layer = dict(zip(columns, row, strict=True)), report[row[0]]
            assert values["bits_per_weight"] == layer.bits_per_weight
            assert all(values[name] == fact.value for name, fact in layer.facts.items())
            assert values["projection_error"] == pytest.approx(layer.relative_error, rel=1e-4)
            assert values["winner_change"] == churn


def test_histograms_count_every_state_and_every_channel_once(model: Any) -> None:
    layers = list(compressed_layers(model).values())
    counts, edges = state_histogram(layers)
    assert counts.sum() == sum(layer.plan.num_states for layer in layers)
    assert len(edges) == len(counts) + 1
    at_the_clip = sum(
        int((codes.abs() == max((1 << (block.choice.bits - 1)) - 1, 1)).sum())
        for layer in layers
        for block in layer.plan.blocks
        for codes in [layer.states["codes"][block.first_state : block.first_state + block.num_states]]
    )
    assert counts[0] + counts[-1] == at_the_clip > 0
    counts, edges = importance_histogram(layers)
    assert counts.sum() == sum(layer.in_features for layer in layers)


def test_picture_holds_the_bits_that_the_plans_hold(model: Any) -> None:
    plans = {name: layer.plan for name, layer in compressed_layers(model).items()}
    grid = allocation_grid(plans)
    assert grid.shape == (12, 160)
    for row, plan in zip(grid, plans.values(), strict=True):
        assert np.isnan(row[plan.shape[1] :]).all()
        held = row[: plan.shape[1]].sum() * plan.shape[0]
        assert 0 <= plan.bit_breakdown()["states"] - held < 8  # whole bytes are stored
        np.testing.assert_allclose(row[: plan.shape[1]], plan.channel_rates())
    # Neighbours are averaged where there are more channels than columns.
    np.testing.assert_allclose(allocation_grid(plans, 80)[5], grid[5].reshape(80, 2).mean(1))
    narrow, wide, _ = allocation_figure(plans).axes
    assert [len(axes.get_yticklabels()) for axes in (narrow, wide)] == [10, 2]


def test_continuations_are_greedy_and_leave_the_models_mode(model: Any) -> None:
    model.train()
    model.model.layers[0].eval()
    tokenizer = byte_tokenizer()
    first, second = (continuations(model, tokenizer, ["the cat", "a"], 4, model.device) for _ in range(2))
    assert first == second
    assert model.training
    assert not model.model.layers[0].training
    ids = tokenizer("the cat", return_tensors="pt").input_ids
    model.eval()
    with torch.no_grad():
        for _ in range(4):
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
    assert tokenizer.decode(ids[0, 7:], skip_special_tokens=True) == first[0]


@pytest.mark.filterwarnings("ignore:You are calling .generate.. with the `input_ids` being on a device type different")
def test_prompts_go_to_the_device_that_computes_wherever_the_first_parameter_is(model: Any) -> None:
    # As shards in the memory of the host do (fsdp2_cpu_offload), while layers compute on the GPU.
    tokenizer, device = byte_tokenizer(), torch.device("cpu")
    expected = continuations(model, tokenizer, ["the cat"], 4, device)
    elsewhere = copy.deepcopy(model)
    elsewhere.register_parameter("shard", torch.nn.Parameter(torch.empty(1, device="meta")))
    assert next(elsewhere.parameters()).device.type == "meta"
    assert continuations(elsewhere, tokenizer, ["the cat"], 4, device) == expected


@pytest.mark.usefixtures("shown")
def test_samples_are_written_on_the_device_of_the_strategy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[torch.device] = []
    monkeypatch.setattr(text_samples, "continuations", lambda *arguments: used.append(arguments[-1]) or ["a"])
    monkeypatch.setattr(text_samples, "log_table", lambda *_: None)
    trainer, _ = tiny_run.run(tmp_path / "run", replace(SETTINGS, steps=2), TextSamples(["the cat"]))
    assert used == [trainer.strategy.root_device] * 2


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: TextSamples([]), "prompts"),
        (lambda: TextSamples(["a"], max_new_tokens=0), "max_new_tokens=0"),
        (lambda: LayerTable(every_n_validations=0), "every_n_validations=0"),
    ],
)
def test_unusable_arguments_are_refused(make: Any, named: str) -> None:
    with pytest.raises(UserError, match=named):
        make()
