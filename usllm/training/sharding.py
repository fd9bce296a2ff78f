"""Spreading a model over ranks: loaded by one of them, handed out and sharded layer by layer."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from usllm.compress import compressed_layers
from usllm.system.ranks import failing_together

M = TypeVar("M", bound=nn.Module)


def load_on_rank_zero(load: Callable[[], M]) -> M:
    """The model that ``load`` gives on rank 0; on all others the same without weights (parameters on ``meta``).

    Raises:
        UserError: on the other ranks, where ``load`` has failed.
    """
    gc.collect()  # a model that was sharded before is held by its own hooks, in circles, until Python comes to it
    box: list[M | None] = [None]
    model: M | None = None
    with failing_together():
        if dist.get_rank() == 0:
            model = load()
            box[0] = _skeleton(model)
    dist.broadcast_object_list(box, src=0)
    if model is None:
        model = box[0]
        assert model is not None
        if (config := getattr(model, "config", None)) is not None:
            # transformers keeps a register of the classes that this process has made, and what they can record
            with torch.device("meta"):
                type(model)(config)
    return model


def shard_(model: nn.Module, mesh: DeviceMesh, cpu_offload: bool = False) -> None:
    """Shard ``model`` by FSDP2 in place: its decoder layers, embeddings and head one by one, and then the rest.

    A layer's weights go from rank 0 to the others when its turn comes, so that no rank but 0, which has the model in
    the memory of its host, ever holds more than its shards and one layer.

    Args:
        model: from :func:`load_on_rank_zero`; sketched layers no longer keep decoded weights.
        mesh: one dimension.
        cpu_offload: keep the shards in the memory of the host.
    """
    for layer in compressed_layers(model).values():
        layer.keeps_decoded = False
    policy = CPUOffloadPolicy() if cpu_offload and mesh.device_type != "cpu" else OffloadPolicy()
    device = torch.device("cpu") if mesh.device_type == "cpu" else torch.device(mesh.device_type, _current(mesh))
    known: dict[int, tuple[Tensor, Tensor]] = {}
    for part in [*units(model), model]:
        _receive_(part, device, known)
        fully_shard(part, mesh=mesh, reshard_after_forward=True, offload_policy=policy)
    known.clear()
    gc.collect()  # what was whole, likewise


def _skeleton(model: M) -> M:
    """A copy with the parameters on ``meta``; buffers, which files of weights do not hold, are copied."""
    empty = {
        id(parameter): nn.Parameter(torch.empty_like(parameter, device="meta"), parameter.requires_grad)
        for parameter in model.parameters()
    }
    return copy.deepcopy(model, memo=dict(empty))


def units(model: nn.Module) -> list[nn.Module]:
    """The parts of ``model`` that are gathered one at a time when they compute.

    They are those that transformers calls indivisible, its decoder layers, and embeddings and head unless these are
    tied. All else is one unit, the model's own, which stays gathered during a whole pass.
    """
    names = set(getattr(model, "_no_split_modules", None) or ())
    found = [module for module in model.modules() if type(module).__name__ in names]
    ends: list[Any] = [getattr(model, f"get_{side}_embeddings", lambda: None)() for side in ("input", "output")]
    if None not in ends and ends[0].weight is not ends[1].weight:
        found += ends
    return found


def _receive_(part: nn.Module, device: torch.device, known: dict[int, tuple[Tensor, Tensor]]) -> None:
    """Put the parameters and buffers of ``part`` on ``device``, with the values of rank 0; in place.

    Args:
        known: what was received before, by the old tensor's id, with the old tensor itself, so that its id stays its
            own: tied tensors are received once and stay tied.
    """
    for module in part.modules():
        holders: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for holder in holders:
            for name, tensor in holder.items():
                if tensor is None or isinstance(tensor, DTensor):
                    continue
                if id(tensor) not in known:
                    values = torch.empty_like(tensor, device=device) if tensor.is_meta else tensor.detach().to(device)
                    values = values.contiguous()
                    dist.broadcast(values, src=0)
                    is_parameter = isinstance(tensor, nn.Parameter)
                    received = nn.Parameter(values, tensor.requires_grad) if is_parameter else values
                    known[id(tensor)] = (tensor, received)
                    known[id(received)] = (received, received)
                holder[name] = known[id(tensor)][1]


def _current(mesh: DeviceMesh) -> int:
    return torch.get_device_module(mesh.device_type).current_device()
