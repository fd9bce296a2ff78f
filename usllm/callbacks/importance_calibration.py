"""Measures E[a²] of every sketched layer's input before the first step, and allocates the sketch by it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from rich.progress import Progress
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from usllm.calibration import SecondMoments
from usllm.callbacks.rng_state import preserved_rng
from usllm.errors import UserError
from usllm.models.identity import weights_digest
from usllm.nn import allocate_, sketched_layers
from usllm.ranks import dealt, ranks
from usllm.runs.statistics import arithmetic, kept_tensors, tokens_digest
from usllm.training.module import sketch_finetuner

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def measure_importance(
    model: nn.Module,
    batches: Iterable[Mapping[str, Tensor]],
    sequences: int,
    *,
    device: torch.device | str = "cpu",
    context: AbstractContextManager[Any] | None = None,
    progress: bool = False,
) -> dict[str, Tensor]:
    """Stream calibration batches through ``model`` as it is; E[a²] per input channel of its sketched layers.

    The model is in evaluation mode meanwhile and the random number generators are left as they were found, so that a
    run with calibration draws the same dropout masks as one that was resumed behind it. The ranks of a distributed run
    share the batches out among them and all return the same.

    Args:
        batches: micro batches with ``input_ids`` ``[sequences, context]`` int64.
        sequences: how many sequences ``batches`` holds, for the progress bar.
        device: where the model is.
        context: context of the forward passes, such as autocast.
        progress: show a progress bar.

    Returns:
        ``{layer name: [in] fp32}``.

    Raises:
        UserError: there was no sequence, or a layer's input is not finite.
    """
    layers = sketched_layers(model)
    forward = _smallest_forward(model, layers.values())
    training, seen = model.training, 0
    model.eval()
    try:
        with (
            preserved_rng(),
            torch.no_grad(),
            context or nullcontext(),
            Progress(disable=not progress, transient=True) as bar,
            SecondMoments(layers) as moments,
        ):
            task = bar.add_task("Measuring importance", total=sequences)
            for number, batch, counts in dealt(batches):
                input_ids = batch["input_ids"].to(device)
                moments.counting = counts
                forward(input_ids=input_ids, use_cache=False)
                seen = (number + 1) * len(input_ids)
                bar.update(task, completed=seen)
    finally:
        model.train(training)
    if ranks().world_size > 1:
        moments.sum_over_ranks_(device)
    if not seen:
        raise UserError("calibration: the training split gave no sequence; take a longer text")
    try:
        return moments.mean()
    except ValueError as error:  # a layer saw nothing, or something that is not finite
        raise UserError(f"calibration: {error}") from error


def _smallest_forward(model: nn.Module, layers: Iterable[nn.Module]) -> nn.Module:
    """The part of the model that reaches all ``layers``: without its head, unless the head is one of them.

    The head's logits are the largest tensor of a forward pass and tell nothing about the inputs of the layers below.
    """
    if isinstance(model, FSDPModule):
        return model  # the parts gather their weights when the whole is called
    body = getattr(model, "base_model", model)
    inside = {id(module) for module in body.modules()}
    return body if all(id(layer) in inside for layer in layers) else model


class ImportanceCalibration(Callback):
    """Calibrates once, before the first step of a fresh run, and allocates the sketch.

    Streams ``sequences`` sequences of the training split (``trainer.datamodule.calibration_batches``) through the still
    dense model in the run's precision. Plans and importance are part of the checkpoint, so a resumed run, whose layers
    have plans already, skips it.

    Args:
        sequences: number of calibration sequences, 1 or more.
        reuse: share the measurement with all runs of the same weights, text and arithmetic
            (:mod:`usllm.runs.statistics`); not among the ranks of a distributed run, which measure a part each.

    Attributes:
        moments: E[a²] ``{layer name: [in] fp32}`` of the last measurement; empty where none was needed.
    """

    def __init__(self, sequences: int = 32, reuse: bool = False) -> None:
        if sequences < 1:
            raise UserError(f"callbacks.importance_calibration.sequences={sequences}: must be 1 or more")
        self.sequences = sequences
        self.reuse = reuse
        self.moments: dict[str, Tensor] = {}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure and allocate, unless every layer has a plan.

        Raises:
            UserError: see ``measure_importance``.
        """
        module = sketch_finetuner(pl_module)
        if all(layer.plan is not None for layer in sketched_layers(module.network).values()):
            return
        measure = partial(measure_in_trainer, trainer, pl_module, self.sequences, progress=_shows_progress(trainer))
        if self.reuse and trainer.world_size == 1 and not isinstance(module.network, FSDPModule):
            datamodule: Any = trainer.datamodule  # type: ignore[attr-defined]  # set by Trainer.fit, not declared
            batches = datamodule.calibration_batches(self.sequences)
            autocast = torch.bfloat16 if str(trainer.precision).startswith("bf16") else None
            model = cast("PreTrainedModel", module.network)
            self.moments = kept_importance(model, batches, module.device, autocast, measure)
        else:
            self.moments = measure()
        allocate_(module.network, module.sketch, self.moments)


def kept_importance(
    model: PreTrainedModel,
    batches: Iterable[Mapping[str, Tensor]],
    device: torch.device,
    autocast: torch.dtype | None,
    measure: Callable[[], dict[str, Tensor]],
) -> dict[str, Tensor]:
    """What ``measure`` gives, or gave another run or study of the same weights, text and arithmetic.

    Args:
        model: with its layers swapped, and with the weights that are measured.
        batches: that ``measure`` streams through it.
        device: where the model is, and the result.
        autocast: dtype of the forward passes; ``None``: the weights' own.
    """
    key = {
        "weights": weights_digest(model),
        "layers": sorted(sketched_layers(model)),
        "tokens": tokens_digest(batch["input_ids"] for batch in batches),
        "arithmetic": arithmetic(device, autocast),
    }
    return {name: value.to(device) for name, value in kept_tensors("importance", key, measure).items()}


def measure_in_trainer(
    trainer: Trainer, pl_module: LightningModule, sequences: int, progress: bool = False
) -> dict[str, Tensor]:
    """``measure_importance`` with the trainer's data, device and precision."""
    datamodule: Any = trainer.datamodule  # type: ignore[attr-defined]  # set by Trainer.fit, not declared
    return measure_importance(
        sketch_finetuner(pl_module).network,
        datamodule.calibration_batches(sequences),
        sequences,
        device=pl_module.device,
        context=trainer.precision_plugin.forward_context(),
        progress=progress,
    )


def _shows_progress(trainer: Trainer) -> bool:
    return trainer.is_global_zero and trainer.progress_bar_callback is not None
