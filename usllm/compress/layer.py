"""A linear layer that computes with its compressed form and learns through it, whatever the method."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional

from usllm.compress.base import LayerPlan
from usllm.compress.values import compute_dtype


class Reprojection(NamedTuple):
    """What a projection changed; fp32 scalars on the layer's device, so that reading them is the caller's choice.

    Attributes:
        winner_change: Share of states that have changed (of buckets whose winning member has, where the operator keeps
            members); 0 for a first projection.
        relative_error: ``‖decoded - latent‖² / ‖latent‖²``, channels weighted by importance.
    """

    winner_change: Tensor
    relative_error: Tensor


class CompressedLinear(nn.Module):
    """``y = x Ŵᵀ + b`` with ``Ŵ`` as its plan's states decode; gradients go straight through to the latents.

    Until a plan is set the layer is the dense layer of its one latent, ``weight``. A plan may bring latents of its own
    (:meth:`LayerPlan.latent_specs`), which then take the weight's place. Where a method stores its states they are
    persistent buffers that change only in :meth:`reproject`; elsewhere they follow the latents in each forward pass. A
    decoded weight is kept, in the dtype it is computed with, until what it was decoded from changes; one that follows
    latents which are being trained is decoded anew in each forward pass.

    Args:
        linear: The dense layer; its weight becomes the fp32 latent weight [out, in], its bias is kept.
        name: Stable name, known to the method (part of the sketch's hash key).

    Attributes:
        keeps_decoded: Whether the decoded weight is kept; if not, every forward pass decodes it anew, on a card a slab
            at a time. Off where the latents are sharded: the decoded weights of all layers would be as large as the
            model.
        ramp: Share of the decoded weight in what is computed with; the rest is the latent one. 1 but for the first
            steps of a reconstruction, which a method whose latents are other tensors does without.
    """

    importance: Tensor

    def __init__(self, linear: nn.Linear, name: str) -> None:
        super().__init__()
        self.name = name
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight = linear.weight
        self.trains = weight.requires_grad
        self.weight = nn.Parameter(weight.detach().float(), requires_grad=self.trains)
        self.bias = linear.bias
        self.plan: LayerPlan | None = None
        self.register_buffer("importance", torch.ones(linear.in_features, device=weight.device))
        self._latent_names: tuple[str, ...] = ("weight",)
        self._state_names: tuple[str, ...] = ()
        self.keeps_decoded, self.ramp = True, 1.0
        self._decoded: Tensor | None = None
        self._decoded_as = torch.float32
        self._decoded_at: tuple[int, ...] = ()
        self._memory: Tensor | None = None
        self._projected = False

    @property
    def shape(self) -> tuple[int, int]:
        """``(out, in)`` of the weight, whatever the latents are."""
        return self.out_features, self.in_features

    @property
    def latents(self) -> dict[str, Tensor]:
        """The trained tensors that carry the weight, by name."""
        return {name: self.get_parameter(name) for name in self._latent_names}

    @property
    def states(self) -> dict[str, Tensor]:
        """The stored states, named as in :meth:`LayerPlan.state_specs`; none where they follow the latents."""
        return {name: self.get_buffer(f"state_{name}") for name in self._state_names}

    @property
    def kept_decoded(self) -> Tensor | None:
        """The decoded weight that is kept, in the type it is computed with; of the states as they are."""
        return self._decoded

    @kept_decoded.setter
    def kept_decoded(self, decoded: Tensor | None) -> None:
        self._decoded, self._decoded_at = decoded, self._latents_version()

    def places(self) -> tuple[object, ...]:
        """Where a projection reads and writes, and in which types: what must stay for it to be replayed as a graph."""
        latents = (self._parameters[name] for name in self._latent_names)
        states = (self._buffers[f"state_{name}"] for name in self._state_names)
        tensors = (*latents, *states, self.importance, self._memory)
        where = (None if each is None else (each.data_ptr(), each.dtype, each.stride()) for each in tensors)
        return self.plan, *where, self._decoded_as, self._projected, self.keeps_decoded

    def set_plan(
        self, plan: LayerPlan, importance: Tensor | None = None, latents: Mapping[str, Tensor] | None = None
    ) -> None:
        """Take over a plan and make room for its states; call :meth:`reproject` or load a state dict to fill them.

        Args:
            plan: A plan for this layer's shape.
            importance: E[a²] per input channel, [in]; ``None`` keeps the present values.
            latents: What :meth:`LayerPlan.start` gave; ``None`` keeps the latents where they are those that the plan
                asks for, and makes room for a state dict where they are not.

        Raises:
            ValueError: If the plan is for another shape.
        """
        if plan.shape != self.shape:
            raise ValueError(f"{self.name}: the plan is for {plan.shape}, the weight is {self.shape}")
        self._set_latents(plan, latents)
        for name in self._state_names:
            delattr(self, f"state_{name}")
        specs = plan.state_specs() if plan.stored_states else {}
        for name, spec in specs.items():
            self.register_buffer(
                f"state_{name}", torch.zeros(spec.shape, dtype=spec.dtype, device=self.importance.device)
            )
        self._state_names = tuple(specs)
        self.plan, self._decoded, self._projected, self._memory = plan, None, False, None
        if importance is not None:
            self.importance.copy_(importance)

    def _set_latents(self, plan: LayerPlan, latents: Mapping[str, Tensor] | None) -> None:
        specs = plan.latent_specs()
        present = {name: tuple(latent.shape) for name, latent in self.latents.items()}
        if latents is None and present == {name: spec.shape for name, spec in specs.items()}:
            return
        device = self.get_parameter(self._latent_names[0]).device
        for name in self._latent_names:
            delattr(self, name)
        for name, spec in specs.items():
            # Row-major, as restored ones are: sums over another layout round otherwise, and a resumed run would part
            # from one that was left alone.
            values = torch.empty(spec.shape, dtype=spec.dtype, device=device)
            if latents is not None:
                values.copy_(latents[name].detach().view(spec.shape))
            self.register_parameter(name, nn.Parameter(values, self.trains))
        self._latent_names = tuple(specs)

    @torch.inference_mode(False)  # the decoded weight is kept for training, see _decoded_for
    @torch.no_grad()
    def reproject(self, latents: Mapping[str, Tensor] | None = None) -> Reprojection:
        """Stored states follow the latents.

        Args:
            latents: The whole latents, where the layer holds only a shard of them.

        Raises:
            RuntimeError: If no plan was set.
        """
        plan = self._planned()
        latents = self.latents if latents is None else latents
        device = self.importance.device
        kept = self.keeps_decoded and plan.multiplies_decoded(device.type, kept=True)
        dtype = self._decoded_as if kept else None  # what the next forward pass will ask for
        self._decoded = None  # makes room for the next one
        before, memory = (self.states, self._memory) if self._projected else (None, None)
        encoded = plan.encode(latents, self.importance, decode_dtype=dtype, before=before, memory=memory)
        if self._memory is None or encoded.memory is None:
            self._memory = encoded.memory
        else:  # in its place, where a graph finds it again
            self._memory.copy_(encoded.memory)
        for name in self._state_names:
            self.get_buffer(f"state_{name}").copy_(encoded.states[name])
        self._projected = True
        if kept and encoded.decoded is not None:
            self._decoded, self._decoded_at = encoded.decoded, self._latents_version()
        error = torch.zeros((), device=device) if encoded.error is None else encoded.error
        return Reprojection(encoded.change, error)

    @torch.no_grad()
    def states_arrived(self) -> None:
        """To be called when the states were overwritten with those of another projection of the same latents."""
        self._decoded, self._projected = None, True

    @torch.no_grad()
    def recall_memory(self, latents: Mapping[str, Tensor] | None = None) -> None:
        """After a state dict was loaded, find again what the next projection compares with, from the same latents."""
        if self.plan is not None and self.plan.stored_states and self._memory is None:
            self._memory = self.plan.recall(self.latents if latents is None else latents, self.importance)

    @torch.no_grad()
    def current_states(self) -> dict[str, Tensor]:
        """The states, stored or computed from the latents; a sharded layer's are gathered, which all ranks must do.

        Raises:
            RuntimeError: If no plan was set.
        """
        plan = self._planned()
        return self.states if plan.stored_states else plan.encode(self.whole_latents(), self.importance).states

    def whole_latents(self) -> dict[str, Tensor]:
        """The latents, detached and fp32; sharded ones are gathered, which all ranks must do."""
        found = {name: latent.detach() for name, latent in self.latents.items()}
        return {name: (v.full_tensor() if isinstance(v, DTensor) else v).float() for name, v in found.items()}

    def latent_weight(self) -> Tensor:
        """The whole latent weight, detached, fp32 [out, in].

        Raises:
            RuntimeError: If no latent is the weight.
        """
        if "weight" not in self._latent_names:
            raise RuntimeError(f"{self.name}: its latents are {', '.join(self._latent_names)}, not one weight")
        return self.whole_latents()["weight"]

    def decoded_weight(self) -> Tensor:
        """What the states decode to, fp32 [out, in]; the latent weight while there is no plan."""
        return self.latent_weight() if self.plan is None else self.plan.decode(self.current_states())

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., in] to [..., out]."""
        if self.plan is None:
            return functional.linear(x, self.weight, self.bias)
        ramping = self.ramp < 1 and "weight" in self._latent_names
        decodes = ramping or self.plan.multiplies_decoded(x.device.type, kept=self.keeps_decoded)
        decoded = self._decoded_for(self.plan, x) if decodes else None
        if ramping and decoded is not None:
            decoded = self.weight.detach().lerp(decoded.float(), self.ramp).to(decoded.dtype)
        return self.plan.linear(x, self.states, self.latents, self.bias, decoded=decoded)

    def _decoded_for(self, plan: LayerPlan, x: Tensor) -> Tensor:
        dtype = compute_dtype(x)
        version, kept = self._latents_version(), self._decoded
        # A fused optimizer leaves the latents' version as it was: what may be trained next is not worth keeping.
        moving = not plan.stored_states and any(
            latent.grad is not None or (torch.is_grad_enabled() and latent.requires_grad)
            for latent in self.latents.values()
        )
        if moving or self._decoded_at != version:
            kept = self._decoded = None
        if kept is not None and kept.dtype == dtype and kept.device == x.device:
            return kept
        # Training may be next: what inference mode makes could not be saved for its backward pass.
        with torch.inference_mode(False), torch.no_grad():
            if kept is None or kept.dtype != torch.float32 or kept.device != x.device:
                stored = plan.stored_states
                kept = plan.decode(self.states) if stored else plan.decode_latents(self.latents, self.importance)
            decoded = kept.to(dtype)
        if self.keeps_decoded and not moving:
            self._decoded, self._decoded_as, self._decoded_at = decoded, dtype, version
        return decoded

    def _latents_version(self) -> tuple[int, ...]:
        """What changes when the kept decoded weight no longer is that of the layer, besides :meth:`reproject`."""
        if self.plan is None or self.plan.stored_states:
            return ()
        return tuple(number for latent in self.latents.values() for number in (latent._version, latent.data_ptr()))

    def _planned(self) -> LayerPlan:
        if self.plan is None:
            raise RuntimeError(f"{self.name} has no plan yet: calibrate and allocate first")
        return self.plan

    def _load_from_state_dict(self, *args: object, **kwargs: object) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._decoded, self._memory, self._projected = None, None, self.plan is not None

    def extra_repr(self) -> str:
        text = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        return f"{text}, bits_per_weight={self.plan.bits_per_weight:.4f}" if self.plan else text


def compressed_layers(model: nn.Module) -> dict[str, CompressedLinear]:
    """All compressed layers of a model by stable name, in module order."""
    return {module.name: module for module in model.modules() if isinstance(module, CompressedLinear)}
