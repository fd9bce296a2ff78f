"""Where streams of hidden states live that are too large for memory: in files that are mapped, and gone with them."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from usllm.system.files import naming


class StreamFiles:
    """Makes tensors whose memory is a file: the system writes it out when it needs the memory for something else.

    A file has no name any more once it is mapped, so that it takes no space when its tensor is given back or the
    process has ended, however that came about.

    Args:
        folder: On a disk with room for three streams.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A tensor on the CPU, filled with zeros.

        Args:
            shape: Of the tensor.
            dtype: Of its elements.

        Raises:
            OSError: The disk has no room for it; the error names the file.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        size = math.prod(shape)
        file, name = tempfile.mkstemp(prefix="stream.", dir=self.folder)
        try:
            with naming(Path(name)):  # now: a page that finds no room later ends the process
                _reserve(file, size * dtype.itemsize)
            return torch.from_file(name, shared=True, size=size, dtype=dtype).view(tuple(shape))
        finally:
            os.close(file)
            os.unlink(name)


def _reserve(file: int, size: int) -> None:
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file, 0, size)
    else:
        os.ftruncate(file, size)
