"""E[g²] of each layer's outputs, g the gradient of the model's next-token loss at them, streamed."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from usllm.system.ranks import sum_over_ranks_


class OutputGradients:
    """Accumulate the squared gradients of layers' outputs while a model is run and differentiated in a ``with`` block.

    Set ``counting`` to false for passes that are to leave no trace.

    Args:
        layers: Modules by name; each returns its output [..., out].
    """

    def __init__(self, layers: Mapping[str, nn.Module]) -> None:
        self._layers = dict(layers)
        self.counting = True
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = dict.fromkeys(self._layers, 0)
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> OutputGradients:
        for name, layer in self._layers.items():

            def hook(module: nn.Module, args: Any, output: Tensor, name: str = name) -> None:
                if self.counting and output.requires_grad:
                    output.register_hook(lambda gradient: self._add(name, gradient))

            self._handles.append(layer.register_forward_hook(hook))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _add(self, name: str, gradient: Tensor) -> None:
        rows = gradient.detach().reshape(-1, gradient.shape[-1]).float()
        squares = torch.linalg.vector_norm(rows, dim=0).square_().double()
        self._sums[name] = self._sums[name] + squares if name in self._sums else squares
        self._counts[name] += len(rows)

    def sum_over_ranks_(self, device: torch.device | str) -> None:
        """Add up what all ranks have seen; afterwards each of them holds the same sums, bit for bit."""
        for name, layer in self._layers.items():
            width = int(layer.out_features)  # type: ignore[arg-type]
            own = self._sums.get(name, torch.zeros(width, dtype=torch.float64)).to(device)
            count = torch.tensor([self._counts[name]], dtype=torch.float64, device=device)
            *sums, total = sum_over_ranks_(torch.cat([own, count])).split([width, 1])
            self._sums[name], self._counts[name] = sums[0], int(total)

    def mean(self) -> dict[str, Tensor]:
        """E[g²] by layer, fp32 [out].

        Raises:
            ValueError: If a layer got no gradient, or one that is not finite; names the layer.
        """
        means = {}
        for name, count in self._counts.items():
            if not count:
                raise ValueError(f"{name} got no gradient during calibration: give at least one sequence")
            means[name] = (self._sums[name] / count).float()
            if not bool(torch.isfinite(means[name]).all()):
                raise ValueError(f"the gradient at {name} is not finite during calibration: check the model's weights")
        return means
