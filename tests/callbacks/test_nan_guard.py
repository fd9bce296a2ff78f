from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_run
import torch
from lightning.pytorch import Callback
from tiny_run import Settings

from usllm.system.errors import RunError
from usllm.training import latest_checkpoint

SETTINGS = Settings(accumulate=1)  # checkpoints behind steps 2, 4 and 6


class At(Callback):
    """Calls a function of the module at the start of the n-th micro batch."""

    def __init__(self, count: int, action: Any) -> None:
        self.left, self.action = count, action

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.left -= 1
        if self.left == 0:
            self.action(pl_module.network)


def fails(folder: Path, action: Any) -> str:
    with pytest.raises(RunError) as caught:
        tiny_run.run(folder, SETTINGS, At(4, action))
    return str(caught.value)


def test_poisoned_latent_is_named_with_its_step_and_the_last_good_checkpoint_stays(tmp_path: Path) -> None:
    def poison(model: Any) -> None:
        with torch.no_grad():
            model.model.layers[1].input_layernorm.weight[3] = float("nan")

    message = fails(tmp_path / "run", poison)
    assert "step 4: the loss is nan" in message
    assert "the weight model.model.layers.1.input_layernorm.weight" in message
    assert "step=00000002.ckpt" in message
    saved = latest_checkpoint(tmp_path / "run" / "checkpoints")
    assert saved is not None
    assert saved.name == "step=00000002.ckpt"
    state = torch.load(saved, weights_only=True)["state_dict"]
    assert all(torch.isfinite(tensor).all() for tensor in state.values() if tensor.is_floating_point())


def test_first_layer_with_such_an_activation_is_named(tmp_path: Path) -> None:
    def poison(model: Any) -> None:
        model.model.layers[1].mlp.gate_proj.register_forward_hook(lambda module, inputs, output: output / 0)

    message = fails(tmp_path / "run", poison)
    assert "first seen in the output of model.model.layers.1.mlp.gate_proj" in message


def test_gradient_is_caught_before_it_reaches_the_weights(tmp_path: Path) -> None:
    seen: list[Any] = []

    def poison(model: Any) -> None:
        layer = model.model.layers[0].self_attn.v_proj
        layer.weight.register_hook(lambda gradient: gradient * float("inf"))
        seen.append(layer)

    message = fails(tmp_path / "run", poison)
    assert "step 4: the gradient is not finite, first seen in the gradient of" in message
    assert "model.model.layers.0.self_attn.v_proj.weight" in message
    assert torch.isfinite(seen[0].weight).all()


def test_loss_that_is_infinite_without_a_bad_layer_blames_the_objective(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from usllm.training.objectives import CrossEntropy

    whole = CrossEntropy.loss
    monkeypatch.setattr(CrossEntropy, "loss", lambda *a: (whole(*a)[0] * float("inf"), {}))
    with pytest.raises(RunError, match="step 1: the loss is inf, first seen in the objective itself"):
        tiny_run.run(tmp_path / "run", SETTINGS)
