"""Llamas of real shapes with random weights: dense, sketched and packed."""

from __future__ import annotations

import gc
import os
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_parts.session import Session
from usllm.compress import DEFAULT_PATTERNS, LayerPlan, Statistics, as_compressor, swap_linears_
from usllm.sketch import SketchConfig

MODELS: dict[str, dict[str, Any]] = {
    "smollm2-135m": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "vocab_size": 49152,
    },
    "llama-3.2-1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "vocab_size": 128256,
    },
}
SMALL: dict[str, dict[str, Any]] = {
    "small": {
        "hidden_size": 8,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "vocab_size": 264,
    },
}

DRY_RUN_PATTERNS = ("down_proj",)


def prepare(session: Session) -> torch.device:
    """The device of a part; in a dry run the CPU, with layers that compute as on a card, in Triton's interpreter."""
    if not session.dry_run:
        return torch.device("cuda")
    from usllm.compress.methods.sketch import SketchPlan

    os.environ["USLLM_KERNELS"] = "triton"
    SketchPlan.decodes_on = frozenset()
    return torch.device("cpu")


def dense_model(shape: dict[str, Any], device: torch.device, layers: int | None = None) -> Any:
    """A Llama of random weights in fp32.

    Args:
        shape: One of :data:`MODELS`.
        device: That it is made on.
        layers: Number of decoder layers, if not the shape's.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    fields = {**shape, **({} if layers is None else {"num_hidden_layers": min(layers, shape["num_hidden_layers"])})}
    torch.manual_seed(0)
    with device:
        return LlamaForCausalLM(LlamaConfig(**fields, max_position_embeddings=4096, tie_word_embeddings=True))


def sketch_(model: Any, sketch: SketchConfig, dry_run: bool = False) -> None:
    """Sketch a model in place, planned by uneven importance: a few channels hold most of the energy.

    Layers of one shape share their bits out alike, as planning a billion weights takes a minute; their hashes differ.
    In a dry run one layer is enough: the interpreter takes seconds for each.
    """
    compressor = as_compressor(sketch)
    shared: dict[tuple[int, int], tuple[LayerPlan, Tensor]] = {}
    for name, layer in swap_linears_(model, DRY_RUN_PATTERNS if dry_run else DEFAULT_PATTERNS).items():
        if layer.shape not in shared:
            importance = torch.rand(layer.in_features, generator=torch.Generator().manual_seed(0)) ** 8 + 1e-3
            bits = int(sketch.bits_per_weight * layer.out_features * layer.in_features)
            shared[layer.shape] = compressor.plan(layer.shape, name, Statistics(energy=importance), bits), importance
        plan, importance = shared[layer.shape]
        own = compressor.restore(plan.to_tensors(), layer.shape, name)
        statistics = Statistics(energy=importance.to(layer.importance.device))
        layer.set_plan(own, importance, own.start(layer.latent_weight(), statistics))
        layer.reproject()


def release() -> None:
    """Give back the memory of models that nothing refers to any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_gib(device: torch.device) -> float | None:
    """The most memory allocated since :func:`release`, in GiB; ``None`` on the CPU."""
    return torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None


def settle(device: torch.device) -> None:
    """Wait until the device has nothing left to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
