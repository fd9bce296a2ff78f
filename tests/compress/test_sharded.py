"""Sharded latents are projected as whole ones, whatever the shapes, by three processes that each see a third."""

from __future__ import annotations

import multiprocessing
import os
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from usllm.compress import allocate_, compressed_layers, recall_winners_, reproject_, swap_linears_
from usllm.sketch import SketchConfig

RANKS = 3
SHAPES = [(7, 40), (2, 64), (64, 16), (33, 24)]
"""Output rows that three ranks cannot share evenly, fewer than ranks, and more layers than ranks."""
SKETCH = SketchConfig(bits_per_weight=2.0, rows=1, group_size=16, allocation="waterfill", output_scale=True)


def build() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Module()
    for number, (rows, columns) in enumerate(SHAPES):
        model.add_module(f"linear{number}", nn.Linear(columns, rows, bias=False))
    swap_linears_(model, ["linear*"])
    return model


TRAINED = replace(SKETCH, train_output_scale=True)
"""Has latents besides the weight, which are started before a model is sharded."""


def allocated_(model: nn.Module, sketch: SketchConfig) -> None:
    layers = compressed_layers(model)
    with torch.no_grad():
        allocate_(model, sketch, {name: torch.arange(1.0, layer.in_features + 1) for name, layer in layers.items()})


def trained_(model: nn.Module) -> dict[str, Any]:
    """Change the latents a little, project again; everything that came of it, the same for all ranks."""
    layers = compressed_layers(model)
    with torch.no_grad():
        first = {name: {key: value.clone() for key, value in layer.states.items()} for name, layer in layers.items()}
        for layer in layers.values():
            for latent in layer.latents.values():
                latent.mul_(-0.9)
    changes = reproject_(model)
    second = {name: dict(layer.states) for name, layer in layers.items()}
    plans = {name: layer.plan.to_tensors() for name, layer in layers.items() if layer.plan is not None}
    errors = {name: [float(value) for value in change] for name, change in changes.items()}
    return {"first": first, "second": second, "plans": plans, "changes": errors}


def work(rank: int, port: int, folder: Path) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(RANKS))
    dist.init_process_group("gloo")
    model = build()
    fully_shard(model, mesh=init_device_mesh("cpu", (RANKS,)))
    allocated_(model, SKETCH)
    torch.save(trained_(model), folder / f"{rank}.pt")
    recall_winners_(model)
    model = build()
    allocated_(model, TRAINED)
    fully_shard(model, mesh=init_device_mesh("cpu", (RANKS,)))
    torch.save(trained_(model), folder / f"trained {rank}.pt")
    recall_winners_(model)
    dist.destroy_process_group()


def test_three_ranks_agree_with_one_process_on_plans_states_and_errors(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    processes = [context.Process(target=work, args=(rank, port, tmp_path), daemon=True) for rank in range(RANKS)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * RANKS
    for name, sketch in {"": SKETCH, "trained ": TRAINED}.items():
        model = build()
        allocated_(model, sketch)
        expected = trained_(model)
        assert any(
            not torch.equal(expected["first"][n]["codes"], expected["second"][n]["codes"]) for n in expected["first"]
        )
        for rank in range(RANKS):
            found = torch.load(tmp_path / f"{name}{rank}.pt", weights_only=True)
            torch.testing.assert_close(found, expected, rtol=0, atol=0)
