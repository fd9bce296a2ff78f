"""Products from codes in output order over dense bf16 ones, without and with the dispatch of operators.

    python benchmarks/planes.py [--tokens 1 8 32 256] [--shares 0.6 1.0]
    python benchmarks/planes.py --decode       instead: decoding as written down, over that of codes in output order

Signs of a share of the inputs, as the sign sketch stores at half a bit and at one bit. Weights are as many as do not
stay in a cache. Times are of this thread alone, so that other work disturbs little; ``block`` sums the products of a
decoder's block: q, k, v, gate, up and down.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a script, it finds only its own folder there

from benchmarks.baselines import naive_query
from benchmarks.packed_models import sign_sketch
from usllm.sketch import build_plan
from usllm.system.machine import machine, machine_line
from usllm_kernels import Codes, make_planes, plane_linear, plane_weight, project
from usllm_kernels.cpu import plane_linear as implementation
from usllm_kernels.planes import SIGNS
from usllm_kernels.sketch_planes import sketch_planes

MODELS = {
    "SmolLM2-135M": [(576, 576), (192, 576), (192, 576), (1536, 576), (1536, 576), (576, 1536)],
    "Llama-3.2-1B": [(2048, 2048), (512, 2048), (512, 2048), (8192, 2048), (8192, 2048), (2048, 8192)],
}
"""``(out, in)`` of the layers of a block."""
_BYTES = 160_000_000
"""Of the weights that take turns."""


def seconds(work: Callable[[], object]) -> float:
    """The best of five, of this thread."""
    work()
    best = float("inf")
    for _ in range(5):
        started = time.thread_time()
        work()
        best = min(best, time.thread_time() - started)
    return best


def measure(shape: tuple[int, int], share: float, tokens: list[int]) -> dict[str, list[float]]:
    """Microseconds of the product from planes, of its loops alone, and of the dense one, for each number of tokens."""
    outputs, inputs = shape
    generator = torch.Generator().manual_seed(0)
    held = torch.randperm(inputs, generator=generator)[: round(share * inputs)].sort().values
    codes = torch.randint(0, 2, (outputs, len(held)), generator=generator, dtype=torch.int8) * 2 - 1
    scales, factors = torch.rand(len(held), generator=generator), torch.rand(outputs, 1, generator=generator)
    first = make_planes([Codes(codes, SIGNS, held, scales)], inputs, factors)
    many = max(1, _BYTES // (2 * outputs * inputs))
    planes = [dataclasses.replace(first, words=first.words.clone()) for _ in range(many)]
    dense = [torch.randn(outputs, inputs, generator=generator).bfloat16() for _ in range(max(1, many // 2))]
    found: dict[str, list[float]] = {"planes": [], "loops": [], "dense": []}
    for number in tokens:
        x = torch.randn(number, inputs, generator=generator).bfloat16()
        ours = seconds(lambda x=x: [plane_linear(x, each) for each in planes])  # type: ignore[misc]
        loops = seconds(lambda x=x: [implementation.plane_linear(x, each) for each in planes])  # type: ignore[misc]
        theirs = seconds(lambda x=x: [functional.linear(x, each) for each in dense])  # type: ignore[misc]
        found["planes"].append(1e6 * ours / len(planes))
        found["loops"].append(1e6 * loops / len(planes))
        found["dense"].append(1e6 * theirs / len(dense))
    return found


def decode_times(shape: tuple[int, int], rate: float) -> tuple[float, float]:
    """Seconds to decode a layer of the sign sketch: each weight hashed and gathered, and from codes in output order."""
    config = dataclasses.replace(sign_sketch(rate), output_scale=False)  # which the plain form leaves out
    generator = torch.Generator().manual_seed(0)  # a few inputs hold most of the energy, as in real activations
    plan = build_plan(shape, torch.rand(shape[1], generator=generator) ** 8 + 1e-3, config, f"{shape}")
    states = project(torch.randn(shape, generator=generator), plan)
    planes = sketch_planes(states, plan)
    written_down = naive_query(states, plan, torch.bfloat16)  # of one row: the mean of all is that one
    if not torch.equal(plane_weight(planes, torch.bfloat16), written_down):
        raise AssertionError(f"{shape}: decoded in two ways, and not alike")
    naive = seconds(lambda: naive_query(states, plan, torch.bfloat16))
    return naive, seconds(lambda: plane_weight(planes, torch.bfloat16))


def print_decodes() -> None:
    """The ratio of both, summed over a block."""
    for model, shapes in MODELS.items():
        for rate in (0.5, 1.0):
            times = {shape: decode_times(shape, rate) for shape in set(shapes)}
            naive, ours = (sum(times[shape][way] for shape in shapes) for way in (0, 1))
            each = ", ".join(f"{o}x{i} {1e3 * a:.1f}/{1e3 * b:.2f}" for (o, i), (a, b) in sorted(times.items()))
            print(f"{model}, {rate:g} bits: naive decode {naive / ours:.0f} times as long (milliseconds: {each})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 8, 32, 256])
    parser.add_argument("--shares", type=float, nargs="+", default=[0.6, 1.0], help="of the inputs that are stored")
    parser.add_argument("--decode", action="store_true", help="times of decoding instead of products")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{machine_line(machine())}; one thread")
    if arguments.decode:
        print_decodes()
        return
    for model, shapes in MODELS.items():
        for share in arguments.shares:
            measured = {shape: measure(shape, share, arguments.tokens) for shape in set(shapes)}
            for place, number in enumerate(arguments.tokens):
                ours, theirs, loops = (
                    sum(measured[shape][kind][place] for shape in shapes) for kind in ("planes", "dense", "loops")
                )
                each = {shape: (took["planes"][place], took["dense"][place]) for shape, took in measured.items()}
                layers = ", ".join(f"{o}x{i} {ours:.0f}/{dense:.0f}" for (o, i), (ours, dense) in sorted(each.items()))
                print(
                    f"{model}, {share:g} of the inputs, {number} tokens: block {ours / theirs:.3f} of dense"
                    f" bf16, {loops / theirs:.3f} without dispatch (microseconds: {layers})"
                )


if __name__ == "__main__":
    main()
