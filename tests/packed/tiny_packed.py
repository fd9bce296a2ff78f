"""A tiny sketched model, and folders packed from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from folder_files import Files
from mutations import forged
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from usllm.compress import compress_
from usllm.models import ModelSpec
from usllm.models.loading import load_config, load_dense, load_tokenizer
from usllm.packed.export import ModelFiles, RestStorage, export
from usllm.packed.source import from_model
from usllm.sketch import SketchConfig

SKETCH: dict[str, Any] = {"bits_per_weight": 2.0, "rows": 2, "group_size": 64}
IDS = torch.arange(40).view(2, 20)


def sketched_model(architecture: str = "llama", tied: bool = True, **sketch: Any) -> PreTrainedModel:
    """The random model, sketched; with ``tied=False`` its head has weights of its own."""
    model = load_dense(ModelSpec(kind="random", name=architecture))
    if not tied:
        model.config.tie_word_embeddings = False
        head = model.get_output_embeddings()
        head.weight = torch.nn.Parameter(head.weight.detach().flip(0).clone())
    compress_(model, SketchConfig(**(SKETCH | sketch)))
    return model.eval()


def pack(model: PreTrainedModel, out: Path, rest: RestStorage | None = None, **options: Any) -> Path:
    """Export a sketched model; its tokenizer is the byte tokenizer."""
    tokenizer = load_tokenizer(ModelSpec(kind="random", name="llama"))
    export(from_model(model), ModelFiles(model.config, tokenizer), out, rest=rest, **options)
    return out


def rewrite(folder: Path, **changes: Tensor | None) -> None:
    """Change, add or remove tensors of the one weight file; what its header says of checksums stays."""
    file = folder / "model.safetensors"
    with safe_open(file, framework="pt") as content:
        metadata = content.metadata()
    tensors = load_file(file) | {name: tensor for name, tensor in changes.items() if tensor is not None}
    kept = {name: tensor for name, tensor in tensors.items() if changes.get(name, tensor) is not None}
    save_file(kept, file, metadata=metadata)


def seal(folder: Path) -> Path:
    """Make the checksums of a changed folder fit, as a forger would: so that what is checked besides them is seen."""
    return forged(Files.read(folder)).write(folder)


def random_config(architecture: str = "llama") -> Any:
    """Configuration of the random model."""
    return load_config(ModelSpec(kind="random", name=architecture))


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    """Logits of :data:`IDS`, in the model's dtype."""
    return model(IDS, use_cache=False).logits
