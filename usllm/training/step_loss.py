"""The loss of an optimizer step, whose micro batches and ranks may have unequal shares of its targets."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.optim import Optimizer

from usllm.training.objectives import Batch, learnt


class StepLoss:
    """Losses of the micro batches that make up an optimizer step.

    Attributes:
        last: The loss of the step before, this rank's share of the mean over its targets; NaN where there was none.
    """

    def __init__(self) -> None:
        self.last = torch.tensor(torch.nan)
        self._window: list[Tensor] = []
        self._names: tuple[str, ...] = ()

    def clear(self) -> None:
        """Begin with the first micro batch of a step."""
        self._window.clear()

    def add(self, batch: Batch, loss: Tensor, parts: Mapping[str, Tensor]) -> None:
        """Keep what an objective gave for a micro batch: sums over targets, divided by the number of places."""
        self._window.append(torch.stack([learnt(batch), loss.detach(), *parts.values()]))
        self._names = tuple(parts)

    def finish_(self, optimizer: Optimizer, mean_over_ranks: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        """Losses of the step as means over its targets; gradients become those of these means.

        Losses were divided by the number of places because only now it is known how many targets there are in all micro
        batches of all ranks. So it does not matter how they share the sequences of the step.

        Args:
            optimizer: whose gradients are multiplied in place; of a step without masked places they are left alone.
            mean_over_ranks: of a scalar.

        Returns:
            ``loss`` and its parts by name, this rank's share of the means.
        """
        means = torch.stack(self._window).mean(0)
        self.clear()
        share = float(mean_over_ranks(means[0].clone()))
        parts = means[1:]
        if 0 < share < 1:
            trained = [weight for group in optimizer.param_groups for weight in group["params"]]
            if gradients := [weight.grad for weight in trained if weight.grad is not None]:
                torch._foreach_mul_(gradients, 1 / share)
            parts = parts / share
        self.last = parts[0]
        return dict(zip(("loss", *self._names), parts, strict=True))
