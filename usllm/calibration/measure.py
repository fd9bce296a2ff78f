"""The forward passes that measure E[a²] of a model's compressed layers, and the cache of what they gave."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from rich.progress import Progress
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from usllm.calibration.second_moments import SecondMoments
from usllm.compress import compressed_layers
from usllm.models.identity import weights_digest
from usllm.system.errors import UserError
from usllm.system.ranks import dealt, ranks
from usllm.system.results import arithmetic, kept_tensors, tokens_digest
from usllm.system.rng import preserved_rng

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
    layers = compressed_layers(model)
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
        "layers": sorted(compressed_layers(model)),
        "tokens": tokens_digest(batch["input_ids"] for batch in batches),
        "arithmetic": arithmetic(device, autocast),
    }
    return {name: value.to(device) for name, value in kept_tensors("importance", key, measure).items()}
