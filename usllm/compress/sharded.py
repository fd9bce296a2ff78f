"""Work on sharded latent weights: each rank projects its share of the layers, all get the states; gradients likewise.

FSDP2 cuts a weight [out, in] into runs of output rows, and cuts groups with it. So a weight is gathered for its
projection, on one rank only: in each turn every rank receives the shards of one layer, its own of that turn, projects
it, and sends the states, which are small, to the others. A rank holds one whole latent weight at a time, the work is
split over the ranks, and of all latents it receives only its share.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from usllm.compress.layer import CompressedLinear, Reprojection


class Turn(NamedTuple):
    """One turn: as many layers as there are ranks, or fewer in the last one; the rank of a layer is its position.

    Attributes:
        layers: The layers.
        owners: Global ranks.
        mine: The layer of this rank, if it has one.
        latent: Its whole latent weight, or the gradient of it, fp32 [out, in].
        others: Its other latents, whole.
    """

    layers: Sequence[CompressedLinear]
    owners: Sequence[int]
    mine: CompressedLinear | None
    latent: Tensor | None
    others: Mapping[str, Tensor]

    @property
    def latents(self) -> dict[str, Tensor]:
        """All latents of the layer of this rank."""
        assert self.latent is not None
        return {"weight": self.latent, **self.others}


def is_sharded(layers: Mapping[str, CompressedLinear]) -> bool:
    """Whether the latents are spread over ranks."""
    return any(isinstance(latent, DTensor) for layer in layers.values() for latent in layer.latents.values())


def reproject_sharded(layers: Mapping[str, CompressedLinear]) -> dict[str, Reprojection]:
    """Project all layers; every rank ends with the same states and the same account of what changed."""
    changes: dict[str, Reprojection] = {}
    for turn in _turns(layers):
        done = None
        if turn.mine is not None:
            done = turn.mine.reproject(turn.latents)
        for layer, owner in zip(turn.layers, turn.owners, strict=True):
            account = torch.zeros(2, device=layer.importance.device)
            if layer is turn.mine:
                assert done is not None
                account = torch.stack([value.float() for value in done])
            _broadcast_([*layer.states.values(), account], owner)
            if layer is not turn.mine:
                layer.states_arrived()
            changes[layer.name] = Reprojection(*account.unbind())
    return changes


def spread_sharded_(layers: Mapping[str, CompressedLinear]) -> None:
    """What :meth:`LayerPlan.spread_` does, for the gradients of all layers: a shard's edges cut groups."""
    for turn in _turns(layers, _gradient):
        if turn.mine is not None and turn.mine.plan is not None and turn.latent is not None:
            turn.mine.plan.spread_({"weight": turn.latent}, turn.mine.states)
        _scatter_(turn, _gradient)


def channel_energy_sharded(layers: Mapping[str, CompressedLinear]) -> dict[str, Tensor]:
    """E[w²] per input channel of each layer, fp32 [in], as :func:`channel_energy` gives it for a whole weight."""
    energies: dict[str, Tensor] = {}
    for turn in _turns(layers):
        for layer, owner in zip(turn.layers, turn.owners, strict=True):
            energy = torch.zeros(layer.in_features, device=layer.importance.device)
            if layer is turn.mine:
                assert turn.latent is not None
                energy = channel_energy(turn.latent)
            _broadcast_([energy], owner)
            energies[layer.name] = energy
    return energies


def channel_energy(latent: Tensor) -> Tensor:
    """E[w²] per input channel of ``latent`` [out, in], fp32 [in]."""
    return latent.detach().float().square().mean(0)


def for_own_layers(
    work: Callable[[CompressedLinear, dict[str, Tensor]], object], layers: Mapping[str, CompressedLinear]
) -> None:
    """``work(layer, latents)`` for the layers that this rank projects."""
    for turn in _turns(layers):
        if turn.mine is not None:
            work(turn.mine, turn.latents)


def _latent(layer: CompressedLinear) -> Tensor:
    return layer.weight


def _gradient(layer: CompressedLinear) -> Tensor:
    assert layer.weight.grad is not None
    return layer.weight.grad


