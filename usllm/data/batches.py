"""Rows of packed sequences as batches of tensors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from usllm.data.sampler import FILLER

if TYPE_CHECKING:
    from datasets import Dataset

Batch = dict[str, Tensor]
NO_TARGET = -100


class FilledSequences(torch.utils.data.Dataset[Any]):
    """Packed sequences, and one without targets for the filler of :class:`DealtSampler`."""

    def __init__(self, sequences: Dataset) -> None:
        self.sequences = sequences

    def __len__(self) -> int:
        return len(self.sequences)

    def __getitem__(self, position: int) -> dict[str, Any]:
        return {**self.sequences[position], "counts": position != FILLER}


def collate(rows: Sequence[Mapping[str, Any]]) -> Batch:
    """Rows to one batch, int64 ``[rows, context_length]`` each.

    ``labels`` are ``input_ids``, but ``NO_TARGET`` where a row has it, or does not count. Where rows have
    ``position_ids``, those whose are ``None`` count through.

    Args:
        rows: ``input_ids``; of conversations, and of texts mixed with them, also ``labels`` and ``position_ids``, or
            ``None`` for these two. ``counts=False``: a filler.
    """
    input_ids = _tensor([row["input_ids"] for row in rows])
    labels = input_ids
    if any(row.get("labels") is not None for row in rows):
        labels = _tensor([row["input_ids"] if row.get("labels") is None else row["labels"] for row in rows])
    counts = torch.tensor([row.get("counts", True) for row in rows])
    labels = labels if bool(counts.all()) else labels.where(counts[:, None], NO_TARGET)
    batch = {"input_ids": input_ids, "labels": labels}
    if "position_ids" in rows[0]:
        through = range(input_ids.shape[1])
        known = [row.get("position_ids") for row in rows]
        batch["position_ids"] = _tensor([through if positions is None else positions for positions in known])
    return batch


def model_inputs(batch: Mapping[str, Tensor], device: torch.device | None = None) -> Batch:
    """What a causal language model is called with for a batch: ``input_ids``, and ``position_ids`` where it has them.

    Args:
        batch: of :func:`collate`.
        device: where they are to be; ``None``: where they are.
    """
    return {key: batch[key].to(device) for key in ("input_ids", "position_ids") if key in batch}


def in_parts(batch: Batch, size: int) -> list[Batch]:
    """The rows of a batch as batches of ``size`` rows each, the last of which may have fewer."""
    split = {key: value.split(size) for key, value in batch.items()}
    return [dict(zip(split, parts, strict=True)) for parts in zip(*split.values(), strict=True)]


def fingerprinted(batches: Iterable[Mapping[str, Tensor]]) -> Iterator[Tensor]:
    """The tensors of batches that tell one text from another: of plain text token ids alone."""
    for batch in batches:
        yield batch["input_ids"]
        if "position_ids" in batch:
            yield batch["labels"]
            yield batch["position_ids"]


def _tensor(rows: Sequence[Any]) -> Tensor:
    return torch.from_numpy(np.array(rows, dtype=np.int64))
