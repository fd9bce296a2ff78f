"""The search for launch parameters of a card: a few for each kernel, timed on the largest layer.

The result is a table as ``usllm_kernels.cards`` reads it; it is printed, and nothing is changed by itself.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch

from benchmarks.gpu_parts.layers import SHAPES, SKETCHES, SMALL, SMALL_SKETCHES, Layer, make_layer
from benchmarks.gpu_parts.results import OK
from benchmarks.gpu_parts.session import Session, is_lost
from benchmarks.gpu_parts.timing import Clock
from usllm_kernels import project, query, sketch_linear
from usllm_kernels.cards import DEFAULTS, card_name, table_text, tried_parameters

# What is tried; every combination of one kernel, the defaults first.
CHOICES: dict[str, dict[str, tuple[int, ...]]] = {
    "few_tokens": {
        "channels": (16, 32),
        "outputs": (128, 64, 256),
        "programs": (512, 1024, 2048),
        "num_warps": (4, 2, 8),
    },
    "query": {"channels": (32, 64), "outputs": (32, 64), "num_warps": (4, 2, 8)},
    "order": {"channels": (32, 16, 64), "outputs": (128, 64), "num_warps": (4, 8)},
    "many_tokens": {"channels": (32, 16, 64), "outputs": (64, 32, 128), "num_warps": (8, 4)},
}
_KEEPS_DEFAULT = 0.98  # of its time: less gained than this is noise


def tune(session: Session, clock: Clock) -> None:
    """Try the parameters of every kernel while there is time, and print the best as a table to be committed."""
    shape, sketch = SHAPES["8b"]["gate"], SKETCHES["absmaxmin-r3"]
    if session.dry_run:
        shape, sketch = SMALL["small"]["gate"], SMALL_SKETCHES["absmaxmin-r3"]
    made: list[Layer] = []

    def layer() -> Layer:
        if not made:
            made.append(make_layer(shape, sketch, clock))
        return made[0]

    for number, kernel in enumerate(CHOICES):
        # Kernels still to come get as much of the time as this one.
        seconds = max(0.8 * session.remaining() / (len(CHOICES) - number), 0.0)
        session.measure(f"tuning {kernel}", partial(search, kernel, layer, clock, seconds, session.dry_run))
    good = session.results.good()
    lines = {kernel: good.get((session.part, f"tuning {kernel}")) for kernel in CHOICES}
    best = {kernel: line["best"] for kernel, line in lines.items() if line is not None}
    if best and session.wanted("launch parameters"):
        name = card_name(clock.device)
        session.write("launch parameters", OK, file=f"kernels/usllm_kernels/cards/{name}.json", table=best)
        print(f"\nkernels/usllm_kernels/cards/{name}.json, to be committed:\n{table_text(best)}", flush=True)


def candidates(kernel: str, dry_run: bool) -> Iterator[dict[str, int]]:
    """The defaults, then every other combination; in a dry run two in all."""
    yield DEFAULTS[kernel]
    names = list(CHOICES[kernel])
    others = (dict(zip(names, values, strict=True)) for values in itertools.product(*CHOICES[kernel].values()))
    others = (values for values in others if {**DEFAULTS[kernel], **values} != DEFAULTS[kernel])
    yield from itertools.islice(others, 1 if dry_run else None)


def search(kernel: str, layer: Callable[[], Layer], clock: Clock, seconds: float, dry_run: bool) -> dict[str, Any]:
    """Time the candidates of one kernel until ``seconds`` are over; one that does not run is passed over."""
    work = _work(kernel, layer(), clock)
    short = Clock(clock.device, min(clock.repeat, 5), clock.copy_bytes, clock.uncached_bytes)
    end = time.monotonic() + seconds
    found: list[tuple[float, Mapping[str, int]]] = []
    refused: list[str] = []
    for parameters in candidates(kernel, dry_run):
        if found and time.monotonic() > end:
            break
        with tried_parameters(kernel, parameters):
            try:
                found.append((short.in_graph_if_possible(*work).seconds, parameters))
            except Exception as error:  # too large for the card, say: no candidate
                if not found or is_lost(error):
                    raise
                refused.append(f"{parameters}: {type(error).__name__}")
    default = found[0][0]
    fastest, best = min(found, key=lambda pair: pair[0])
    if fastest > _KEEPS_DEFAULT * default:
        fastest, best = found[0]
    return {
        "best": dict(best),
        "us": 1e6 * fastest,
        "default_us": 1e6 * default,
        "tried": len(found),
        "refused": refused[:3],
        "five_best": [[round(1e6 * us, 2), dict(values)] for us, values in sorted(found, key=lambda pair: pair[0])[:5]],
    }


def _work(kernel: str, layer: Layer, clock: Clock) -> tuple[Callable[[int], object], int]:
    """What a kernel is timed by, and its rounds."""
    plan, packed = layer.plan, layer.packed
    if kernel == "query":
        return lambda i: query(layer.states[i], plan, torch.bfloat16), len(layer.states)
    if kernel == "order":
        return lambda i: project(layer.weights[i], plan), len(layer.weights)
    tokens = 1 if kernel == "few_tokens" else 128
    x = torch.randn(tokens, plan.shape[1], device=clock.device, dtype=torch.bfloat16)

    def products(i: int) -> object:
        with torch.no_grad():
            return sketch_linear(x, packed[i], plan)

    return products, len(packed)