def _turns(
    layers: Mapping[str, CompressedLinear], of: Callable[[CompressedLinear], Tensor] = _latent
) -> Iterator[Turn]:
    everything = list(layers.values())
    if not everything:
        return
    weight = everything[0].weight
    assert isinstance(weight, DTensor)
    group = weight.device_mesh.get_group()
    members = dist.get_process_group_ranks(group)
    for first in range(0, len(everything), len(members)):
        chunk = everything[first : first + len(members)]
        position = dist.get_rank(group)
        mine = chunk[position] if position < len(chunk) else None
        others = [_others(layer) if of is _latent else {} for layer in chunk]  # asked of all ranks
        latent = _gather(chunk, of, position, members, group)
        yield Turn(chunk, members[: len(chunk)], mine, latent, {} if mine is None else others[position])


@torch.no_grad()
def _others(layer: CompressedLinear) -> dict[str, Tensor]:
    """Latents besides the weight, which are small, gathered on every rank."""
    found = {name: latent.detach() for name, latent in layer.latents.items() if name != "weight"}
    return {name: latent.full_tensor() if isinstance(latent, DTensor) else latent for name, latent in found.items()}


@torch.no_grad()
def _gather(
    chunk: Sequence[CompressedLinear],
    of: Callable[[CompressedLinear], Tensor],
    position: int,
    members: Sequence[int],
    group: dist.ProcessGroup,
) -> Tensor | None:
    """Send this rank's rows of every layer to its owner; the whole weight of this rank's own layer."""
    whole: Tensor | None = None
    transfers = []
    for owner, layer in enumerate(chunk):
        weight = of(layer)
        if not isinstance(weight, DTensor) or tuple(weight.placements) != (Shard(0),):
            raise RuntimeError(f"{layer.name}: sketched layers can be sharded by output rows only (FSDP2's default)")
        local = weight.to_local().detach().to(layer.importance.device).float().contiguous()
        if owner != position:
            if local.numel():
                transfers.append(dist.P2POp(dist.isend, local, members[owner], group))
            continue
        whole = local.new_empty(tuple(weight.shape))
        per_rank = -(-weight.shape[0] // len(members))
        for peer, rows in enumerate(whole.split(per_rank)):
            if peer == position:
                rows.copy_(local)
            else:
                transfers.append(dist.P2POp(dist.irecv, rows, members[peer], group))
    for request in dist.batch_isend_irecv(transfers) if transfers else ():
        request.wait()
    return whole


@torch.no_grad()
def _scatter_(turn: Turn, of: Callable[[CompressedLinear], Tensor]) -> None:
    """Give every rank its rows of the layers that others hold whole, and this one its own; what was gathered before."""
    transfers, received = [], []
    for owner, layer in zip(turn.owners, turn.layers, strict=True):
        sharded = of(layer)
        assert isinstance(sharded, DTensor)
        group = sharded.device_mesh.get_group()
        members, local = dist.get_process_group_ranks(group), sharded.to_local()
        if layer is not turn.mine:
            if local.numel():
                rows = torch.empty_like(local, device=layer.importance.device, dtype=torch.float32)
                transfers.append(dist.P2POp(dist.irecv, rows, owner, group))
                received.append((local, rows))
            continue
        assert turn.latent is not None
        per_rank = -(-sharded.shape[0] // len(members))
        for peer, rows in zip(members, turn.latent.split(per_rank), strict=False):
            if peer == owner:
                local.copy_(rows)
            else:
                transfers.append(dist.P2POp(dist.isend, rows, peer, group))
    for request in dist.batch_isend_irecv(transfers) if transfers else ():
        request.wait()
    for local, rows in received:
        local.copy_(rows)


def _broadcast_(tensors: Sequence[Tensor], source: int) -> None:
    """Overwrite ``tensors`` with those of the rank ``source``, in one message."""
    message = torch.cat([tensor.reshape(-1).view(torch.uint8) for tensor in tensors])
    dist.broadcast(message, source)
    if dist.get_rank() == source:
        return
    parts = message.split([tensor.numel() * tensor.element_size() for tensor in tensors])
    for tensor, part in zip(tensors, parts, strict=True):
        tensor.copy_(part.clone().view(tensor.dtype).view(tensor.shape))  # a copy, because a view must be aligned
