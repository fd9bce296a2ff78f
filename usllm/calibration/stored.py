"""Statistics that are measured once and kept by their content: the weights, the text and the arithmetic."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from usllm.compress import Statistics, compressed_layers
from usllm.data.batches import fingerprinted
from usllm.models.identity import weights_digest
from usllm.system.results import arithmetic, kept_tensors, tokens_digest

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_SEPARATOR = "|"  # in no module's name


def stored_statistics(
    model: PreTrainedModel,
    batches: Iterable[Mapping[str, Tensor]],
    needs: frozenset[str],
    device: torch.device,
    autocast: torch.dtype | None,
    measure: Callable[[], dict[str, Statistics]],
    folder: Path | None = None,
) -> dict[str, Statistics]:
    """What ``measure`` gives, or gave before for the same weights, text and arithmetic.

    Args:
        model: With its layers swapped, and with the weights that are measured.
        batches: That ``measure`` streams through it.
        needs: What is measured.
        device: Where the model is, and the result.
        autocast: Dtype of the forward passes; ``None``: the weights' own.
        measure: Makes them.
        folder: Where they are kept; ``None`` shares them with all runs, in the user's cache.
    """
    key = {
        "weights": weights_digest(model),
        "layers": sorted(compressed_layers(model)),
        "tokens": tokens_digest(fingerprinted(batches)),
        "needs": sorted(needs),
        "arithmetic": arithmetic(device, autocast),
    }
    flat = kept_tensors("statistics", key, lambda: _flat(measure()), folder)
    found: dict[str, dict[str, Tensor]] = {}
    for place, tensor in flat.items():
        name, _, kind = place.partition(_SEPARATOR)
        found.setdefault(name, {})[kind] = tensor.to(device)
    return {name: Statistics(**{"energy": None, **kinds}) for name, kinds in found.items()}


def _flat(statistics: Mapping[str, Statistics]) -> dict[str, Tensor]:
    return {
        f"{name}{_SEPARATOR}{field.name}": value
        for name, of_layer in statistics.items()
        for field in fields(of_layer)
        if (value := getattr(of_layer, field.name)) is not None
    }
