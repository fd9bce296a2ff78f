from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_run
import torch
from lightning.pytorch import Callback, LightningModule
from tiny_run import Settings

from usllm.compress import compressed_layers
from usllm.sketch import SketchConfig
from usllm.system.errors import UserError
from usllm.training import CrossEntropy, OptimizerConfig, SketchFinetuner, next_token_loss, sketch_finetuner


def module(**changes: Any) -> SketchFinetuner:
    arguments: dict[str, Any] = {
        "load_model": tiny_run.load_model,
        "sketch": SketchConfig(**Settings().sketch),
        "objective": CrossEntropy(),
        "optimizer": OptimizerConfig(),
    }
    return SketchFinetuner(**(arguments | changes))


def saved_by(finetuner: SketchFinetuner) -> dict[str, Any]:
    finetuner.configure_model()
    checkpoint: dict[str, Any] = {}
    finetuner.on_save_checkpoint(checkpoint)
    return checkpoint


class Metrics(Callback):
    """Logged values by micro batch."""

    def __init__(self) -> None:
        self.seen: list[dict[str, float]] = []

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        self.seen.append({name: float(value) for name, value in trainer.callback_metrics.items()})

    def on_train_end(self, trainer: Any, *_: Any) -> None:
        self.on_train_batch_start(trainer)


def test_model_is_the_dense_one_until_it_is_calibrated() -> None:
    finetuner = module()
    finetuner.configure_model()
    input_ids = torch.randint(0, 256, (2, 9))
    dense = tiny_run.load_model().eval()(input_ids=input_ids).logits
    torch.testing.assert_close(finetuner.eval()(input_ids), dense)
    assert all(layer.plan is None for layer in compressed_layers(finetuner.network).values())


def test_model_is_loaded_on_the_host_whatever_the_device_of_new_tensors_is() -> None:
    finetuner = module()
    with torch.device("meta"):  # as Lightning asks for new tensors on the card
        finetuner.configure_model()
    assert {tensor.device.type for tensor in (*finetuner.parameters(), *finetuner.network.buffers())} == {"cpu"}


def test_model_is_loaded_once_and_trains() -> None:
    loaded = []

    def load() -> Any:
        loaded.append(tiny_run.load_model().eval())
        return loaded[-1]

    finetuner = module(load_model=load)
    finetuner.configure_model()
    finetuner.configure_model()
    assert len(loaded) == 1
    assert finetuner.network.training


def test_logged_training_loss_is_the_mean_over_an_optimizer_step(tmp_path: Path) -> None:
    metrics = Metrics()
    tiny_run.run(tmp_path / "run", Settings(steps=3, accumulate=2), metrics)
    recorded = [json.loads(line) for line in (tmp_path / "run" / "record.jsonl").read_text().splitlines()]
    losses = [float.fromhex(value[0]) for kind, _, value in recorded if kind == "train"]
    # Lightning hands callbacks the loss divided by the number of micro batches per step.
    expected = [sum(losses[i : i + 2]) for i in (0, 2, 4)]
    assert [seen["train/loss"] for seen in metrics.seen[2::2]] == pytest.approx(expected)


def test_parts_of_the_objective_are_logged_by_name(tmp_path: Path) -> None:
    metrics = Metrics()
    objective = {"name": "distill", "hidden_weight": 2.0, "cross_entropy_weight": 1.0}
    tiny_run.run(tmp_path / "run", Settings(steps=2, objective=objective), metrics)
    last = metrics.seen[-1]
    assert last["train/loss"] == pytest.approx(
        last["train/kl"] + 2 * last["train/hidden"] + last["train/cross_entropy"], rel=1e-4
    )


def test_validation_is_the_mean_over_tokens_and_its_perplexity(tmp_path: Path) -> None:
    trainer, finetuner = tiny_run.run(tmp_path / "run", Settings(steps=2, validate_every=4))
    finetuner.eval()
    total, count = 0.0, 0
    with torch.no_grad():
        for batch in list(trainer.datamodule.val_dataloader())[:2]:  # type: ignore[attr-defined]
            input_ids = batch["input_ids"]
            tokens = input_ids.numel() - len(input_ids)
            total += next_token_loss(finetuner(input_ids), input_ids).item() * tokens
            count += tokens
    assert trainer.callback_metrics["val/loss"].item() == pytest.approx(total / count, rel=1e-5)
    assert trainer.callback_metrics["val/ppl"].item() == pytest.approx(math.exp(total / count), rel=1e-4)


def test_teacher_is_in_no_state_dict_and_no_optimizer(tmp_path: Path) -> None:
    settings = Settings(steps=1, validate_every=2, objective={"name": "distill"})
    trainer, finetuner = tiny_run.run(tmp_path / "run", settings)
    teacher = {id(p) for p in finetuner.objective.teacher.parameters()}  # type: ignore[attr-defined]
    trained = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
    assert not teacher & trained
    assert trained == {id(p) for p in finetuner.parameters()}


