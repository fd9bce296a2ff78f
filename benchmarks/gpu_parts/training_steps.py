"""Part (c): a training step, sketched over dense: time, peak memory, as it comes and compiled.

A step is forward and loss in bf16 autocast, backward, clipping, AdamW, and, sketched, the states' gradient and the
re-projection that the paper does each step, after a few of them a replayed graph. Compiled, a few decoder layers stand
for all: compiling time grows with them, the ratio does not.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from benchmarks.gpu_parts.layers import SKETCHES, SMALL_SKETCHES
from benchmarks.gpu_parts.models import MODELS, SMALL, dense_model, peak_gib, prepare, release, settle, sketch_
from benchmarks.gpu_parts.session import Session
from usllm.compress import reproject_
from usllm.compress.gradients import spread_gradients_
from usllm.training.objectives import next_token_loss

TOKENS = 4096
CONTEXT = 2048
COMPILED_LAYERS = 4
STEPS = 5
_BEGUN = 3  # steps in which kernels are compiled and a graph is made


def run(session: Session) -> None:
    """Measure both shapes as they come, then compiled."""
    device = prepare(session)
    models = SMALL if session.dry_run else MODELS
    for layers in (None, COMPILED_LAYERS):
        for name, shape in models.items():
            way = "eager" if layers is None else f"compiled, {COMPILED_LAYERS} layers"
            session.measure(
                f"step {name} sign {way}",
                partial(step_ratio, shape, device, layers, session.dry_run),
                least=1.0 if session.dry_run else 15.0,
            )


def step_ratio(shape: dict[str, Any], device: torch.device, layers: int | None, dry_run: bool) -> dict[str, Any]:
    """Both models' median step, one after the other; ``layers`` means compiled, with so many of them."""
    tokens, context = (16, 8) if dry_run else (TOKENS, CONTEXT)
    sketch = (SMALL_SKETCHES if dry_run else SKETCHES)["sign"]
    found: dict[str, Any] = {"tokens": tokens, "layers": layers or shape["num_hidden_layers"]}
    for kind in ("dense", "sketched"):
        release()
        model = dense_model(shape, device, layers)
        if kind == "sketched":
            sketch_(model, sketch, dry_run)
        model.train()
        batch = torch.randint(0, shape["vocab_size"], (tokens // context, context), device=device)
        after = (lambda m=model: reproject_(m)) if kind == "sketched" else (lambda: None)
        backend = None if layers is None else ("aot_eager" if dry_run else "inductor")
        step, projecting, first = steps(model, batch, after, 1 if dry_run else STEPS, backend)
        found |= {f"{kind}_ms": 1e3 * step, f"{kind}_peak_gib": peak_gib(device), f"{kind}_first_step_s": first}
        if kind == "sketched":
            found["reprojection_ms"] = 1e3 * projecting
        del model, batch, after
        torch._dynamo.reset()
    release()
    found["over_dense"] = found["sketched_ms"] / found["dense_ms"]
    found["over_dense_without_reprojection"] = (found["sketched_ms"] - found["reprojection_ms"]) / found["dense_ms"]
    return found


def steps(
    model: Any, batch: torch.Tensor, after: Callable[[], object], count: int, backend: str | None
) -> tuple[float, float, float]:
    """Median seconds of a step and of what comes after the optimizer's, and those of the first step."""
    device = batch.device
    network = model if backend is None else torch.compile(model, backend=backend)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=device.type == "cuda")
    whole, behind = [], []
    for _ in range(count + _BEGUN):
        settle(device)
        begun = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16):
            loss = next_token_loss(network(input_ids=batch, use_cache=False).logits, batch)
        loss.backward()
        spread_gradients_(model)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        settle(device)
        between = time.perf_counter()
        after()
        settle(device)
        whole.append(time.perf_counter() - begun)
        behind.append(time.perf_counter() - between)
    if not bool(loss.isfinite()):
        raise RuntimeError(f"the loss is {float(loss)} after {count + _BEGUN} steps")
    return statistics.median(whole[_BEGUN:]), statistics.median(behind[_BEGUN:]), whole[0]
