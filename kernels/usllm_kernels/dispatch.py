"""The table of implementations, by operation and back end.

A row is a folder of ``ops/``, a column a back end, a cell a file in that folder: ``reference.py`` for ``torch``,
``numba.py`` and ``triton.py`` for the back ends of these names. Rows and cells are found where they lie. A cell says in
``supports(plan)`` whether it can compute with a plan, and if not, why. :func:`register` adds to a cell from outside of
this package.

``USLLM_KERNELS`` set to ``triton``, ``numba`` or ``torch``, or the argument ``backend`` of an operation, chooses the
column; a choice that cannot run raises. ``auto``, the default, never does: it takes the first column that can.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Protocol

import torch

from usllm.sketch.classes import EMPTY
from usllm.sketch.config import SketchConfig
from usllm.sketch.plan import Plan
from usllm.system.discovery import module_names

VARIABLE = "USLLM_KERNELS"
OF_LAYERS = ("project", "project_query", "query", "sketch_linear")  # operations that a layer calls
BACKENDS = ("auto", "triton", "numba", "torch")
_OPS = "usllm_kernels.ops"
_CELLS = {"triton": "triton", "numba": "numba", "torch": "reference"}  # file of each back end in a row's folder
_AUTOMATIC = {"cuda": ("triton", "torch"), "cpu": ("numba", "torch")}  # by type of device, the fastest first


def traced(x: torch.Tensor) -> bool:
    """Whether somebody watches what is done with a tensor, and has to be given a custom op of torch.

    Parts of products on the CPU read and write addresses: no tracer, functional transform or fake tensor sees that, and
    where torch has put off a change of signs, or zeros, the numbers there are others or none.

    Raises:
        NotImplementedError: It carries a forward-mode derivative, which neither way hands on.
    """
    forward = torch.autograd.forward_ad
    if forward._current_level >= 0 and forward.unpack_dual(x).tangent is not None:
        raise NotImplementedError("products with compressed weights have no forward-mode derivative; go backward")
    return (
        type(x) is not torch.Tensor
        or torch.compiler.is_compiling()
        or x.is_neg()  # behind it: a compiler cannot follow these two questions
        or x._is_zerotensor()
        or torch.jit.is_tracing()
        or bool(torch._C._len_torch_dispatch_stack())
        or bool(torch._C._are_functorch_transforms_active())
    )


class Implementation(Protocol):
    """One operation on one back end, a module or an object. It also has the functions that the operation calls."""

    def supports(self, plan: Any) -> str | None:
        """Why it cannot compute with a plan, a clause that names key and value; ``None`` if it can.

        Operations that know no plan are asked with what they compute with instead.
        """
        ...


_registered: dict[tuple[str, str], list[Implementation | str]] = {}


def register(operation: str, backend: str, implementation: Implementation | str) -> None:
    """Add an implementation to a cell; it is asked before those that are there.

    Args:
        operation: Such as ``query``: a row of :func:`operations`.
        backend: ``triton``, ``numba`` or ``torch``.
        implementation: With the functions of ``ops/<operation>/reference.py``, of the same arguments; or the name of a
            module that has them, which is imported when it is asked for: only where its back end can run.

    Raises:
        ValueError: There is no such row or column.
    """
    if operation not in operations() or backend not in _CELLS:
        raise ValueError(
            f"register({operation!r}, {backend!r}): choose an operation of {', '.join(operations())} and a back end of"
            f" {', '.join(_CELLS)}"
        )
    _registered.setdefault((operation, backend), []).insert(0, implementation)


def operations() -> tuple[str, ...]:
    """The rows of the table: names of the folders of ``ops/``."""
    return tuple(module_names(import_module(_OPS).__path__))


def implementation(operation: str, plan: Any, device: torch.device, backend: str | None = None) -> Any:
    """What computes an operation.

    Args:
        operation: A row of the table.
        plan: To compute with, or what stands in its place (:class:`Implementation`).
        device: Of the operands.
        backend: One of :data:`BACKENDS`; ``None`` or empty reads ``USLLM_KERNELS``.

    Raises:
        ValueError: The name is unknown, or what it names cannot run here or not with this plan.
    """
    asked, source = _asked(backend)
    reason = None
    for name in _automatic(device) if asked == "auto" else (choose(device, backend),):
        for candidate in _cell(operation, name):
            reason = candidate.supports(plan)
            if reason is None:
                return candidate
        reason = reason or f"{operation} has no implementation there"
    named = getattr(plan, "name", operation)
    raise ValueError(f"{source} cannot compute {named}: {reason}; leave the choice at auto")


def supports(operation: str, backend: str, plan: Plan) -> str | None:
    """Why a back end that is installed cannot compute an operation with a plan; ``None`` if it can."""
    reasons = [candidate.supports(plan) for candidate in _cell(operation, backend)]
    if None in reasons:
        return None
    return reasons[-1] if reasons else f"{operation} has no implementation there"


def choice_problem(config: SketchConfig) -> str | None:
    """Why ``USLLM_KERNELS`` cannot compute sketches of a configuration; ``None`` if it can, or is ``auto``.

    It is known before there is a plan or a tensor; whether a back end runs on a device is :func:`choose`'s to say.
    """
    try:
        asked, source = _asked(None)
    except ValueError as error:
        return str(error)
    if asked == "auto" or not (asked == "torch" or installed(asked)):
        return None
    plan = Plan("", (1, 1), config, (EMPTY,), torch.zeros(1, dtype=torch.uint8))
    for operation in OF_LAYERS:
        reason = supports(operation, asked, plan)
        if reason is not None:
            return f"{source} cannot compute this sketch: {reason}; leave the choice at auto"
    return None


def choose(device: torch.device, backend: str | None = None) -> str:
    """``triton``, ``numba`` or ``torch``: the back end of a device, for plans that it supports.

    Args:
        device: Of the operands.
        backend: One of :data:`BACKENDS`; ``None`` or empty reads ``USLLM_KERNELS``.

    Raises:
        ValueError: The name is unknown, or what it names cannot run here.
    """
    asked, source = _asked(backend)
    if asked == "auto":
        return _automatic(device)[0]
    if asked == "numba" and device.type != "cpu":
        raise ValueError(f"{source} computes on the CPU only, the tensors are on {device.type}: leave it at auto")
    if asked == "triton" and device.type != "cuda" and not interpreted():
        raise ValueError(
            f"{source} needs CUDA tensors, these are on {device.type}: leave it at auto, or set TRITON_INTERPRET=1"
            " before the start to have the kernels interpreted, which is slow"
        )
    if asked != "torch" and not installed(asked):
        raise ValueError(f"{source}, but {asked} is not installed: pip install {asked}, or leave the choice at auto")
    return asked


def _asked(backend: str | None) -> tuple[str, str]:
    """The back end that is asked for, and where; checked."""
    asked = backend or os.environ.get(VARIABLE) or "auto"
    source = f"backend={asked!r}" if backend else f"{VARIABLE}={asked}"
    if asked not in BACKENDS:
        raise ValueError(f"{source} is unknown: choose one of {', '.join(BACKENDS)}")
    return asked, source


def _automatic(device: torch.device) -> list[str]:
    """Back ends that can run on a device, the fastest first; ``torch`` always can."""
    names = _AUTOMATIC.get(device.type, ("torch",))
    return [name for name in names if name == "torch" or installed(name)]


def _cell(operation: str, backend: str) -> list[Implementation]:
    built_in = _built_in(operation, backend)
    registered: list[Any] = [
        import_module(found) if isinstance(found, str) else found for found in _registered.get((operation, backend), [])
    ]
    return registered if built_in is None else [*registered, built_in]


@lru_cache(maxsize=64)
def _built_in(operation: str, backend: str) -> Any:
    module = f"{_OPS}.{operation}.{_CELLS[backend]}"
    return import_module(module) if find_spec(module) else None


def running_on(device: torch.device) -> AbstractContextManager[Any]:
    """Context in which Triton launches on the operands' device; by itself it takes the current one."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


@lru_cache(maxsize=8)
def installed(package: str) -> bool:
    """Whether a package can be imported, without importing it."""
    return find_spec(package) is not None


def interpreted() -> bool:
    """Whether Triton's kernels run in its interpreter."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")