@pytest.mark.parametrize(
    ("precision", "dtype"), [("32-true", torch.float32), ("bf16-mixed", torch.bfloat16)], ids=["fp32", "bf16"]
)
def test_teacher_computes_in_the_precision_of_the_run(precision: str, dtype: torch.dtype, tmp_path: Path) -> None:
    settings = Settings(steps=1, validate_every=2, objective={"name": "distill"}, precision=precision)
    _, finetuner = tiny_run.run(tmp_path / "run", settings)
    assert {p.dtype for p in finetuner.objective.teacher.parameters()} == {dtype}  # type: ignore[attr-defined]
    assert {p.dtype for p in finetuner.parameters()} == {torch.float32}


def test_gradient_checkpointing_changes_no_loss(tmp_path: Path) -> None:
    records = []
    for checkpointing in (False, True):
        folder = tmp_path / str(checkpointing) / "run"
        tiny_run.run(folder, Settings(steps=2, gradient_checkpointing=checkpointing))
        records.append([float.fromhex(v[0]) for (kind, _), v in tiny_run.record(folder).items() if kind == "train"])
    assert records[0] == pytest.approx(records[1], rel=1e-5)


def test_checkpoint_of_another_sketch_is_refused_with_every_differing_key() -> None:
    checkpoint = saved_by(module())
    changed = SketchConfig(**(Settings().sketch | {"rows": 3, "allocation": "uniform"}))
    other = module(sketch=changed, patterns=("q_proj",))
    other.configure_model()
    with pytest.raises(UserError) as caught:
        other.on_load_checkpoint(checkpoint)
    message = str(caught.value)
    assert "sketch.rows: 2 in the checkpoint, 3 in this run" in message
    assert "allocation.name: proportional in the checkpoint, uniform in this run" in message
    assert "model.patterns" in message
    assert "bits_per_weight" not in message


def test_run_under_another_sketch_is_refused_before_it_trains(tmp_path: Path) -> None:
    settings = Settings(steps=2)
    tiny_run.run(tmp_path / "run", settings)
    before = (tmp_path / "run" / "record.jsonl").read_text()
    with pytest.raises(UserError, match=r"sketch\.bits_per_weight: 2\.0 in the checkpoint, 1\.5 in this run"):
        tiny_run.run(tmp_path / "run", replace(settings, steps=4, sketch=settings.sketch | {"bits_per_weight": 1.5}))
    assert (tmp_path / "run" / "record.jsonl").read_text() == before


def test_sketch_and_run_differences_come_in_one_message() -> None:
    saved, ours = ({"seed": seed, "optimizer": {"lr": 1e-3}} for seed in (0, 1))
    other = module(sketch=SketchConfig(**(Settings().sketch | {"rows": 3})), config=ours)
    other.configure_model()
    with pytest.raises(UserError, match=r"sketch\.rows: 2 .*; seed: 0 in the checkpoint, 1 in this run\. Restore"):
        other.on_load_checkpoint(saved_by(module(config=saved)))


def test_checkpoint_of_another_program_is_refused() -> None:
    finetuner = module()
    finetuner.configure_model()
    with pytest.raises(UserError, match="not written by usllm-train"):
        finetuner.on_load_checkpoint({"state_dict": {}})


def test_checkpoint_of_a_newer_format_is_refused() -> None:
    checkpoint = saved_by(module())
    checkpoint["usllm"]["format"] = 3
    finetuner = module()
    finetuner.configure_model()
    with pytest.raises(UserError, match="format 3, this version of usllm reads 1 and 2"):
        finetuner.on_load_checkpoint(checkpoint)


def test_checkpoint_that_only_an_earlier_version_continues_is_refused_before_it_trains(tmp_path: Path) -> None:
    tiny_run.run(tmp_path / "run", Settings(steps=2))
    before = (tmp_path / "run" / "record.jsonl").read_text()
    (path,) = (tmp_path / "run" / "checkpoints").iterdir()
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["usllm"]["format"] = 1
    torch.save(checkpoint, path)
    with pytest.raises(UserError, match=r"^the checkpoint has format 1,.* continues it is commit 1462762"):
        tiny_run.run(tmp_path / "run", Settings(steps=4))
    assert (tmp_path / "run" / "record.jsonl").read_text() == before
    trainer, module, data = tiny_run.build(tmp_path / "run", Settings(steps=4))
    trainer.validate(module, datamodule=data, ckpt_path=path, verbose=False)


def test_callbacks_refuse_a_module_of_another_kind() -> None:
    with pytest.raises(TypeError, match="SketchFinetuner, not on a LightningModule"):
        sketch_finetuner(LightningModule())
