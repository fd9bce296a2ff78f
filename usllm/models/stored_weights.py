"""The weights of a dense model on disk, read tensor by tensor: nothing is held but what is asked for.

Files are mapped, so that what was read is the system's to give back, and a few rows of an embedding cost a few rows.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel

from usllm.models.completeness import incompleteness, refuse_second_head
from usllm.models.identity import configuration_words
from usllm.models.loading import place_of, refuse_quantised, stored_files
from usllm.models.skeleton import skeleton
from usllm.models.spec import ModelSpec
from usllm.system.errors import RunError, UserError

_CHUNK_BYTES = 1 << 26
"""Of a tensor that is checked: what a check makes of it is no larger."""


class StoredWeights:
    """Tensors of a dense model by name, in the type that they are stored in, on the CPU.

    Args:
        files: Its safetensors files.
        model: What its configuration describes, on the meta device.
        place: What to call the model in messages.

    Raises:
        UserError: Tensors are missing, left over or of another shape than the model's, or a head that the
            configuration ties is another one than the embedding.
    """

    def __init__(self, files: Sequence[Path], model: PreTrainedModel, place: str) -> None:
        self.place = place
        self._model = model
        self._files: dict[str, Any] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        for path in files:
            try:
                file: Any = safe_open(path, framework="pt").__enter__()
                for name in file.keys():  # noqa: SIM118 (not a mapping)
                    self._files[name], shapes[name] = file, tuple(file.get_slice(name).get_shape())
            except (OSError, SafetensorError) as error:
                raise UserError(
                    f"The model at {place} cannot be loaded: {path.name} cannot be read ({error})"
                ) from error
        self._aliases = _aliases(model)
        self._refuse_incomplete(shapes)
        refuse_second_head(model, files[0].parent, place)

    def __getitem__(self, name: str) -> Tensor:
        """A tensor, mapped from its file; one that is tied to another is that one."""
        name = name if name in self._files else self._aliases.get(name, name)
        tensor: Tensor = self._files[name].get_tensor(name)
        return tensor

    def __contains__(self, name: str) -> bool:
        return name in self._files or self._aliases.get(name) in self._files

    def checked_digest(self) -> str:
        """Fingerprint (32 hex digits) of the configuration and all tensors; reads each of them once.

        Raises:
            RunError: A weight is not finite.
        """
        import xxhash  # a dependency of datasets

        digest = xxhash.xxh3_128(json.dumps(configuration_words(self._model), sort_keys=True, default=str).encode())
        for name in sorted(self._files):
            tensor = self[name]
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
            for part in _parts(tensor):
                if part.is_floating_point() and not bool(torch.isfinite(part).all()):
                    raise RunError(
                        f"The model at {self.place} has values that are not finite (NaN or infinite), first in the "
                        f"weight {name}; take an earlier one"
                    )
                digest.update(part.view(torch.uint8).numpy().data)
        return str(digest.hexdigest())

    def _refuse_incomplete(self, shapes: dict[str, tuple[int, ...]]) -> None:
        expected = {name: tuple(tensor.shape) for name, tensor in self._model.state_dict(keep_vars=True).items()}
        ignored = getattr(self._model, "_keys_to_ignore_on_load_unexpected", None) or ()
        problem = incompleteness(
            missing=[name for name in expected if name not in self],
            unexpected=[
                name for name in shapes if name not in expected and not any(re.search(each, name) for each in ignored)
            ],
            misshaped=[
                f"{name} ({list(shapes[name])} for {list(shape)})"
                for name, shape in expected.items()
                if name in shapes and shapes[name] != shape
            ],
        )
        if problem is not None:
            raise UserError(
                f"The model at {self.place} is not the one that its config.json describes, or stores its tensors under "
                f"other names than it: {problem}. Restore the weight files, or leave block_by_block=true out"
            )


def open_weights(spec: ModelSpec) -> StoredWeights:
    """The weights of the model that ``spec`` names; hub models are downloaded first, GGUF files decoded.

    Raises:
        UserError: There are no safetensors files, they are those of a quantised model, or not those that the
            configuration describes.
    """
    config = refuse_quantised(spec)
    return StoredWeights(stored_files(spec), skeleton(config), place_of(spec))


def _aliases(model: PreTrainedModel) -> dict[str, str]:
    """Name of a tied tensor -> the name of it that comes first."""
    first: dict[int, str] = {}
    return {
        name: first.setdefault(id(tensor), name)
        for name, tensor in model.state_dict(keep_vars=True).items()
        if first.setdefault(id(tensor), name) != name
    }


def _parts(tensor: Tensor) -> Iterator[Tensor]:
    """A tensor in flat pieces."""
    flat = tensor.flatten()
    return iter(flat.split(max(1, _CHUNK_BYTES // tensor.element_size())))
