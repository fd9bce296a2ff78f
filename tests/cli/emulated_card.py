"""``usllm-train`` on a card that is not there: tensors that say they are on it hold their numbers on the CPU.

    python tests/cli/emulated_card.py OVERRIDE …

Where tensors of both devices meet in one operation, it raises as CUDA would; single numbers on the host, indices and
copies are let through, as there. What it cannot show: kernels (the reference computes), autocast (32-true), streams,
graphs (there are none: projections go launch by launch), memory, and shapes that torch changes in place, as it does in
products of a matrix and a vector.
"""

from __future__ import annotations

import os
import sys
from contextlib import nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

CARD = torch.device("cuda", 0)
HOST = torch.device("cpu")
_MAY_MEET = {"_to_copy", "copy_", "index", "index_put", "index_put_", "_index_put_impl_"}
_tensor_to, _save = Tensor.to, torch.save


class OnCard(Tensor):
    """A tensor that says it is on the card."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> OnCard:
        made: OnCard = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, held.size(), strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype, device=HOST
        )
        made.held = held
        return made

    device = property(lambda self: CARD)
    is_cuda: ClassVar[Any] = property(lambda self: True)
    is_cpu: ClassVar[Any] = property(lambda self: False)

    def __repr__(self, **_: Any) -> str:
        return f"OnCard({self.detach().held!r})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        made: Tensor = OnCard(self.detach().held.clone())
        if isinstance(self, torch.nn.Parameter):
            made = torch.nn.Parameter(made, self.requires_grad)
        memo[id(self)] = made
        return made

    def get_device(self) -> int:
        return 0

    def tolist(self) -> Any:
        return self.detach().held.tolist()

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def numpy(self, **_: Any) -> Any:
        raise TypeError("can't convert a tensor on the card to numpy: copy it to the host first")

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return computed(func, args, kwargs or {})


def on_card(device: Any) -> bool:
    """Whether a device, given in any way, is the card."""
    return device is not None and not isinstance(device, (bool, torch.dtype)) and torch.device(device).type == "cuda"


def computed(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """What an operation gives, on the device where it would be; raises where devices meet."""
    tensors = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, Tensor)]
    cards, device = [value for value in tensors if isinstance(value, OnCard)], kwargs.get("device")
    if device is None and not cards:
        return func(*args, **kwargs)
    name = func._schema.name
    if name.startswith("usllm::"):  # an operation of ours, which moves its plan itself: as Python, on these tensors
        with Dispatching():
            return OPDEFS[name]._init_fn(*args, **kwargs)
    short = name.split("::")[-1]
    others = [value for value in tensors if not isinstance(value, OnCard) and value.dim()]
    first = args[0] if args else None
    if cards and others and (short not in _MAY_MEET or (short.startswith(("index", "_index")) and first is others[0])):
        shapes = [(type(value).__name__, tuple(value.shape)) for value in tensors]
        raise RuntimeError(f"Expected all tensors to be on the same device: {func} of {shapes}")
    if short == "copy_":
        _held(first).copy_(_held(args[1]))
        return first
    inputs = {id(card.held): card for card in cards}
    plain = {**tree_map(_held, kwargs), **({"pin_memory": False} if kwargs.get("pin_memory") else {})}
    found = func(*tree_map(_held, args), **plain)
    there = on_card(device) if device is not None else bool(cards)

    def wrapped(value: Any) -> Any:
        if not isinstance(value, Tensor) or isinstance(value, OnCard):
            return value
        known = inputs.get(id(value))
        return known if known is not None else OnCard(value) if there else value

    return found if short in ("_local_scalar_dense", "_pin_memory") else tree_map(wrapped, found)


def _held(value: Any) -> Any:
    if isinstance(value, OnCard):
        return value.held
    return HOST if isinstance(value, torch.device) and value.type == "cuda" else value


class Dispatching(TorchDispatchMode):
    """Makes new tensors where they are asked for."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return computed(func, args, kwargs or {})


class Making(TorchFunctionMode):
    """Copies to the card what is made of numbers, which never comes to a dispatch."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.tensor, torch.as_tensor) and on_card(kwargs.get("device")):
            return moved(func(*args, **{key: value for key, value in kwargs.items() if key != "device"}), CARD)
        return func(*args, **kwargs)


def moved(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """``Tensor.to``."""
    if args and isinstance(args[0], Tensor):
        args = (args[0].device, args[0].dtype)
    wanted = [value for value in [*args, *kwargs.values()] if isinstance(value, (str, torch.device))]
    types = [value for value in [*args, *kwargs.values()] if isinstance(value, torch.dtype)]
    target = torch.device(wanted[0]) if wanted else tensor.device
    if isinstance(tensor, OnCard):
        if target.type == "cuda":
            return _tensor_to(tensor, *types) if types else tensor
        return _tensor_to(tensor.detach().held.clone(), *types)
    if target.type == "cuda":
        return _tensor_to(tensor, CARD, *types)
    return _tensor_to(tensor, *args, **kwargs)


class _NoGraph:
    def __init__(self) -> None:
        raise RuntimeError("the card is emulated")


class _Stream:
    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def wait_stream(self, stream: Any) -> None:
        pass


class _Properties:
    name, major, minor, multi_processor_count, total_memory = "emulated card", 9, 0, 132, 80 << 30


def install() -> None:
    """From now on there is a card."""
    cuda: Any = torch.cuda
    answers = {
        "is_available": True,
        "device_count": 1,
        "current_device": 0,
        "get_device_name": _Properties.name,
        "get_device_properties": _Properties,
        "get_device_capability": (9, 0),
        "is_bf16_supported": False,
        "get_rng_state_all": [],
        "memory_allocated": 0,
        "max_memory_allocated": 0,
        "is_current_stream_capturing": False,
    }
    silent = ("set_device", "set_stream", "synchronize", "empty_cache", "manual_seed", "manual_seed_all", "_lazy_init")
    for name, answer in {**answers, **dict.fromkeys((*silent, "reset_peak_memory_stats"))}.items():
        setattr(cuda, name, lambda *_, answer=answer, **__: answer)
    cuda.device = cuda.stream = lambda *_: nullcontext()
    cuda.Stream, cuda.current_stream, cuda.CUDAGraph = _Stream, _Stream, _NoGraph
    tensors: Any = Tensor
    tensors.to = moved
    tensors.cpu = lambda self, *_, **__: moved(self, HOST)
    tensors.cuda = lambda self, *_, **__: moved(self, CARD)
    tensors.pin_memory = lambda self, *_, **__: self
    torch.save = lambda content, *args, **kwargs: _save(
        tree_map(lambda value: moved(value, HOST) if isinstance(value, OnCard) else value, content), *args, **kwargs
    )
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    torch.autograd.set_multithreading_enabled(False)  # a thread for the card would want its driver
    Making().__enter__()
    Dispatching().__enter__()


if __name__ == "__main__":
    os.environ["USLLM_KERNELS"] = "torch"
    from usllm.cli.train import main

    install()
    sys.argv = ["usllm-train", *sys.argv[1:], "trainer=gpu", "trainer.precision=32-true"]
    main()
