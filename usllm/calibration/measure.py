"""The passes through a model that measure the statistics of its compressed layers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn import functional

from usllm.calibration.output_gradients import OutputGradients
from usllm.calibration.second_moments import SecondMoments
from usllm.compress import Statistics, compressed_layers
from usllm.data.batches import model_inputs
from usllm.system.announce import announce
from usllm.system.errors import UserError
from usllm.system.modes import evaluating
from usllm.system.ranks import dealt, ranks
from usllm.system.rng import preserved_rng

ENERGY, COVARIANCE, GRADIENT = "energy", "covariance", "gradient"


def measure_statistics(
    model: nn.Module,
    batches: Iterable[Mapping[str, Tensor]],
    sequences: int,
    needs: frozenset[str],
    *,
    device: torch.device | str = "cpu",
    context: Callable[[], AbstractContextManager[Any]] = nullcontext,
    progress: bool = False,
) -> dict[str, Statistics]:
    """Stream calibration batches through ``model`` as it is; what ``needs`` names, of its compressed layers.

    The model is in evaluation mode meanwhile and the random number generators are left as they were found, so that a
    run with calibration draws the same dropout masks as one that was resumed after it. The ranks of a distributed run
    share the batches out among them and all return the same.

    Args:
        batches: Micro batches with ``input_ids`` [sequences, context] int64; ``position_ids`` where conversations lie
            side by side. Where there are ``labels``, gradients are those of what they have in view.
        sequences: How many sequences ``batches`` holds, for the progress bar.
        needs: ``energy``, ``covariance``, ``gradient``; the last one takes a backward pass for each batch.
        device: Where the model is.
        context: Makes the context of the forward passes, such as autocast.
        progress: Show a progress bar.

    Returns:
        Statistics by layer name.

    Raises:
        UserError: There was no sequence, or a layer's input or gradient is not finite.
    """
    layers = compressed_layers(model)
    differentiated = GRADIENT in needs
    forward = model if differentiated else _smallest_forward(model, layers.values())
    moments = SecondMoments(layers, full=COVARIANCE in needs)
    gradients = OutputGradients(layers)
    seen = 0
    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        stack.enter_context(preserved_rng())
        stack.enter_context(torch.set_grad_enabled(differentiated))
        bar = stack.enter_context(Progress(disable=not progress, transient=True))
        stack.enter_context(moments)
        if differentiated:
            stack.enter_context(gradients)
            stack.enter_context(_differentiable_from_embeddings(model))
        task = bar.add_task("Measuring importance", total=sequences)
        announce(bar, "Measuring importance")
        for number, batch, counts in dealt(batches):
            inputs = model_inputs(batch, torch.device(device))
            moments.counting = gradients.counting = counts
            with context():
                output = forward(**inputs, use_cache=False)
            if differentiated:
                _next_token_loss(output.logits, batch.get("labels", batch["input_ids"]).to(device)).backward()
            seen = (number + 1) * len(inputs["input_ids"])
            bar.update(task, completed=seen)
    if ranks().world_size > 1:
        moments.sum_over_ranks_(device)
        if differentiated:
            gradients.sum_over_ranks_(device)
    if not seen:
        raise UserError("calibration: the training split gave no sequence; take a longer text")
    try:
        energy = moments.mean()
        covariance = moments.full_mean() if COVARIANCE in needs else {}
        gradient = gradients.mean() if differentiated else {}
    except ValueError as error:  # a layer saw nothing, or something that is not finite
        raise UserError(f"calibration: {error}") from error
    return {
        name: Statistics(energy=energy[name], covariance=covariance.get(name), gradient=gradient.get(name))
        for name in layers
    }


def measure_importance(
    model: nn.Module,
    batches: Iterable[Mapping[str, Tensor]],
    sequences: int,
    *,
    device: torch.device | str = "cpu",
    context: AbstractContextManager[Any] | None = None,
    progress: bool = False,
) -> dict[str, Tensor]:
    """E[a²] per input channel alone, fp32 [in] by layer name; arguments as for :func:`measure_statistics`."""
    with context or nullcontext():
        found = measure_statistics(model, batches, sequences, frozenset({ENERGY}), device=device, progress=progress)
    return {name: statistics.energy for name, statistics in found.items() if statistics.energy is not None}


def _next_token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum of the cross-entropies of each token given those before it, so that gradients of a token are its own."""
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), reduction="sum")


def _differentiable_from_embeddings(model: nn.Module) -> ExitStack:
    """Let activations carry gradients and parameters none: what is wanted are gradients at outputs."""
    stack = ExitStack()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
        stack.callback(parameter.requires_grad_, True)
    embeddings: nn.Module = model.get_input_embeddings()  # type: ignore[operator]
    handle = embeddings.register_forward_hook(lambda module, args, output: output.requires_grad_())
    stack.callback(handle.remove)
    return stack


def _smallest_forward(model: nn.Module, layers: Iterable[nn.Module]) -> nn.Module:
    """The part of the model that reaches all ``layers``: without its head, unless the head is one of them.

    The head's logits are the largest tensor of a forward pass and tell nothing about the inputs of the layers below.
    """
    if isinstance(model, FSDPModule):
        return model  # the parts gather their weights when the whole is called
    body = getattr(model, "base_model", model)
    inside = {id(module) for module in body.modules()}
    return body if all(id(layer) in inside for layer in layers) else model
