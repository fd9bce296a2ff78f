"""Part (d): generation from packed layers over dense bf16, batch 1 and 8.

Two figures: tokens a second of transformers' ``generate``, whose Python takes most of the time of small models, and one
decoding step inside a CUDA graph, which is what the card itself needs.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_parts.layers import SKETCHES, SMALL_SKETCHES
from benchmarks.gpu_parts.models import MODELS, SMALL, dense_model, peak_gib, prepare, release, settle, sketch_
from benchmarks.gpu_parts.session import Session
from benchmarks.gpu_parts.timing import Clock
from benchmarks.kernels_model import pack_
from usllm.sketch import SketchConfig

BATCHES = (1, 8)
PROMPT = 16
NEW_TOKENS = 32
_GRAPH_STEPS = 64  # room in the cache for everything that warms up, captures and replays


def run(session: Session) -> None:
    """Measure the dense and the packed model of each shape, every figure for itself, and the ratios."""
    device = prepare(session)
    models = SMALL if session.dry_run else MODELS
    sketches = SMALL_SKETCHES if session.dry_run else {k: SKETCHES[k] for k in ("sign", "absmaxmin-r3")}
    for name, shape in models.items():
        for kind in ("dense", *sketches):
            held: list[Any] = []
            make = partial(_held, held, shape, None if kind == "dense" else sketches[kind], device)
            for batch in BATCHES:
                key, least = f"{name} {kind} batch {batch}", 1.0 if session.dry_run else 5.0
                new = 2 if session.dry_run else NEW_TOKENS
                session.measure(f"generate {key}", partial(generated, make, batch, new), least)
                session.measure(f"step in a graph {key}", partial(graph_step, make, batch, session.dry_run), least)
            held.clear()
            release()


def _held(held: list[Any], shape: dict[str, Any], sketch: SketchConfig | None, device: torch.device) -> Any:
    """The model, made when the first figure asks for it."""
    if held:
        return held[0]
    release()
    model = dense_model(shape, device)
    if sketch is not None:
        sketch_(model, sketch, device.type == "cpu")
        pack_(model)
    model = model.to(torch.bfloat16).eval()
    release()
    held.append(model)
    return model


def generated(make: Callable[[], Any], batch: int, new_tokens: int) -> dict[str, Any]:
    """Tokens a second and sequence of ``generate``, greedy, behind the first token of each sequence."""
    model = make()
    prompt = _tokens(model, batch, PROMPT)

    def seconds(count: int) -> float:
        settle(prompt.device)
        started = time.perf_counter()
        with torch.inference_mode():
            out = model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=count,
                min_new_tokens=count,
                do_sample=False,
                pad_token_id=0,
            )
        settle(prompt.device)
        if out.shape[1] != PROMPT + count:
            raise RuntimeError(f"{out.shape[1] - PROMPT} tokens were generated, not {count}")
        return time.perf_counter() - started

    seconds(2)  # compiles
    first = seconds(1)
    rate = new_tokens / max(seconds(new_tokens + 1) - first, 1e-9)
    return {"tokens_per_second": rate, "all_sequences_per_second": batch * rate, "peak_gib": peak_gib(prompt.device)}


def graph_step(make: Callable[[], Any], batch: int, dry_run: bool) -> dict[str, Any]:
    """One decoding step with a static cache inside a CUDA graph; in a dry run as it comes."""
    from transformers import StaticCache

    model, clock = make(), Clock.of(dry_run)
    prompt = _tokens(model, batch, PROMPT)
    cache = StaticCache(config=model.config, max_cache_len=PROMPT + _GRAPH_STEPS)
    token = _tokens(model, batch, 1)
    position = torch.full((batch, 1), PROMPT, device=prompt.device)
    with torch.inference_mode():
        model(input_ids=prompt, past_key_values=cache, use_cache=True)

        def step(_: int) -> Tensor:
            logits: Tensor = model(input_ids=token, position_ids=position, past_key_values=cache, use_cache=True).logits
            return logits

        found = clock.in_graph_if_possible(step)
    return {
        "ms": 1e3 * found.seconds,
        "tokens_per_second": 1 / found.seconds,
        "in_graph": found.in_graph,
        "why_not_in_graph": found.why_not,
    }


def _tokens(model: Any, batch: int, count: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.config.vocab_size, (batch, count), generator=generator)
    return ids.to(model.device)
