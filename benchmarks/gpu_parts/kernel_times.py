"""Part (b): the sketch's operations over a copy of the weights, and over the dense bf16 product.

The first result is what a copy does on this card. The shapes of most interest come first, as time may run out; the
search for launch parameters comes last. A copy is fp32 to fp32, 8 bytes a weight.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.baselines import matrix_query, naive_query
from benchmarks.gpu_parts.layers import SHAPES, SKETCHES, SMALL, SMALL_SKETCHES, Layer, make_layer
from benchmarks.gpu_parts.session import Session
from benchmarks.gpu_parts.timing import Clock
from benchmarks.gpu_parts.tuning import tune
from usllm_kernels import project, project_query, query, sketch_linear
from usllm_kernels.ops.plane_linear.op import plane_linear
from usllm_kernels.sketch_planes import sketch_planes, sketch_planes_bytes

TOKENS = (1, 8, 256)
BACKWARD_TOKENS = 2048


def run(session: Session) -> None:
    """Measure codec, products and backward pass of every shape, then tune."""
    if session.dry_run:
        os.environ["USLLM_KERNELS"] = "triton"  # in its interpreter
    clock = Clock.of(session.dry_run)
    session.measure("copy", lambda: {"bandwidth_gb_s": clock.bandwidth() / 1e9})
    sketches = SMALL_SKETCHES if session.dry_run else SKETCHES

    @lru_cache(maxsize=1)  # of one layer at a time
    def layer(shape: tuple[int, int], sketch: str) -> Layer:
        return make_layer(shape, sketches[sketch], clock)

    def on_layer(
        shape: tuple[int, int], sketch: str, of: Callable[..., dict[str, Any]], *more: object
    ) -> dict[str, Any]:
        return of(layer(shape, sketch), *more, clock)

    for name, shape, sketch in _cases(session.dry_run, list(sketches)):
        tag = f"{name} {sketch}"
        session.measure(f"codec {tag}", partial(on_layer, shape, sketch, codec))
        for tokens in TOKENS:
            session.measure(f"product {tag} {tokens}", partial(on_layer, shape, sketch, product, tokens))
        of_prompt = 8 if session.dry_run else BACKWARD_TOKENS
        session.measure(f"backward {tag}", partial(on_layer, shape, sketch, backward, of_prompt))
    layer.cache_clear()
    tune(session, clock)


def _cases(dry_run: bool, sketches: list[str]) -> Iterator[tuple[str, tuple[int, int], str]]:
    """Name, shape and sketch; large layers first, and the recipe's sketch and the paper's before the others."""
    models = SMALL if dry_run else SHAPES
    order = [sketch for sketch in ("sign", "absmaxmin-r3", "waterfill", "absmaxmin-r1") if sketch in sketches]
    for kinds in (("gate", "down"), ("q", "k")):
        for model in reversed(list(models)):
            for sketch in order:
                for kind in kinds:
                    if kind in models[model]:
                        yield f"{model}.{kind}", models[model][kind], sketch


def codec(layer: Layer, clock: Clock) -> dict[str, Any]:
    """Projection, query and both over one copy; the naive decode and the matrix form over our query."""
    plan, weights, states = layer.plan, layer.weights, layer.states
    targets = [torch.empty_like(weight) for weight in weights]
    copy = clock.in_graph_if_possible(lambda i: targets[i].copy_(weights[i]), len(weights)).seconds
    projected = clock.in_graph_if_possible(lambda i: project(weights[i], plan), len(weights))
    both = clock.in_graph_if_possible(lambda i: project_query(weights[i], plan, dtype=torch.bfloat16), len(weights))
    launched = clock.seconds(lambda i: project_query(weights[i], plan, dtype=torch.bfloat16), len(weights))
    winners = torch.empty(plan.num_states, dtype=torch.int16, device=clock.device)
    sums = torch.empty(2, plan.shape[1], device=clock.device)
    training = clock.seconds(
        lambda i: project_query(weights[i], plan, dtype=torch.bfloat16, winners=winners, sums=sums), len(weights)
    )
    alone = clock.in_graph_if_possible(lambda i: query(states[i], plan, torch.bfloat16), len(states))
    few = Clock(clock.device, min(clock.repeat, 3), clock.copy_bytes, clock.uncached_bytes)
    naive = few.seconds(lambda _: naive_query(states[0], plan, torch.bfloat16))
    found: dict[str, Any] = {
        "copy_us": 1e6 * copy,
        "project_over_copy": projected.seconds / copy,
        "query_over_copy": alone.seconds / copy,
        "project_query_over_copy": both.seconds / copy,
        "launched_project_query_over_copy": launched / copy,
        "with_winners_and_sums_over_copy": training / copy,
        "query_us": 1e6 * alone.seconds,
        "naive_over_query": naive / alone.seconds,
        "bits_per_weight": plan.bits_per_weight,
        "in_graph": projected.in_graph and both.in_graph and alone.in_graph,
        "why_not_in_graph": projected.why_not or both.why_not or alone.why_not,
    }
    if not plan.config.output_scale:  # the published form has none
        matrix = few.seconds(lambda _: matrix_query(states[0], plan, torch.bfloat16))
        found["matrix_form_over_query"] = matrix / alone.seconds
    return found


def product(layer: Layer, tokens: int, clock: Clock) -> dict[str, Any]:
    """``y = x Ŵᵀ`` from packed states, and from planes where there are some, over the dense bf16 product.

    In CUDA graphs: some are shorter than a launch.
    """
    plan, packed, dense = layer.plan, layer.packed, layer.dense
    x = torch.randn(tokens, plan.shape[1], device=clock.device, dtype=torch.bfloat16)
    with torch.no_grad():
        ours = clock.in_graph_if_possible(lambda i: sketch_linear(x, packed[i], plan), len(packed))
        theirs = clock.in_graph_if_possible(lambda i: functional.linear(x, dense[i]), len(dense))
        expanded: dict[str, Any] = {}
        if sketch_planes_bytes(plan) is not None:
            planes = [sketch_planes(states, plan) for states in layer.states]
            from_planes = clock.in_graph_if_possible(lambda i: plane_linear(x, planes[i]), len(planes))
            expanded = {
                "planes_us": 1e6 * from_planes.seconds,
                "planes_faster_than_dense": theirs.seconds / from_planes.seconds,
                "planes_in_graph": from_planes.in_graph,
            }
    return {
        **expanded,
        "us": 1e6 * ours.seconds,
        "dense_us": 1e6 * theirs.seconds,
        "over_dense": ours.seconds / theirs.seconds,
        "faster_than_dense": theirs.seconds / ours.seconds,
        "channels_with_states": plan.num_active / plan.shape[1],
        "in_graph": ours.in_graph and theirs.in_graph,
        "why_not_in_graph": ours.why_not or theirs.why_not,
    }


def backward(layer: Layer, tokens: int, clock: Clock) -> dict[str, Any]:
    """The backward pass of training, to input and latent weight, over that of the dense layer under autocast."""
    plan, states, weight = layer.plan, layer.states[0], layer.weights[0].detach().requires_grad_()
    x = torch.randn(tokens, plan.shape[1], device=clock.device, dtype=torch.bfloat16, requires_grad=True)
    upstream = torch.randn(tokens, plan.shape[0], device=clock.device, dtype=torch.bfloat16)

    def seconds(y: Tensor) -> float:
        return clock.seconds(lambda _: torch.autograd.grad(y, (x, weight), upstream, retain_graph=True))

    with torch.autocast(clock.device.type, torch.bfloat16):
        ours = sketch_linear(x, states, plan, weight=weight)
        theirs = functional.linear(x, weight)
    sketched, dense = seconds(ours), seconds(theirs)
    return {"tokens": tokens, "us": 1e6 * sketched, "dense_us": 1e6 * dense, "over_dense": sketched / dense}
