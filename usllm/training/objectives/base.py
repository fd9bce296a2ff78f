"""What every training objective offers, and the one way in which token losses are computed in bounded memory."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from usllm.data.batches import NO_TARGET

Batch = Mapping[str, Tensor]
"""One micro batch: ``input_ids`` int64 ``[sequences, context]``, packed, so every position is a real token.

``labels`` of the same shape have ``NO_TARGET`` where nothing is learnt; without them all is. ``position_ids`` restart
where a conversation begins that sees nothing of the others in its sequence."""

CHUNK_ELEMENTS = 1 << 23
"""fp32 elements of ``[tokens, vocabulary]`` that one chunk may hold (32 MiB a copy)."""


class Objective(ABC):
    """A scalar to minimise, computed from the model and one micro batch.

    Objectives are plain objects, not modules: what they hold (a teacher) is in no state dict and in no optimizer.
    """

    def attach(self, dense: nn.Module) -> None:  # noqa: B027 - most objectives need no teacher
        """Receive the freshly loaded model while it is still dense, before any layer is swapped."""

    def place(self, device: torch.device, dtype: torch.dtype) -> None:  # noqa: B027
        """Move what the objective holds to ``device`` and to the compute ``dtype`` of the run."""

    def networks(self) -> list[nn.Module]:
        """Networks that the objective holds; where the model is sharded, they are sharded with it."""
        return []

    @abstractmethod
    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss (fp32 scalar with a graph) and its detached parts by name, for the log.

        Sums over what is learnt are divided by the number of all places: a step has more or fewer targets than another,
        and only the whole step knows how many (:class:`usllm.training.step_loss.StepLoss`).
        """


class _ChunkedSum(torch.autograd.Function):
    """``sum_over_chunks`` with the gradient of ``scores`` computed beside the value, so that nothing is recomputed."""

    @staticmethod
    def forward(ctx: Any, function: Callable[..., Tensor], rows: int, scores: Tensor, *others: Tensor) -> Tensor:
        total = scores.new_zeros((), dtype=torch.float32)
        gradient = torch.empty_like(scores)
        for start in range(0, len(scores), rows):
            part = slice(start, start + rows)
            with torch.enable_grad():
                chunk = scores[part].detach().requires_grad_()
                value = function(chunk, *(other[part] for other in others))
            (gradient[part],) = torch.autograd.grad(value, chunk)
            total += value.detach()
        ctx.gradient = gradient
        return total

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        gradient, ctx.gradient = ctx.gradient, None
        if gradient is None:
            raise RuntimeError("the gradient of a chunked loss is handed out once: it is scaled in place")
        return None, None, gradient.mul_(upstream), *[None] * (len(ctx.needs_input_grad) - 3)


def sum_over_chunks(function: Callable[..., Tensor], scores: Tensor, *others: Tensor) -> Tensor:
    """Sum ``function`` (an fp32 scalar per chunk) over chunks of rows; only ``scores`` gets a gradient.

    Besides the gradient, in the dtype of ``scores``, no tensor of the size of ``scores`` is made: fp32 softmaxes exist
    for one chunk at a time.

    Args:
        function: takes a chunk of ``scores`` and the same rows of ``others``.
        scores: ``[rows, vocabulary]``, any floating dtype.
        others: ``[rows, ...]``.
    """
    rows = max(1, CHUNK_ELEMENTS // scores.shape[-1])
    if torch.is_grad_enabled() and scores.requires_grad:
        total: Tensor = _ChunkedSum.apply(function, rows, scores, *others)
        return total
    parts = [function(*chunk) for chunk in zip(*(t.split(rows) for t in (scores, *others)), strict=True)]
    return torch.stack(parts).sum()


def _negative_log_likelihood(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.float(), targets, reduction="sum", ignore_index=NO_TARGET)


def learnt(batch: Batch) -> Tensor:
    """Share of the places behind the first that have a target, fp32 scalar, 1 where nothing is left out."""
    labels = batch.get("labels", batch["input_ids"])
    return (labels[:, 1:] != NO_TARGET).float().mean()


def next_token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of each token given those before it, in nats.

    Args:
        logits: ``[sequences, context, vocabulary]``, any floating dtype; the loss is computed in fp32.
        labels: ``[sequences, context]`` int64. The first token of a sequence is not predicted, and ``NO_TARGET`` is
            not counted in the sum, which is divided by the number of all places behind the first.

    Returns:
        fp32 scalar.
    """
    # The last position predicts nothing; leaving it in, instead of cutting it off, spares a copy of the logits.
    targets = F.pad(labels[:, 1:], (0, 1), value=NO_TARGET)
    total = sum_over_chunks(_negative_log_likelihood, logits.flatten(0, 1), targets.flatten())
    return total / (labels.numel() - len(labels))
