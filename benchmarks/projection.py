"""Project and query all compressed weights of SmolLM2-135M, against a copy and against plain scatter and gather.

    python benchmarks/projection.py [--bits 0.5] [--rows 3] [--repeat 9]

Every figure is a ratio of medians within this run. The plain implementation hashes alike and keeps full-precision
states. It is timed without and with building its index tensors: it has to do one or hold 64 bits and more a weight.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from usllm.compress import CompressedLinear, allocate_, compressed_layers, swap_linears_
from usllm.compress.parallel import over_layers
from usllm.models import ModelSpec
from usllm.models.loading import load_dense
from usllm.sketch import Plan, SketchConfig
from usllm.system.machine import machine, machine_line
from usllm_kernels import project_query, query


def plain_index(plan: Plan) -> tuple[Tensor, Tensor, int]:
    """State of every weight, int64 [rows, out, in] (-1 where the channel has none), rows valid, and the state count."""
    out_features, in_features = plan.shape
    rows = plan.config.rows
    index = torch.full((rows, out_features, in_features), -1)
    total = 0
    for block in plan.blocks:
        for span in plan.spans:
            buckets = plan.placement(block.choice, span.size).buckets.long()
            states = min(block.choice.states, span.size)
            for group in range(span.groups):
                turn = plan.rotation(span) + group * in_features + block.channels
                q = (torch.arange(span.size)[:, None] - turn) % span.size  # [n, channels]
                first = total + torch.arange(len(block.channels)) * states
                where = slice(span.start + group * span.size, span.start + (group + 1) * span.size)
                for row in range(block.choice.rows):
                    index[row, where, block.channels] = first + row * states * len(block.channels) + buckets[row][q]
                total += block.choice.rows * states * len(block.channels)
    return index, index[0] >= 0, total


def plain_sketch(weight: Tensor, index: Tensor, valid: Tensor, states: int) -> Tensor:
    """AbsMaxMin by scatter_reduce and gather, without state quantisation."""
    values = weight[valid]
    magnitude, decoded = values.abs(), torch.zeros_like(weight)
    best = torch.zeros_like(values)
    for row in index:
        at = row[valid]
        smallest = torch.full((states,), torch.inf).scatter_reduce_(0, at, magnitude, "amin")
        winner = magnitude == smallest.gather(0, at)
        signed = torch.zeros(states).scatter_(0, at[winner], values[winner])
        candidate = signed.gather(0, at)
        best = torch.where(candidate.abs() > best.abs(), candidate, best)
    decoded[valid] = best
    return decoded


def median(work: Callable[[], object], repeat: int) -> float:
    work()
    seconds = []
    for _ in range(repeat):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bits", type=float, default=0.5)
    parser.add_argument("--rows", type=int, default=3)
    parser.add_argument("--repeat", type=int, default=9)
    arguments = parser.parse_args()
    model = load_dense(ModelSpec())
    swap_linears_(model)
    layers = compressed_layers(model)
    generator = torch.Generator().manual_seed(0)  # a few channels hold most of the energy, as in real activations
    importance = {
        name: torch.rand(layer.in_features, generator=generator) ** 8 + 1e-3 for name, layer in layers.items()
    }
    allocate_(model, SketchConfig(bits_per_weight=arguments.bits, rows=arguments.rows), importance)
    weights = [layer.weight.detach() for layer in layers.values()]
    targets = [torch.empty_like(weight) for weight in weights]

    def copy() -> None:
        for target, weight in zip(targets, weights, strict=True):
            target.copy_(weight)

    def plan_of(layer: CompressedLinear) -> Plan:
        assert isinstance(layer.plan, Plan)
        return layer.plan

    def project_and_query(layer: CompressedLinear) -> None:
        project_query(layer.weight, plan_of(layer))

    def query_alone(layer: CompressedLinear) -> None:
        query(layer.states, plan_of(layer))

    plain = hashing = 0.0
    for layer in layers.values():
        started = time.perf_counter()
        index, valid, states = plain_index(plan_of(layer))
        hashing += time.perf_counter() - started
        started = time.perf_counter()
        expected = plain_sketch(layer.weight.detach(), index, valid, states)
        plain += time.perf_counter() - started
        if not torch.all(project_query(layer.weight, plan_of(layer))[1].abs() <= expected.abs() * (1 + 1e-6)):
            raise SystemExit(f"{layer.name}: the two implementations disagree")
    copied = median(copy, arguments.repeat)
    fused = median(lambda: over_layers(project_and_query, layers), arguments.repeat)
    queried = median(lambda: over_layers(query_alone, layers), arguments.repeat)
    followed = median(lambda: over_layers(CompressedLinear.reproject, layers), arguments.repeat)
    count = sum(weight.numel() for weight in weights)
    print(f"{machine_line(machine())}; {torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}")
    print(f"{count:,} weights, absmaxmin, {arguments.rows} rows, {arguments.bits} bits per weight")
    print(f"copy                    {copied:8.3f} s")
    print(f"project_query           {fused:8.3f} s   {fused / copied:6.1f} x the copy")
    print(f"query                   {queried:8.3f} s   {queried / copied:6.1f} x the copy")
    print(f"layers' re-projection   {followed:8.3f} s   {followed / copied:6.1f} x the copy (winners and error too)")
    print(f"scatter_reduce + gather {plain:8.3f} s   {plain / fused:6.1f} x project_query")
    print(f"… with its hashing      {plain + hashing:8.3f} s   {(plain + hashing) / fused:6.1f} x project_query")


if __name__ == "__main__":
    main()
