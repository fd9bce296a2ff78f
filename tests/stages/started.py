"""A small model that has been started, as stages find it; nothing is trained, no text is read."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from usllm.compress import Statistics, as_compressor, compressed_layers, swap_linears_
from usllm.compress.surgery import plan_layers, start_
from usllm.models.random_model import random_model
from usllm.sketch import SketchConfig
from usllm.stages import Work

CONFIG = SketchConfig(bits_per_weight=3.0, rows=1, group_size=32)


def texts(first: int) -> Callable[[int], Iterable[dict[str, Tensor]]]:
    return lambda count: [{"input_ids": torch.arange(first, first + 4)[None]} for _ in range(min(count, 2))]


def work_in(folder: Path | None, **changed: Any) -> Work:
    """A started model on its way; what is no field of ``Work`` changes how it was made."""
    config = changed.pop("config", CONFIG)
    energy, weight = changed.pop("energy", 1.0), changed.pop("weight", 0.0)
    model = random_model("llama").eval()
    layers = swap_linears_(model)
    statistics = {name: Statistics(torch.full((layer.in_features,), energy)) for name, layer in layers.items()}
    compressor = as_compressor(config)
    bits, plans = plan_layers(model, compressor, statistics)
    start_(model, plans, statistics)
    with torch.no_grad():
        next(iter(compressed_layers(model).values())).get_parameter("weight")[0, 0] += weight
    found = Work(
        model=model,
        compressor=compressor,
        load_dense=lambda: random_model("llama"),
        batches=texts(0),
        device=torch.device("cpu"),
        context=contextlib.nullcontext,
        folder=folder,
        statistics=statistics,
        bits=bits,
        plans=plans,
        text={"data.train": {"text": "abc"}},
    )
    return replace(found, **changed)
