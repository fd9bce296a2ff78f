"""What a GGUF file says, read with the ``gguf`` package: transformers skips what it does not know."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from usllm.system.errors import UserError, first_line


@dataclass(frozen=True)
class GgufContents:
    """The metadata and the tensors of one GGUF file; the tensors stay on disk until they are asked for.

    Attributes:
        path: the file.
        architecture: ``general.architecture``, for example ``llama``.
        metadata: every key and its value: Python scalars, strings and lists.
        shapes: tensor name to its shape as a torch module stores it, ``(out, in)``.
    """

    path: Path
    architecture: str
    metadata: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]
    _stored: Mapping[str, Any]

    def tensor(self, name: str) -> Tensor:
        """Values of one tensor, fp32, in its :attr:`shapes`.

        Raises:
            UserError: its quantisation type is unknown to the ``gguf`` package.
        """
        from gguf.quants import dequantize

        stored = self._stored[name]
        try:
            values = dequantize(stored.data, stored.tensor_type)
        except (NotImplementedError, ValueError) as error:
            raise UserError(
                f"model.file={self.path}: the tensor {name} is stored as {stored.tensor_type.name}, which the gguf "
                f"package does not read ({first_line(error)}); use a file of another quantisation"
            ) from error
        return torch.from_numpy(np.array(values, dtype=np.float32)).reshape(self.shapes[name])

    def of_model(self, key: str, default: Any = None) -> Any:
        """Value of ``<architecture>.<key>``, or ``default`` where the file does not state it."""
        return self.metadata.get(f"{self.architecture}.{key}", default)

    def refusal(self, what: str) -> UserError:
        """The error that this file cannot be used, and why."""
        return UserError(
            f"model.file={self.path}: {what}. Take another GGUF file of this model, or the original with "
            "model=folder or model=hub"
        )


def read_contents(path: Path) -> GgufContents:
    """Read the header of a GGUF file.

    Raises:
        UserError: the file is missing, is no GGUF file, is damaged, or is one of several parts.
    """
    if not path.is_file():
        raise UserError(f"model.file={path}: there is no such file")
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise UserError(f"model.file={path} is not a GGUF file (it does not begin with the letters GGUF)")
    from gguf import GGUFReader

    try:
        reader = GGUFReader(path)
        metadata = {key: field.contents() for key, field in reader.fields.items()}
        stored = {tensor.name: tensor for tensor in reader.tensors}
        shapes = {name: tuple(int(size) for size in reversed(tensor.shape)) for name, tensor in stored.items()}
    except Exception as error:  # the reader fails in many ways on a file cut short: numpy, struct, Unicode, keys
        raise UserError(
            f"model.file={path} is damaged or cut short; download it again ({first_line(error)})"
        ) from error
    if (parts := metadata.get("split.count", 1)) not in (0, 1):
        raise UserError(
            f"model.file={path} is one of {parts} parts of a model; join them with llama.cpp's `gguf-split --merge`"
        )
    architecture = metadata.get("general.architecture")
    if not isinstance(architecture, str):
        raise UserError(f"model.file={path} does not say its general.architecture; download it again")
    return GgufContents(path, architecture, metadata, shapes, stored)
