"""Rows of packed sequences as batches of tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
        return {"input_ids": self.sequences[position]["input_ids"], "counts": position != FILLER}


def collate(rows: Sequence[Mapping[str, Any]]) -> Batch:
    """Rows of ``input_ids`` to one batch, int64 ``[rows, context_length]``."""
    input_ids = torch.from_numpy(np.array([row["input_ids"] for row in rows], dtype=np.int64))
    counts = torch.tensor([row.get("counts", True) for row in rows])
    labels = input_ids if bool(counts.all()) else input_ids.where(counts[:, None], NO_TARGET)
    return {"input_ids": input_ids, "labels": labels}
