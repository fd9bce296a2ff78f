"""How the codes of the states and the importance of the channels are distributed."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from lightning.pytorch import Trainer

from usllm.callbacks.inspection import Inspection
from usllm.compress import CompressedLinear, compressed_layers
from usllm.loggers import log_histogram
from usllm.training.module import SketchFinetuner

STATE_BINS = 65
IMPORTANCE_EDGES = np.linspace(-6.0, 4.0, 81)
"""log10 of a channel's E[a²] over the mean of its layer."""


class SketchHistograms(Inspection):
    """Logs ``histograms/states`` and ``histograms/importance`` over all layers, and per layer where asked for.

    Args:
        every_n_validations: as for :class:`Inspection`.
        per_layer: also one pair of histograms for each layer.
    """

    def __init__(self, every_n_validations: int = 1, per_layer: bool = False) -> None:
        super().__init__(every_n_validations)
        self.per_layer = per_layer

    def show(self, trainer: Trainer, module: SketchFinetuner, step: int) -> None:
        """Log the histograms."""
        layers = {name: layer for name, layer in compressed_layers(module.network).items() if layer.plan is not None}
        groups = {"": list(layers.values())}
        if self.per_layer:
            groups |= {f"/{name}": [layer] for name, layer in layers.items()}
        for suffix, members in groups.items():
            counts, edges = state_histogram(members)
            if counts.any():  # not every method has codes
                log_histogram(trainer.loggers, f"histograms/states{suffix}", counts, edges, step)
            counts, edges = importance_histogram(members)
            log_histogram(trainer.loggers, f"histograms/importance{suffix}", counts, edges, step)


def state_histogram(layers: Iterable[CompressedLinear]) -> tuple[np.ndarray, np.ndarray]:
    """Counts of the state codes over the largest code of their width: -1 and 1 are states that sit at the clip.

    Returns:
        Counts int64 [bins] and edges [bins + 1], from just below -1 to just above 1.
    """
    half = 1 + 1 / (STATE_BINS - 1)  # the middle of the outer bins is -1 and 1, that of the middle one 0
    counts = np.zeros(STATE_BINS, dtype=np.int64)
    for layer in layers:
        assert layer.plan is not None
        codes = layer.plan.normalised_codes(layer.current_states())
        if codes is not None:
            counts += torch.histc(codes, STATE_BINS, -half, half).cpu().numpy().astype(np.int64)
    return counts, np.linspace(-half, half, STATE_BINS + 1)


def importance_histogram(layers: Iterable[CompressedLinear]) -> tuple[np.ndarray, np.ndarray]:
    """Counts of channels by log10 of their E[a²] over the mean of their layer; what lies outside is in the outer bins.

    Returns:
        Counts int64 [bins] and edges [bins + 1].
    """
    counts = np.zeros(len(IMPORTANCE_EDGES) - 1, dtype=np.int64)
    for layer in layers:
        moments = layer.importance.double().cpu().numpy()
        ratio = np.log10(np.maximum(moments / max(moments.mean(), 1e-300), 1e-300))
        inside = np.clip(ratio, IMPORTANCE_EDGES[0], IMPORTANCE_EDGES[-1])
        counts += np.histogram(inside, IMPORTANCE_EDGES)[0]
    return counts, IMPORTANCE_EDGES
