"""A tiny sketched model, and folders packed from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
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


def random_config(architecture: str = "llama") -> Any:
    """Configuration of the random model."""
    return load_config(ModelSpec(kind="random", name=architecture))


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    """Logits of :data:`IDS`, in the model's dtype."""
    return model(IDS, use_cache=False).logits
