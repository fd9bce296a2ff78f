"""E[a²] of each layer's input channels (and the full E[a aᵀ] where asked for), streamed.

The squares of one input are summed in fp32, such sums in fp64, where adding up fp32 numbers is as good as exact: E[a²]
does not depend on the order of the inputs, nor on how many ranks of a distributed run share them. E[a aᵀ] stays in
fp32.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType

import torch
from torch import Tensor, nn

from usllm.system.ranks import sum_over_ranks_


class SecondMoments:
    """Accumulate the second moments of layers' inputs while the model runs inside a ``with`` block.

    Layers that read the same tensor (q, k and v; gate and up) share one computation. Set ``counting`` to false for
    forward passes that are to leave no trace.

    Args:
        layers: Modules by name; each is called with its input [..., in] first.
        full: Also keep E[a aᵀ], fp32 [in, in] a layer.
    """

    def __init__(self, layers: Mapping[str, nn.Module], full: bool = False) -> None:
        self._layers = dict(layers)
        self._full = full
        self.counting = True
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = dict.fromkeys(self._layers, 0)
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._last: tuple[Tensor, int | None, Tensor] | None = None

    def __enter__(self) -> SecondMoments:
        for name, layer in self._layers.items():

            def hook(module: nn.Module, args: tuple[Tensor, ...], name: str = name) -> None:
                if self.counting:
                    self._add(name, args[0].detach())

            self._handles.append(layer.register_forward_pre_hook(hook))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._last = None

    @torch.inference_mode(False)  # sums of inference mode could not be added to outside of it
    @torch.no_grad()
    def _add(self, name: str, value: Tensor) -> None:
        # The tensor is held, not only its id: a freed one's memory could come back as another input.
        if self._last is None or not _same(self._last[0], value, self._last[1]):
            self._last = (value, _version(value), self._moment(value))
        moment = self._last[2]
        self._counts[name] += value.numel() // value.shape[-1]
        if name in self._sums:
            self._sums[name] += moment
        else:
            self._sums[name] = moment.clone() if self._full else moment.double()

    def _moment(self, value: Tensor) -> Tensor:
        with torch.autocast(value.device.type, enabled=False):
            rows = value.reshape(-1, value.shape[-1]).float()
            return rows.T @ rows if self._full else torch.linalg.vector_norm(rows, dim=0).square_()

    def sum_over_ranks_(self, device: torch.device | str) -> None:
        """Add up what all ranks have seen; afterwards each of them holds the same sums, bit for bit.

        Args:
            device: that the ranks communicate with.

        Raises:
            ValueError: With ``full=True``, whose sums are too large to be sent about.
        """
        if self._full:
            raise ValueError("SecondMoments with full=True cannot be summed over ranks")
        widths = {name: int(layer.in_features) for name, layer in self._layers.items()}  # type: ignore[arg-type]
        none = torch.zeros(0, dtype=torch.float64, device=device)
        own = [self._sums.get(name, none.new_zeros(width)).to(device) for name, width in widths.items()]
        counts = torch.tensor(list(self._counts.values()), dtype=torch.float64, device=device)
        flat = sum_over_ranks_(torch.cat([*own, counts]))
        *sums, counts = flat.split([*widths.values(), len(widths)])
        self._sums = dict(zip(widths, sums, strict=True))
        self._counts = {name: int(count) for name, count in zip(widths, counts.tolist(), strict=True)}

    def mean(self) -> dict[str, Tensor]:
        """E[a²] by layer, fp32 [in].

        Raises:
            ValueError: If a layer saw no input, or its input was not finite; names the layer.
        """
        return {name: moment.diagonal().clone() if self._full else moment for name, moment in self._means().items()}

    def full_mean(self) -> dict[str, Tensor]:
        """E[a aᵀ] by layer, fp32 [in, in]; only with ``full=True``."""
        if not self._full:
            raise ValueError("SecondMoments was made without full=True: only mean() is known")
        return self._means()

    def _means(self) -> dict[str, Tensor]:
        means = {}
        for name, count in self._counts.items():
            if not count:
                raise ValueError(f"{name} saw no input during calibration: give at least one sequence")
            means[name] = (self._sums[name] / count).float()
            if not bool(torch.isfinite(means[name]).all()):
                raise ValueError(f"the input of {name} is not finite during calibration: check the model's weights")
        return means


def _version(value: Tensor) -> int | None:
    """Count of in-place changes; tensors of inference mode have none."""
    return None if value.is_inference() else value._version


def _same(kept: Tensor, value: Tensor, version: int | None) -> bool:
    """Whether a tensor is the same memory, known to be unchanged (``detach`` makes a new object over it)."""
    return (
        version is not None
        and kept.data_ptr() == value.data_ptr()
        and kept.shape == value.shape
        and kept.stride() == value.stride()
        and _version(value) == version
    )
