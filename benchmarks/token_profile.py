"""Where the time of a generated token goes: forward hooks around the parts of a model (for packed.py)."""

from __future__ import annotations

import time
from collections import defaultdict
from typing import Any

from torch import nn

from usllm.packed.linear import PackedLinear

PARTS = (
    "compressed products",
    "other products",
    "head",
    "attention",
    "norms",
    "rest of the model",
    "around it",
)


def profile(model: Any, options: dict[str, Any], tokens: int) -> dict[str, float]:
    """Milliseconds of a token, by part, in the mean of some tokens behind a prompt.

    A part has its Python and the calls of its operators in it, and the hooks that watch it: about 2 ms a token of
    SmolLM2 in all. ``attention`` is what an attention layer does beside its
    products (rotary embedding, cache, softmax), ``around it`` the loop of ``generate``.

    Args:
        model: A causal model of transformers.
        options: Of ``generate``, the prompt among them.
        tokens: How many.
    """
    spent: dict[str, float] = defaultdict(float)
    stack: list[float] = []  # of parts that are running: what parts within them have taken
    handles = []
    for name, module in model.named_modules():
        part = _part(name, module)
        if part is not None:
            handles += _watched(module, part, spent, stack)
    try:
        model.generate(**options, min_new_tokens=1, max_new_tokens=1)
        spent.clear()
        began = time.perf_counter()
        model.generate(**options, min_new_tokens=1, max_new_tokens=1)
        prompt, first = dict(spent), time.perf_counter() - began
        spent.clear()
        began = time.perf_counter()
        model.generate(**options, min_new_tokens=tokens + 1, max_new_tokens=tokens + 1)
        whole = time.perf_counter() - began
    finally:
        for handle in handles:
            handle.remove()
    found = {part: 1e3 * (spent[part] - prompt.get(part, 0.0)) / tokens for part in PARTS[:-1]}
    return {**found, PARTS[-1]: 1e3 * (whole - first) / tokens - sum(found.values())}


def _part(name: str, module: nn.Module) -> str | None:
    kind = type(module).__name__
    if isinstance(module, PackedLinear):
        return "compressed products"
    if name == "lm_head":
        return "head"
    if isinstance(module, nn.Linear) or kind.endswith("Linear"):
        return "other products"
    if name.endswith("self_attn"):
        return "attention"
    if kind.endswith("RMSNorm"):
        return "norms"
    return "rest of the model" if name == "" else None


def _watched(module: nn.Module, part: str, spent: dict[str, float], stack: list[float]) -> list[Any]:
    """Hooks that add to ``spent`` what a module takes, without what watched modules within it take."""
    began: list[float] = []

    def before(*_: object) -> None:
        stack.append(0.0)
        began.append(time.perf_counter())

    def after(*_: object) -> None:
        took = time.perf_counter() - began.pop()
        spent[part] += took - stack.pop()
        if stack:
            stack[-1] += took

    return [module.register_forward_pre_hook(before), module.register_forward_hook(after)]


def profile_line(found: dict[str, float]) -> str:
    """A profile in one line."""
    total = sum(found.values())
    parts = ", ".join(f"{part} {value:.1f} ({value / total:.0%})" for part, value in found.items())
    return f"a token takes {total:.1f} ms: {parts}"
