"""What every training objective offers, and the one way in which token losses are computed in bounded memory."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

Batch = Mapping[str, Tensor]
"""One micro batch; ``input_ids`` is ``[sequences, context]`` int64, packed, so every position is a real token."""

CHUNK_ELEMENTS = 1 << 25
"""fp32 elements of ``[tokens, vocabulary]`` that one chunk may hold (128 MiB a copy)."""


class Objective(ABC):
    """A scalar to minimise, computed from the model and one micro batch.

    Objectives are plain objects, not modules: what they hold (a teacher) is in no state dict and in no optimizer.
    """

    def attach(self, dense: nn.Module) -> None:  # noqa: B027 - most objectives need no teacher
        """Receive the freshly loaded model while it is still dense, before any layer is swapped."""

    def place(self, device: torch.device, dtype: torch.dtype) -> None:  # noqa: B027
        """Move what the objective holds to ``device`` and to the compute ``dtype`` of the run."""

    @abstractmethod
    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss (fp32 scalar with a graph) and its detached parts by name, for the log."""


def sum_over_chunks(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """Sum ``function`` (a scalar per chunk) over chunks of rows of ``tensors``, all ``[rows, ...]``.

    The first tensor is ``[rows, vocabulary]`` and sets the chunk's size. Each chunk is recomputed in the backward
    pass, so that fp32 softmaxes of one chunk, and never of all rows, are alive at a time. ``split`` is what keeps the
    backward linear: it concatenates the chunk gradients once; slices would write a full-size zero tensor per chunk.
    """
    first = tensors[0]
    rows = max(1, CHUNK_ELEMENTS // first.shape[-1])
    if first.shape[0] <= rows:
        return function(*tensors)
    total = first.new_zeros((), dtype=torch.float32)
    for chunk in zip(*(tensor.split(rows) for tensor in tensors), strict=True):
        total = total + checkpoint(function, *chunk, use_reentrant=False)
    return total


def _negative_log_likelihood(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.float(), targets, reduction="sum")


def next_token_loss(logits: Tensor, input_ids: Tensor) -> Tensor:
    """Mean cross-entropy of each token given those before it, in nats.

    Args:
        logits: ``[sequences, context, vocabulary]``, any floating dtype; the loss is computed in fp32.
        input_ids: ``[sequences, context]`` int64. The first token of a sequence is not predicted.

    Returns:
        fp32 scalar.
    """
    targets = input_ids[:, 1:].flatten()
    predictions = logits[:, :-1].flatten(0, 1)
    return sum_over_chunks(_negative_log_likelihood, predictions, targets) / targets.numel()
