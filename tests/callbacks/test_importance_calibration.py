from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_run
import torch
from tiny_run import Settings, load_model
from torch import Tensor, nn

from usllm.calibration.measure import measure_importance
from usllm.callbacks import ImportanceCalibration
from usllm.compress import DEFAULT_PATTERNS, compressed_layers, swap_linears_
from usllm.stages import calibrate
from usllm.system.errors import UserError


def batches(count: int = 3) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(0, 256, (2, 16), generator=generator)} for _ in range(count)]


def dense(patterns: tuple[str, ...] = DEFAULT_PATTERNS) -> nn.Module:
    model = load_model().train()
    swap_linears_(model, patterns)
    return model


def test_importance_is_the_mean_square_of_each_input_channel_without_dropout() -> None:
    model = load_model().eval()
    inputs: list[Tensor] = []
    model.model.layers[1].mlp.down_proj.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    with torch.no_grad():
        for batch in batches():
            model(**batch)
    expected = torch.cat([value.flatten(0, 1) for value in inputs]).square().mean(0)
    measured = measure_importance(dense(), batches(), 6)
    torch.testing.assert_close(measured["model.layers.1.mlp.down_proj"], expected)


def test_every_sketched_layer_is_measured() -> None:
    model = dense()
    assert measure_importance(model, batches(), 6).keys() == compressed_layers(model).keys()


def test_model_and_generators_are_left_as_they_were() -> None:
    model = dense()
    state = torch.get_rng_state()

    def drawing() -> Iterator[dict[str, Tensor]]:
        for batch in batches():
            torch.rand(3)
            yield batch

    measure_importance(model, drawing(), 6)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert not any(parameter.grad is not None for parameter in model.parameters())


def test_head_is_run_only_when_it_is_sketched() -> None:
    calls: list[str] = []
    for patterns in (DEFAULT_PATTERNS, ("o_proj", "lm_head")):
        config = load_model().config
        config.tie_word_embeddings = False
        model: Any = type(load_model())(config)
        swap_linears_(model, patterns)
        model.lm_head.register_forward_hook(lambda *_, name=patterns[-1]: calls.append(name))
        measure_importance(model, batches(1), 2)
    assert calls == ["lm_head"]


def test_no_sequence_is_refused() -> None:
    with pytest.raises(UserError, match="gave no sequence"):
        measure_importance(dense(), [], 4)


def test_activation_that_is_not_finite_names_the_first_layer_behind_it() -> None:
    model: Any = dense()
    with torch.no_grad():
        model.model.layers[1].input_layernorm.weight[0] = float("inf")
    with pytest.raises(UserError, match=r"calibration: .*model\.layers\.1\.self_attn\.q_proj"):
        measure_importance(model, batches(), 6)


def test_number_of_sequences_below_one_is_refused() -> None:
    with pytest.raises(UserError, match=r"stages\.calibrate\.sequences=0"):
        ImportanceCalibration(sequences=0)


def test_layers_hold_plans_and_the_measured_importance_before_the_first_step(tmp_path: Path) -> None:
    _, finetuner = tiny_run.run(tmp_path / "run", Settings(steps=1, validate_every=2))
    layers = compressed_layers(finetuner.network)
    assert all(layer.plan is not None for layer in layers.values())
    assert all(float(layer.importance.std()) > 0 for layer in layers.values())  # measured: not the ones of a new layer


def test_resumed_run_never_calibrates_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(tiny_run.Killed):
        tiny_run.run(tmp_path / "run", Settings(kill_at=("on_train_batch_start", 8)))
    monkeypatch.setattr(calibrate, "measure_statistics", None)
    tiny_run.run(tmp_path / "run", Settings())


def test_calibration_runs_in_the_precision_of_the_trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []
    whole = calibrate.measure_statistics

    def spy(model: Any, *arguments: Any, **options: Any) -> Any:
        embedding = model.model.embed_tokens
        handle = embedding.register_forward_hook(lambda *_: seen.append(torch.is_autocast_enabled("cpu")))
        try:
            return whole(model, *arguments, **options)
        finally:
            handle.remove()

    monkeypatch.setattr(calibrate, "measure_statistics", spy)
    tiny_run.run(tmp_path / "run", Settings(steps=1, validate_every=2, precision="bf16-mixed"))
    assert seen == [True] * 4
