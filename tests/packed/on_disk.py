"""Models whose tensors lie on a disk, as it were, so that what a writer of folders holds at once can be counted."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
import torch
from tiny_packed import SKETCH, random_config
from transformers import AutoModelForCausalLM, PretrainedConfig

from usllm.compress import compress_
from usllm.packed import sharded_files
from usllm.packed.source import PackingSource, from_model
from usllm.sketch import SketchConfig
from usllm.system.files import write_tensors


class OnDisk(Mapping[str, torch.Tensor]):
    """Tensors that exist from when they are asked for until nobody holds them; counts the bytes held."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self.tensors = tensors
        self.held = self.most_held = 0

    def __getitem__(self, name: str) -> torch.Tensor:
        tensor = self.tensors[name].clone()
        self.held += tensor.nbytes
        self.most_held = max(self.most_held, self.held)
        weakref.finalize(tensor, self._released, tensor.nbytes)
        return tensor

    def _released(self, size: int) -> None:
        self.held -= size

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


def most_held(
    layers: int, write: Callable[[PackingSource, PretrainedConfig], None], monkeypatch: pytest.MonkeyPatch
) -> tuple[int, int]:
    """Most bytes of source tensors, and of tensors to write, that were held at once while a model was written.

    Args:
        layers: of the model, which is a small Llama.
        write: writes it.
        monkeypatch: watches the files.
    """
    config = random_config()
    config.num_hidden_layers = layers
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    compress_(model, SketchConfig(**SKETCH))
    inner = from_model(model)
    tensors = OnDisk(dict(inner.tensors))
    written: list[int] = []

    def recorded(path: Path, content: dict[str, torch.Tensor], *args: object) -> None:
        written.append(sum(tensor.nbytes for tensor in content.values()))
        write_tensors(path, content, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(sharded_files, "write_tensors", recorded)
    write(PackingSource(tensors, inner.plans, inner.compressor), config)
    return tensors.most_held, max(written)
