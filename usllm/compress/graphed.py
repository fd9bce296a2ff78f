"""Projection on a card as one CUDA graph: that of a layer is forty launches, which take longer than their work."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from usllm.compress.layer import CompressedLinear, Reprojection


class GraphedProjection:
    """The projection of a model's layers, captured once and replayed while all tensors that it reads stay in place.

    What it gives is overwritten by the next replay.

    Args:
        layers: Just projected, so that kernels are compiled and tables are there.

    Attributes:
        captured: Whether there is a graph to replay.
        possible: Whether none has failed to be made.
    """

    def __init__(self, layers: Mapping[str, CompressedLinear]) -> None:
        self.captured, self.possible = False, True
        self._places = [layer.places() for layer in layers.values()]
        self._graph: torch.cuda.CUDAGraph | None = None
        self._found: dict[str, Reprojection] = {}
        self._kept: list[tuple[CompressedLinear, Tensor | None]] = []

    def fits(self, layers: Mapping[str, CompressedLinear]) -> bool:
        """Whether all that the projection reads and writes is where it was."""
        return self.possible and self._places == [layer.places() for layer in layers.values()]

    def capture(self, layers: Mapping[str, CompressedLinear]) -> bool:
        """Record the work without doing it; false, and a warning, where something in it cannot be."""
        before = [(layer, layer.kept_decoded) for layer in layers.values()]
        try:
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
                self._found = {name: layer.reproject() for name, layer in layers.items()}
        except RuntimeError as error:
            self.possible, self._found = False, {}
            for layer, decoded in before:
                layer.kept_decoded = decoded
            reason = str(error).strip().splitlines()[0]
            warnings.warn(
                f"states are projected launch by launch: no CUDA graph could be made ({reason})", stacklevel=2
            )
            return False
        self._kept = [(layer, layer.kept_decoded) for layer in layers.values()]
        self.captured = True
        return True

    def replay(self) -> dict[str, Reprojection]:
        """Project all layers anew; what changed, by layer name."""
        assert self._graph is not None
        self._graph.replay()
        for layer, decoded in self._kept:
            layer.kept_decoded = decoded
        return dict(self._found)


_graphs: WeakKeyDictionary[nn.Module, GraphedProjection] = WeakKeyDictionary()


def reproject_graphed(model: nn.Module, layers: Mapping[str, CompressedLinear]) -> dict[str, Reprojection]:
    """Project layers that are on a card, from the third time on in one graph; what changed, by layer name.

    The first two go launch by launch: kernels are compiled, and what is kept from one to the next gets its place. So do
    those after anything has changed its place, and all of them where no graph can be made, which is said once.

    Args:
        model: Whose layers these are; its graph lives as long as it does.
        layers: Not sharded.
    """
    known = _graphs.get(model)
    if known is not None and known.fits(layers):
        if known.captured or known.capture(layers):
            return known.replay()
        return {name: layer.reproject() for name, layer in layers.items()}
    found = {name: layer.reproject() for name, layer in layers.items()}
    if known is None or known.possible:
        _graphs[model] = GraphedProjection(layers)
    return found


def graph_of(model: nn.Module) -> GraphedProjection | None:
    """What is known of a model's projection as a graph."""
    return _graphs.get(model)
