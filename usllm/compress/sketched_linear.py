"""A linear layer that computes with its sketch and learns through it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional

from usllm.compress.straight_through import straight_through
from usllm.sketch import Plan
from usllm_kernels import project, project_query, query, sketch_linear

# Devices where one decoded copy serves all passes until the next projection: on the CPU decoding twice more a step
# would show. Elsewhere products are made straight from the states.
DECODED_ON = frozenset({"cpu"})


class Reprojection(NamedTuple):
    """What a projection changed; fp32 scalars on the layer's device, so that reading them is the caller's choice.

    Attributes:
        winner_change: Share of buckets whose winning member changed (for operators without winners: share of states
            whose code changed); 0 for a first projection.
        relative_error: ``‖decoded - latent‖² / ‖latent‖²``, channels weighted by importance.
    """

    winner_change: Tensor
    relative_error: Tensor


class SketchedLinear(nn.Module):
    """``y = x Ŵᵀ + b`` with ``Ŵ = query(states)``; the gradient of Ŵ goes straight to the latent weight.

    Until a plan is set the layer is the dense layer of its latent weight. States are persistent buffers that change
    only in :meth:`reproject`, so the forward weight stays between re-projections. The decoded weight is kept, in the
    dtype it is computed with, until the states change.

    Args:
        linear: The dense layer; its weight becomes the fp32 latent weight [out, in], its bias is kept.
        name: Stable name, part of the hash key.

    Attributes:
        keeps_decoded: Whether the decoded weight is kept; if not, every forward pass decodes it anew. Off where the
            latents are sharded: the decoded weights of all layers would be as large as the model.
    """

    importance: Tensor

    def __init__(self, linear: nn.Linear, name: str) -> None:
        super().__init__()
        self.name = name
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight = linear.weight
        self.weight = nn.Parameter(weight.detach().float(), requires_grad=weight.requires_grad)
        self.bias = linear.bias
        self.plan: Plan | None = None
        self.register_buffer("importance", torch.ones(linear.in_features, device=weight.device))
        self._state_names: tuple[str, ...] = ()
        self.keeps_decoded = True
        self._decoded: Tensor | None = None
        self._winners: Tensor | None = None
        self._projected = False

    @property
    def states(self) -> dict[str, Tensor]:
        """The states, named as in :meth:`usllm.sketch.Plan.state_tensors`."""
        return {name: self.get_buffer(f"state_{name}") for name in self._state_names}

    def set_plan(self, plan: Plan, importance: Tensor | None = None) -> None:
        """Take over a plan and make room for its states; call :meth:`reproject` or load a state dict to fill them.

        Args:
            plan: A plan for this weight's shape.
            importance: E[a²] per input channel, [in]; ``None`` keeps the present values.

        Raises:
            ValueError: If the plan is for another shape.
        """
        if plan.shape != tuple(self.weight.shape):
            raise ValueError(f"{self.name}: the plan is for {plan.shape}, the weight is {tuple(self.weight.shape)}")
        for name in self._state_names:
            delattr(self, f"state_{name}")
        states = plan.state_tensors(self.importance.device)
        for name, tensor in states.items():
            self.register_buffer(f"state_{name}", tensor)
        self._state_names = tuple(states)
        self.plan, self._decoded, self._projected, self._winners = plan, None, False, None
        if importance is not None:
            self.importance.copy_(importance)

    @torch.inference_mode(False)  # the decoded weight is kept for training, see _compute_weight
    @torch.no_grad()
    def reproject(self, latent: Tensor | None = None) -> Reprojection:
        """States follow the latent weight.

        Args:
            latent: The whole latent weight [out, in], where the layer holds only a shard of it.

        Raises:
            RuntimeError: If no plan was set.
        """
        if self.plan is None:
            raise RuntimeError(f"{self.name} has no plan yet: calibrate and allocate first")
        latent = self.weight if latent is None else latent
        winners = self._room_for_winners(self.plan)
        sums = torch.empty(2, self.in_features, device=self.importance.device)
        kept = self.keeps_decoded and latent.device.type in DECODED_ON
        dtype = torch.bfloat16  # of what is dropped: the least to write
        if kept:  # what the next forward pass will ask for
            dtype = torch.float32 if self._decoded is None else self._decoded.dtype
        self._decoded = None  # makes room for the next one
        fresh, decoded = project_query(latent, self.plan, self.importance, dtype=dtype, winners=winners, sums=sums)
        before, now = self._winners, winners
        if now is None:
            before, now = self.get_buffer("state_codes"), fresh["codes"]
        change = torch.zeros((), device=now.device)
        if self._projected and before is not None:
            change = (now != before).sum() / max(now.numel(), 1)
        self._winners = winners
        for name, tensor in fresh.items():
            self.get_buffer(f"state_{name}").copy_(tensor)
        self._projected = True
        self._decoded = decoded if kept else None
        error, energy = sums @ self.importance
        return Reprojection(change, error / energy.clamp_min(1e-30))

    @torch.no_grad()
    def states_arrived(self) -> None:
        """To be called when the states were overwritten with those of another projection of the same latent weight."""
        self._decoded, self._projected = None, True

    @torch.no_grad()
    def recall_winners(self, latent: Tensor | None = None) -> None:
        """After a state dict was loaded, find the winners of its states again; its latents are those they came from."""
        if self.plan is not None and self._winners is None:
            winners = self._room_for_winners(self.plan)
            if winners is not None:
                project(self.weight if latent is None else latent, self.plan, self.importance, winners=winners)
            self._winners = winners

    def _room_for_winners(self, plan: Plan) -> Tensor | None:
        if not plan.operator.keeps_member:
            return None
        return torch.zeros(plan.num_states, dtype=torch.int16, device=self.importance.device)

    def latent_weight(self) -> Tensor:
        """The whole latent weight, detached, fp32 [out, in]; a sharded one is gathered, which all ranks must do."""
        weight = self.weight.detach()
        return (weight.full_tensor() if isinstance(weight, DTensor) else weight).float()

    def decoded_weight(self) -> Tensor:
        """``query(states)``, fp32 [out, in]; the latent weight while there is no plan."""
        return self.latent_weight() if self.plan is None else query(self.states, self.plan)

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., in] to [..., out]."""
        if self.plan is None:
            return functional.linear(x, self.weight, self.bias)
        if x.device.type not in DECODED_ON:  # nothing decoded is kept, for the backward pass neither
            return sketch_linear(x, self.states, self.plan, self.bias, weight=self.weight)
        return functional.linear(x, straight_through(self.weight, self._compute_weight(x)), self.bias)

    def _compute_weight(self, x: Tensor) -> Tensor:
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        kept = self._decoded
        if kept is not None and kept.dtype == dtype and kept.device == x.device:
            return kept
        # Training may be next: what inference mode makes could not be saved for its backward pass.
        with torch.inference_mode(False), torch.no_grad():
            if kept is None or kept.dtype != torch.float32 or kept.device != x.device:
                assert self.plan is not None
                kept = query(self.states, self.plan)
            decoded = kept.to(dtype)
        self._decoded = decoded if self.keeps_decoded else None
        return decoded

    def _load_from_state_dict(self, *args: object, **kwargs: object) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._decoded, self._winners, self._projected = None, None, self.plan is not None

    def extra_repr(self) -> str:
        text = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        return f"{text}, bits_per_weight={self.plan.bits_per_weight:.4f}" if self.plan else text


def sketched_layers(model: nn.Module) -> dict[str, SketchedLinear]:
    """All sketched layers of a model by stable name, in module order."""
    return {module.name: module for module in _sketched(model)}


def _sketched(model: nn.Module) -> Iterator[SketchedLinear]:
    return (module for module in model.modules() if isinstance(module, SketchedLinear))
