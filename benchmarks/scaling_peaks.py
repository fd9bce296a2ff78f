"""Peaks of memory of small runs, stage by stage, as torch's allocator of the CPU counts them: what checks the tables.

python benchmarks/scaling_peaks.py STRATEGY

Runs all stages of the recipe, and finetuning, with and without a teacher, on a random Llama in this process, or as one
rank of several where torchrun's variables say so, and prints the highest sum of all tensors within each stage as JSON.
Every tensor is counted, whoever holds it: the profiler is told of each allocation and each release.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.plugins.environments import LightningEnvironment, TorchElasticEnvironment
from torch import Tensor
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a script, it finds only its own folder there

from benchmarks.scaling_stages import OBJECTIVES
from usllm.callbacks import SketchReprojection
from usllm.sketch import SketchConfig
from usllm.stages import Allocate, Calibrate, Preparation, Reconstruct, Start
from usllm.training import OptimizerConfig, SketchFinetuner, build_objective, build_strategy

MODEL: dict[str, Any] = {
    "vocab_size": 4096,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}
CONTEXT, SEQUENCES, BATCH, STEPS = 256, 16, 4, 2
SKETCH = SketchConfig(
    bits_per_weight=0.5,
    operator="mean",
    rows=1,
    state_bits=1,
    output_scale=True,
    train_output_scale=True,
    straight_through="state",
    allocation="waterfill",
    layer_budget="sensitivity",
)


def load_model() -> LlamaForCausalLM:
    """The random model, fp32."""
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**MODEL))


class Tokens(LightningDataModule):
    """Random tokens."""

    def __init__(self) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        self.tokens = torch.randint(MODEL["vocab_size"], (SEQUENCES, CONTEXT), generator=draw)

    def calibration_batches(self, count: int) -> Iterator[dict[str, Tensor]]:
        return ({"input_ids": row[None]} for row in self.tokens[:count])

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader([{"input_ids": row} for row in self.tokens], batch_size=1)  # type: ignore[arg-type]


class Spans:
    """When each stage ran, in nanoseconds as the profiler counts them."""

    def __init__(self) -> None:
        self.found: dict[str, list[tuple[int, int]]] = {}

    def around(self, owner: type, method: str, name: str) -> None:
        """Note every call of a method."""
        ordinary: Callable[..., Any] = getattr(owner, method)

        @wraps(ordinary)
        def noted(*arguments: Any, **options: Any) -> Any:
            began = time.time_ns()
            try:
                return ordinary(*arguments, **options)
            finally:
                self.found.setdefault(name, []).append((began, time.time_ns()))

        setattr(owner, method, noted)


def held_over_time(events: list[Any]) -> tuple[Tensor, Tensor]:
    """Nanoseconds of all changes, and the bytes held behind each, int64 [changes] both, of what was seen released.

    Everything is, at the latest when the run is given back. But the profiler sees no release by a thread that it did
    not start in, and a thread of gloo is sometimes the last to hold what it has sent: that would count to the end.

    Args:
        events: Of the profiler, as a tree.
    """
    changes: list[tuple[int, int, int]] = []
    waiting = [*events]
    while waiting:
        event = waiting.pop()
        waiting += event.children
        if event.tag == _EventType.Allocation and event.extra_fields.device.type == "cpu":
            changes.append((event.start_time_ns, event.extra_fields.ptr, event.extra_fields.alloc_size))
    held: dict[int, tuple[int, int]] = {}
    seen: list[tuple[int, int]] = []
    for at, place, size in sorted(changes):
        if size > 0:
            held[place] = (at, size)
        elif place in held:
            seen += [held.pop(place), (at, size)]
    times, sizes = torch.tensor(sorted(seen)).T.contiguous()
    return times, sizes.cumsum(0)


def _fit(strategy: str, objective: str, ranks: int) -> None:
    reconstruct = Reconstruct(
        sequences=SEQUENCES, steps=STEPS, batch_size=BATCH, warmup_steps=1, calibration_sequences=8
    )
    chosen = {"kl_weight": 1.0, "hidden_weight": 0.0} if objective == "distill" else {}
    with tempfile.TemporaryDirectory() as folder:
        module = SketchFinetuner(
            load_model=load_model,
            sketch=SKETCH,
            objective=build_objective(name=objective, **chosen),
            optimizer=OptimizerConfig(),
            preparation=Preparation([Calibrate(sequences=8), Allocate(), Start(), reconstruct], Path(folder)),
        )
        trainer = Trainer(
            accelerator="cpu",
            devices=ranks,
            strategy=build_strategy(strategy),
            precision="bf16-mixed",
            max_steps=STEPS,
            plugins=[TorchElasticEnvironment() if ranks > 1 else LightningEnvironment()],
            callbacks=[SketchReprojection()],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, datamodule=Tokens())


def run(strategy: str, objective: str) -> dict[str, int]:
    """Peaks in bytes by stage, of this rank."""
    gc.collect()  # of the run before
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    spans = Spans()
    for stage in (Calibrate, Start, Reconstruct):
        spans.around(stage, "run", stage.name)
    spans.around(Trainer, "_run_stage", "finetune")
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        _fit(strategy, objective, ranks)
        gc.collect()  # all of it is given back while the profiler looks
    assert seen.profiler is not None
    times, held = held_over_time(seen.profiler.kineto_results.experimental_event_tree())
    peaks = {}
    for name, calls in spans.found.items():
        parts = [held[slice(*torch.searchsorted(times, torch.tensor(call)).tolist())] for call in calls]
        peaks[name] = max(int(part.max()) for part in parts if len(part))
    return peaks


if __name__ == "__main__":
    torch.set_num_threads(1)
    peaks = {objective: run(sys.argv[1], objective) for objective in OBJECTIVES}
    if os.environ.get("RANK", "0") == "0":
        print(json.dumps(peaks))
