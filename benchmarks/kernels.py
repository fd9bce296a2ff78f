"""The sketch's operations against what they replace, on Llama shapes; on a card or on the CPU, whatever is there.

    python benchmarks/kernels.py [codec] [linear] [model] [--rows 1 3] [--shapes 1b 8b 70b] [--bits 0.5]

Every figure is a ratio of medians within this run, with the floor beside it: the bytes that must move, at the copy
bandwidth measured here, and the operations. ``model`` trains one step of a Llama of random weights, 1B-shaped unless
--layers or --width say otherwise, and generates with it. Nothing here is tuned at run time.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).parent))  # run as a script, the folder is there already
from baselines import matrix_query, naive_query
from kernels_model import model_step

from usllm.sketch import Plan, SketchConfig, States, build_plan
from usllm.sketch.layer_bytes import pack_layer
from usllm.system.machine import machine, machine_line
from usllm_kernels import (
    choose,
    packed_states,
    project,
    project_query,
    query,
    sketch_linear,
)

# Output rows and input channels of q, k, gate and down (o is not compressed; v and up are k and gate again).
SHAPES = {
    "1b": [(2048, 2048), (512, 2048), (8192, 2048), (2048, 8192)],
    "8b": [(4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336)],
    "70b": [(8192, 8192), (1024, 8192), (28672, 8192), (8192, 28672)],
}
UNCACHED_BYTES = 1 << 27
COPY_BYTES = {"cuda": 1 << 30, "cpu": 1 << 28}


def median(work: Callable[[int], object], device: torch.device, repeat: int, rounds: int = 1) -> float:
    """Seconds of one call; each repetition calls with 0 … rounds - 1, so that no cache holds what is read next."""
    seconds = []
    for number in range(repeat + 1):
        if device.type == "cuda":
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            first.record()
            for which in range(rounds):
                work(which)
            last.record()
            last.synchronize()
            elapsed = first.elapsed_time(last) / 1e3
        else:
            started = time.perf_counter()
            for which in range(rounds):
                work(which)
            elapsed = time.perf_counter() - started
        if number:  # the first one compiles and allocates
            seconds.append(elapsed / rounds)
    return statistics.median(seconds)


def bandwidth(device: torch.device, repeat: int) -> float:
    """Bytes read and written in a second by a copy that no cache holds."""
    source = torch.ones(COPY_BYTES[device.type] // 4, device=device)
    target = torch.empty_like(source)
    return 2 * COPY_BYTES[device.type] / median(lambda _: target.copy_(source), device, repeat)


def layer(shape: tuple[int, int], config: SketchConfig, device: torch.device) -> tuple[Tensor, Plan, States]:
    """A random latent weight, a plan by uneven importance, and its states."""
    generator = torch.Generator().manual_seed(0)  # a few channels hold most of the energy, as in real activations
    importance = torch.rand(shape[1], generator=generator) ** 8 + 1e-3
    weight = torch.randn(shape, generator=generator).to(device)
    plan = build_plan(shape, importance, config, f"{shape}")
    return weight, plan, project(weight, plan)


def copies(weight: Tensor) -> list[Tensor]:
    """As many copies of a weight as no cache holds: a model's layers do not wait in one either."""
    return [weight.clone() for _ in range(-(-UNCACHED_BYTES // (weight.numel() * weight.element_size())))]


def several(states: States, plan: Plan) -> list[States]:
    """Copies of the states as :func:`copies` makes them of weights, as many as layers of this shape would be cold."""
    count = min(-(-UNCACHED_BYTES // max(plan.total_bits // 8, 1)), 64)
    return [{name: value.clone() for name, value in states.items()} for _ in range(count)]


def table(title: str, rows: Iterator[tuple[str, ...]], head: tuple[str, ...]) -> None:
    """Print rows as they come."""
    print(f"\n{title}")
    print("".join(f"{cell:>{14 if number else 22}}" for number, cell in enumerate(head)))
    for row in rows:
        print("".join(f"{cell:>{14 if number else 22}}" for number, cell in enumerate(row)), flush=True)


def codec_rows(arguments: argparse.Namespace, device: torch.device, speed: float) -> Iterator[tuple[str, ...]]:
    """project_query and query against their floors, the naive decode and the matrix form."""
    for rows in arguments.rows:
        for shape in shapes(arguments):
            yield codec_row(shape, rows, arguments, device, speed)


def codec_row(
    shape: tuple[int, int], rows: int, arguments: argparse.Namespace, device: torch.device, speed: float
) -> tuple[str, ...]:
    """One shape and number of rows of :func:`codec_rows`."""
    weight, plan, states = layer(shape, SketchConfig(bits_per_weight=arguments.bits, rows=rows), device)
    count = weight.numel()
    weights, targets = copies(weight), copies(weight)

    def timed(work: Callable[[int], object], rounds: int = len(weights), repeat: int = arguments.repeat) -> float:
        return median(work, device, repeat, rounds)

    copied = timed(lambda i: targets[i].copy_(weights[i]))
    both = timed(lambda i: project_query(weights[i], plan, dtype=torch.bfloat16))
    cold = several(states, plan)
    alone = timed(lambda i: query(cold[i % len(cold)], plan, torch.bfloat16))
    naive = timed(lambda _: naive_query(states, plan, torch.bfloat16), 1, 1)
    matrix = timed(lambda _: matrix_query(states, plan, torch.bfloat16), 1, 3)
    return (
        f"{shape[0]}x{shape[1]}, R={rows}",
        f"{both / copied:.2f}",
        f"{6 * count / speed / both:.0%}",
        f"{alone / copied:.2f}",
        f"{(2 * count + plan.total_bits / 8) / speed / alone:.0%}",
        f"{naive / alone:.0f}",
        f"{matrix / alone:.1f}",
    )


def linear_rows(arguments: argparse.Namespace, device: torch.device, speed: float) -> Iterator[tuple[str, ...]]:
    """sketch_linear from packed states against the dense bf16 product, for few tokens and for a prompt."""
    for way, config in [*ways(arguments), ("waterfill", waterfill(arguments.bits))]:
        for shape in shapes(arguments):
            yield linear_row(shape, way, config, arguments, device, speed)


@torch.no_grad()
def linear_row(
    shape: tuple[int, int],
    way: str,
    config: SketchConfig,
    arguments: argparse.Namespace,
    device: torch.device,
    speed: float,
) -> tuple[str, ...]:
    """One shape and sketch of :func:`linear_rows`."""
    _, plan, states = layer(shape, config, device)
    packed = several(packed_states(pack_layer(plan, states).to(device), plan), plan)
    dense = copies(query(states, plan, torch.bfloat16))
    numbers = (1, 8, arguments.tokens)
    inputs = {tokens: torch.randn(tokens, shape[1], device=device, dtype=torch.bfloat16) for tokens in numbers}

    def from_states(tokens: int) -> float:
        return median(lambda i: sketch_linear(inputs[tokens], packed[i], plan), device, arguments.repeat, len(packed))

    def from_weights(tokens: int) -> float:
        return median(lambda i: functional.linear(inputs[tokens], dense[i]), device, arguments.repeat, len(dense))

    cells, count = [], dense[0].numel()
    for tokens in inputs:
        ours, theirs = from_states(tokens), from_weights(tokens)
        cells.append(f"{ours / theirs:.2f}")
        if tokens == 1:
            floor = plan.total_bits / 8 / speed
            cells.append(f"{floor / ours:.1%}")
    kept = f"{plan.num_active / shape[1]:.2f}"
    return (f"{shape[0]}x{shape[1]}, {way}", kept, *cells, f"{2e-9 * count * arguments.tokens:.1f}")


def ways(arguments: argparse.Namespace) -> list[tuple[str, SketchConfig]]:
    """The paper's sketch with every number of rows asked for."""
    return [(f"R={rows}", SketchConfig(bits_per_weight=arguments.bits, rows=rows)) for rows in arguments.rows]


def waterfill(bits: float) -> SketchConfig:
    """The sketch of least error that we know."""
    return SketchConfig(bits_per_weight=bits, allocation="waterfill", output_scale=True, rounding="nearest")


def shapes(arguments: argparse.Namespace) -> list[tuple[int, int]]:
    return [shape for name in arguments.shapes for shape in SHAPES[name]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", nargs="*", help="codec, linear, model; all but model if none is given")
    parser.add_argument("--bits", type=float, default=0.5)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 3])
    parser.add_argument("--shapes", nargs="+", choices=tuple(SHAPES), help="1b on the CPU, all on a card")
    parser.add_argument("--tokens", type=int, help="of a prompt: 2048 on a card, 256 on the CPU")
    parser.add_argument("--repeat", type=int, default=9)
    parser.add_argument("--layers", type=int, default=16, help="of the model")
    parser.add_argument("--waterfill", action="store_true", help="the model's sketch, instead of the paper's")
    parser.add_argument("--width", type=int, default=2048, help="of the model")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    arguments.shapes = arguments.shapes or (["1b"] if device.type == "cpu" else list(SHAPES))
    arguments.tokens = arguments.tokens or (256 if device.type == "cpu" else 2048)
    speed = bandwidth(device, arguments.repeat)
    load = os.getloadavg()[0]
    print(f"{machine_line(machine())}; {torch.get_num_threads()} threads, load {load:.1f}; kernels: {choose(device)}")
    print(f"copy bandwidth {speed / 1e9:.1f} GB/s, read and written; {arguments.bits} bits per weight")
    what = arguments.what or ["codec", "linear"]
    if "codec" in what:
        head = ("absmaxmin", "p_q / copy", "of floor", "query / copy", "of floor", "naive / q", "matrix / q")
        title = "project_query (fp32 -> bf16; floor 6 bytes a weight), query (-> bf16; floor 2 bytes and the states)"
        table(title, codec_rows(arguments, device, speed), head)
    if "linear" in what:
        head = (
            "time / dense bf16",
            "channels",
            "1 token",
            "of floor",
            "8 tokens",
            f"{arguments.tokens} tokens",
            "GFLOP of it",
        )
        title = (
            "sketch_linear from packed states (channels: the share with states; floor of one token: the packed bytes)"
        )
        table(title, linear_rows(arguments, device, speed), head)
    if "model" in what:
        sketch = waterfill(arguments.bits) if arguments.waterfill else ways(arguments)[-1][1]
        model_step(device, arguments.layers, arguments.width, sketch, arguments.tokens)


if __name__ == "__main__":
    main()
