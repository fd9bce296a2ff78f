"""Where a model stops being finite: its first such weight or state, or the first module with such an output."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from usllm.system.errors import RunError


def first_nonfinite_tensor(module: nn.Module) -> str | None:
    """Name of the first parameter or floating buffer of ``module`` with a value that is not finite, if there is one."""
    for kind, named in (("weight", module.named_parameters()), ("state", module.named_buffers())):
        for name, tensor in named:
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                return f"the {kind} {name}"
    return None


@contextlib.contextmanager
def first_nonfinite_output(module: nn.Module) -> Iterator[list[str]]:
    """Watch the innermost modules; the list holds the first one whose output was not finite, once there was one."""
    found: list[str] = []

    def watch(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            value = output[0] if isinstance(output, tuple) else output
            if not found and isinstance(value, Tensor) and not torch.isfinite(value).all():
                found.append(f"the output of {name}")

        return hook

    handles = [
        inner.register_forward_hook(watch(name)) for name, inner in module.named_modules() if not list(inner.children())
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def refuse_nonfinite(module: nn.Module, what: str) -> None:
    """Refuse a model whose weights or states are not all finite; one pass over its memory.

    Args:
        module: the model.
        what: how to call it in the message, with where it came from.

    Raises:
        RunError: names the first tensor.
    """
    if (where := first_nonfinite_tensor(module)) is not None:
        raise RunError(
            f"{what} has values that are not finite (NaN or infinite), first in {where}; take an earlier one"
        )
