"""What a stage keeps, so that a killed run continues to the same bits and a run of another configuration starts anew.

Files lie in ``<run>/stages/<name of the stage>/<digest>/``. The digest is of all that a stage can read: its options,
the method's, the model, statistics, plans, the text, the seed and the precision.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from usllm.compress import Compressor, compressed_layers, save_plans, to_section
from usllm.compress.sharded import is_sharded
from usllm.data.batches import fingerprinted
from usllm.models.identity import weights_digest
from usllm.system.files import write_torch
from usllm.system.results import tokens_digest

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from usllm.stages.base import Stage, Work

_SEQUENCES = 64
"""Of the text, read for their length and order; what the text is by content is known besides."""


class Store:
    """Files of one stage under one key, written whole or not at all.

    Args:
        folder: Of the stage; ``None`` keeps nothing.
        key: Plain Python and tensors: all that decides the content; files under another key are not seen.
        writes: Whether this process writes.
    """

    def __init__(self, folder: Path | None, key: Mapping[str, Any], writes: bool = True) -> None:
        content = json.dumps(key, sort_keys=True, default=_in_words)
        self.folder = None if folder is None else folder / hashlib.sha256(content.encode()).hexdigest()[:16]
        self.writes = writes

    def kept(self, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What ``make`` gives, or gave before a kill.

        Args:
            name: Of the file, without an ending.
            make: Makes tensors and plain Python; called where there is no such file.
        """
        found = self.load(name)
        if found is None:
            found = make()
            self.save(name, found)
        return found

    def load(self, name: str) -> dict[str, Any] | None:
        """The content of a file, tensors on the CPU; ``None`` where there is none."""
        path = self._path(name)
        if path is None or not path.is_file():
            return None
        found: dict[str, Any] = torch.load(path, weights_only=True, map_location="cpu")
        return found

    def save(self, name: str, content: dict[str, Any]) -> None:
        """Keep tensors and plain Python under a name, in place of what was kept there."""
        path = self._path(name)
        if path is not None and self.writes:
            write_torch(path, content)

    def drop(self, name: str) -> None:
        """Delete a file, if it is there."""
        path = self._path(name)
        if path is not None and self.writes:
            path.unlink(missing_ok=True)

    def _path(self, name: str) -> Path | None:
        return None if self.folder is None else self.folder / f"{name}.pt"


def store_of(work: Work, stage: Stage, more: Mapping[str, Any]) -> Store:
    """The store of a stage for the work as it is now; where the model is in shards, one that keeps nothing."""
    layers = compressed_layers(work.model)
    if work.folder is None or is_sharded(layers):
        return Store(None, {})
    with work.context():
        kind = work.device.type
        autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    key = {
        "stage": f"{type(stage).__module__}.{type(stage).__qualname__}",
        "options": {key: value for key, value in vars(stage).items() if stage.later_options.get(key, ...) != value},
        "compressor": _of_compressor(work.compressor),
        "model": work.weights or weights_digest(cast("PreTrainedModel", work.model)),
        "buffers": {} if work.weights else dict(work.model.named_buffers()),  # states among them
        "statistics": {name: vars(found) for name, found in work.statistics.items()},
        "plans": {name: plan.to_tensors() for name, plan in work.plans.items()},
        "plans_of_layers": save_plans(work.model),
        "bits": work.bits,
        "text": work.text,
        "tokens": tokens_digest(fingerprinted(work.batches(_SEQUENCES))),
        "seed": work.seed,
        "autocast": str(autocast),
        "more": more,
    }
    return Store(work.folder / stage.name, key, work.writes)


def _of_compressor(compressor: Compressor) -> dict[str, Any]:
    section = to_section(compressor)
    later = compressor.later_options
    kept = {key: value for key, value in section["options"].items() if later.get(key, ...) != value}
    return {**section, "options": kept}


def _in_words(value: object) -> str:
    """What JSON does not know; a tensor by its type, shape and bits."""
    if not isinstance(value, Tensor):
        return str(value)
    plain = value.detach().cpu().contiguous()
    digest = hashlib.sha256(f"{plain.dtype} {list(plain.shape)}".encode())
    digest.update(plain.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
