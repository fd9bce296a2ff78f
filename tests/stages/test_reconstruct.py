"""Reconstruction: what a block learns, from which stream, under which settings."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from usllm.compress import METHODS, Compressor, Statistics, compressed_layers, method, swap_linears_
from usllm.models import ModelSpec
from usllm.models.loading import load_dense
from usllm.sketch import SketchConfig
from usllm.stages import Allocate, Reconstruct, Start, Work
from usllm.stages.block_errors import increment_error, relative_error, stream_error
from usllm.stages.block_progress import BlockProgress
from usllm.stages.blocks import decoder_blocks
from usllm.stages.reconstruct import sequence_order
from usllm.system.errors import UserError
from usllm.system.run_files import found_by_stages

TINY = ModelSpec(kind="random", name="llama")
OPTIONS: dict[str, dict[str, Any]] = {
    "sketch": {"bits_per_weight": 2.0, "rows": 1, "operator": "mean", "straight_through": "state"},
    "rounding": {"bits": 2},
    "littlebit": {"bits_per_weight": 1.5},
}


def tokens(count: int) -> Iterator[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        yield {"input_ids": torch.randint(0, 250, (1, 24), generator=generator)}


def compressed(compressor: Compressor, folder: Path | None = None) -> Work:
    """A tiny model behind ``start``, with even statistics."""
    model: nn.Module = load_dense(TINY)
    swap_linears_(model)
    layers = compressed_layers(model)
    work = Work(model, compressor, lambda: load_dense(TINY), tokens, torch.device("cpu"), nullcontext, folder)
    work.statistics = {name: Statistics(energy=torch.ones(layer.in_features)) for name, layer in layers.items()}
    for stage in (Allocate(), Start()):
        stage.run(work)
    return work


def stage(**changed: Any) -> Reconstruct:
    settings = {"sequences": 16, "batch_size": 4, "steps": 30, "warmup_steps": 2, "calibration_sequences": 8}
    return Reconstruct(**(settings | changed))


@pytest.mark.parametrize("name", METHODS)
def test_blocks_come_closer_to_the_dense_ones(name: str) -> None:
    found = method(name)
    errors = []
    for steps in (1, 40):
        work = compressed(found(found.Options(**OPTIONS[name])))
        stage(steps=steps, warmup_steps=1, statistics="dense", ramp=0.0).run(work)
        errors.append([block["stream_error"] for block in work.found["reconstruct"]])
    assert all(after < before for before, after in zip(*errors, strict=True))


def test_states_are_shared_out_anew_by_the_stream_and_keep_to_their_bits() -> None:
    plans = []
    for statistics in ("dense", "student"):
        work = compressed(method("sketch")(SketchConfig(bits_per_weight=2.0)))
        stage(steps=1, warmup_steps=0, statistics=statistics).run(work)
        layers = compressed_layers(work.model)
        assert all(layer.plan is not None and layer.plan.total_bits <= work.bits[n] for n, layer in layers.items())
        plans.append({name: layer.importance.clone() for name, layer in layers.items()})
    assert not any(torch.equal(plans[0][name], plans[1][name]) for name in plans[0])


def test_ramp_begins_with_the_latent_weight_and_ends_with_the_decoded_one() -> None:
    work = compressed(method("sketch")(SketchConfig(bits_per_weight=1.0)))
    layer = next(iter(compressed_layers(work.model).values()))
    x = torch.randn(3, layer.in_features)
    for share, weight in ((0.0, layer.weight), (1.0, layer.decoded_weight())):
        layer.ramp = share
        torch.testing.assert_close(layer(x), nn.functional.linear(x, weight, layer.bias))
    layer.ramp = 0.5
    assert not torch.allclose(layer(x), nn.functional.linear(x, layer.weight, layer.bias))
    layer(x).sum().backward()
    assert layer.weight.grad is not None


def test_every_block_is_trained_from_full_ramp_back_to_none() -> None:
    work = compressed(method("sketch")(SketchConfig(bits_per_weight=2.0)))
    before = {name: layer.weight.clone() for name, layer in compressed_layers(work.model).items()}
    stage(steps=4, ramp=0.5).run(work)
    for name, layer in compressed_layers(work.model).items():
        assert layer.ramp == 1.0
        assert not torch.equal(layer.weight, before[name])
    assert [block["block"] for block in work.found["reconstruct"]] == list(range(len(decoder_blocks(work.model))))


def errors_of(work: Work) -> list[float]:
    return [block["stream_error"] for block in work.found["reconstruct"]]


def test_windows_of_blocks_come_closer_together_and_later_blocks_start_where_windows_left_them() -> None:
    errors = []
    for steps in (1, 40):
        work = compressed(method("sketch")(SketchConfig(**OPTIONS["sketch"])))
        stage(steps=steps, warmup_steps=1, statistics="dense", ramp=0.0, window=2).run(work)
        errors.append(errors_of(work))
    assert errors[1][-1] < errors[0][-1]
    assert len(errors[1]) == len(decoder_blocks(work.model))


def test_blocks_after_the_first_ones_stay_as_they_started() -> None:
    work = compressed(method("sketch")(SketchConfig(bits_per_weight=2.0)))
    before = {name: layer.weight.clone() for name, layer in compressed_layers(work.model).items()}
    stage(steps=2, warmup_steps=0, blocks=1).run(work)
    first, second = decoder_blocks(work.model)
    assert not any(torch.equal(layer.weight, before[n]) for n, layer in compressed_layers(first).items())
    assert all(torch.equal(layer.weight, before[n]) for n, layer in compressed_layers(second).items())
    assert [block["block"] for block in work.found["reconstruct"]] == [0]


@pytest.mark.parametrize("key", ["blocks", "window"])
def test_more_blocks_than_the_model_has_are_refused(key: str) -> None:
    work = compressed(method("sketch")(SketchConfig(bits_per_weight=2.0)))
    with pytest.raises(UserError, match=rf"stages\.reconstruct\.{key}=3: the model has 2 blocks"):
        stage(**{key: 3}).run(work)


def test_recovery_moves_the_target_of_blocks_that_others_stand_before() -> None:
    trained = []
    for recovery in (1.0, 0.2):
        work = compressed(method("sketch")(SketchConfig(**OPTIONS["sketch"])))
        stage(steps=2, recovery=recovery).run(work)
        trained.append([block.state_dict() for block in decoder_blocks(work.model)])
    same = [all(torch.equal(one[k], other[k]) for k in one) for one, other in zip(*trained, strict=True)]
    assert same == [True, False]


@pytest.mark.parametrize(("window", "stop", "recovery"), [(1, 2, 1.0), (1, 33, 1.0), (1, 45, 0.5), (2, 20, 1.0)])
def test_a_run_that_was_killed_in_a_window_ends_with_the_same_bits(
    window: int, stop: int, recovery: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(Exception):
        pass

    def dies(self: BlockProgress, window: Any, step: int, error: float) -> None:
        if window.number * 30 + step == stop:
            raise Killed

    settings = {"window": window, "save_every_n_steps": 7, "recovery": recovery}
    folder = tmp_path / "stages"
    whole = compressed(method("sketch")(SketchConfig(**OPTIONS["sketch"])))
    stage(**settings).run(whole)
    killed = compressed(method("sketch")(SketchConfig(**OPTIONS["sketch"])), folder)
    with monkeypatch.context() as patch:
        patch.setattr(BlockProgress, "stepped", dies)
        with pytest.raises(Killed):
            stage(**settings).run(killed)
    resumed = compressed(method("sketch")(SketchConfig(**OPTIONS["sketch"])), folder)
    stage(**settings).run(resumed)
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name
    assert errors_of(whole) == errors_of(resumed)
    assert [row["block"] for row in found_by_stages(tmp_path)["reconstruct"]] == [0, 1]


def test_errors_are_relative_to_what_is_aimed_at() -> None:
    target = torch.randn(2, 8, 16)
    assert float(relative_error(target, target)) == 0.0
    assert float(relative_error(torch.zeros_like(target), target)) == pytest.approx(1.0)
    none = torch.zeros_like(target)
    assert increment_error((none, target), (none, target)) == 0.0
    assert increment_error((none, none), (none, target)) == pytest.approx(1.0)


def test_errors_of_streams_are_those_of_their_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    before, after, dense_before, dense_after = torch.randn(4, 5, 8, 16)
    whole = [stream_error(after, dense_after), increment_error((before, after), (dense_before, dense_after))]
    assert whole[0] == pytest.approx(float(relative_error(after, dense_after)))
    monkeypatch.setattr("usllm.stages.block_errors._PART_ELEMENTS", 256)
    parts = [stream_error(after, dense_after), increment_error((before, after), (dense_before, dense_after))]
    assert parts == pytest.approx(whole)


def test_silent_tokens_do_not_decide() -> None:
    target = torch.ones(1, 4, 8)
    target[:, 2] = 0
    assert float(relative_error(torch.ones(1, 4, 8), target)) == pytest.approx(0.25 / 0.05)


def test_every_sequence_is_taken_once_before_one_comes_again() -> None:
    order = sequence_order(10, 25, 3).tolist()
    assert sorted(order[:10]) == sorted(order[10:20]) == list(range(10))
    assert order[:10] != order[10:20]
    assert order == sequence_order(10, 25, 3).tolist() != sequence_order(10, 25, 4).tolist()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("steps", 0),
        ("batch_size", 17),
        ("latent_lr", 0.0),
        ("lr", float("inf")),
        ("scale_lr", -1.0),
        ("warmup_steps", 31),
        ("ramp", 1.1),
        ("recovery", -0.1),
        ("statistics", "teacher"),
        ("calibration_sequences", 0),
        ("window", 0),
        ("stride", 2),
        ("blocks", 0),
        ("save_every_n_steps", 0),
    ],
)
def test_wrong_settings_are_refused_by_their_key(key: str, value: Any) -> None:
    with pytest.raises(UserError, match=r"stages\.reconstruct\.") as caught:
        stage(**{key: value})
    assert key in str(caught.value)
