"""Projection on a card as one CUDA graph: that of a layer is forty launches, which take longer than their work."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from usllm.compress.layer import CompressedLinear, Reprojection

_LAUNCHED_BEFORE = 2  # projections that found all in place: kernels are compiled and loaded, what is kept has its place


class GraphedProjection:
    """The projection of a model's layers, captured once and replayed while all tensors that it reads stay in place.

    What it gives, decoded weights too, is overwritten by the next replay. It holds the layers' plans, whose tables the
    kernels read, and no layer.

    Args:
        layers: On one card, just projected.

    Attributes:
        captured: Whether there is a graph to replay.
        possible: Whether none has failed to be made.
    """

    def __init__(self, layers: Mapping[str, CompressedLinear]) -> None:
        self.captured, self.possible = False, True
        self._places = [layer.places() for layer in layers.values()]
        self._launched = 1
        self._device = next(iter(layers.values())).importance.device
        self._graph: torch.cuda.CUDAGraph | None = None
        self._found: dict[str, Reprojection] = {}
        self._kept: dict[str, Tensor | None] = {}

    def fits(self, layers: Mapping[str, CompressedLinear]) -> bool:
        """Whether all that the projection reads and writes is where it was."""
        return self.possible and self._places == [layer.places() for layer in layers.values()]

    def project(self, layers: Mapping[str, CompressedLinear]) -> dict[str, Reprojection]:
        """Project layers that fit, in whatever way is possible by now; what changed, by layer name."""
        if not self.captured and self._launched >= _LAUNCHED_BEFORE:
            self._capture(layers)
        if self.captured:
            return self._replay(layers)
        self._launched += 1
        return launched(layers)

    def _capture(self, layers: Mapping[str, CompressedLinear]) -> None:
        """Record the work without doing it; a warning where something in it cannot be."""
        for layer in layers.values():  # makes room; where this fails, launches or forward passes decode anew
            layer.kept_decoded = None
        with torch.cuda.device(self._device):
            stream = torch.cuda.current_stream()
            try:
                self._graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
                    self._found = launched(layers)
                self._kept = {name: layer.kept_decoded for name, layer in layers.items()}
                self.captured = True
            except Exception as error:
                cause = error.__context__ or error  # ending a capture that has failed says only that it has
                reason = (str(cause).strip() or type(cause).__name__).splitlines()[0]
                self.possible, self._graph, self._found = False, None, {}
                for layer in layers.values():  # what was being captured was never computed
                    layer.kept_decoded = None
                words = f"states are projected launch by launch: no CUDA graph could be made ({reason})"
                warnings.warn(words, stacklevel=4)
            finally:  # an end that fails leaves the stream of the capture behind
                torch.cuda.set_stream(stream)

    def _replay(self, layers: Mapping[str, CompressedLinear]) -> dict[str, Reprojection]:
        assert self._graph is not None
        with torch.cuda.device(self._device):
            self._graph.replay()
        for name, layer in layers.items():
            layer.kept_decoded = decoded = self._kept[name]
            if decoded is not None:  # a backward pass of before must not take it for what it saved
                torch.autograd.graph.increment_version(decoded)
        return dict(self._found)


_graphs: WeakKeyDictionary[nn.Module, GraphedProjection] = WeakKeyDictionary()


def reproject_graphed(model: nn.Module, layers: Mapping[str, CompressedLinear]) -> dict[str, Reprojection]:
    """Project layers that are on one card, sooner or later in one graph; what changed, by layer name.

    That is once two projections in a row, launch by launch, have found everything where it was. After anything has
    changed its place it begins anew; where no graph can be made it is said once, and all go launch by launch.

    Args:
        model: Whose layers these are; its graph lives as long as it does.
        layers: Not sharded.
    """
    known = _graphs.get(model)
    if known is not None and known.fits(layers):
        return known.project(layers)
    possible = known is None or known.possible
    if possible:
        _graphs.pop(model, None)  # with all that it keeps
        known = None
    found = launched(layers)
    if possible:
        _graphs[model] = GraphedProjection(layers)
    return found


def launched(layers: Mapping[str, CompressedLinear]) -> dict[str, Reprojection]:
    """Project layer after layer; what changed, by layer name."""
    return {name: layer.reproject() for name, layer in layers.items()}


def graph_of(model: nn.Module) -> GraphedProjection | None:
    """What is known of a model's projection as a graph."""
    return _graphs.get(model)
