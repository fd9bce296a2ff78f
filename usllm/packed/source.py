"""What is exported: the tensors of a sketched model, from a checkpoint on disk or from a model in memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from usllm.compress import Compressor, LayerPlan, Spec, compressed_layers
from usllm.compress.registry import from_checkpoint_section
from usllm.system.errors import UserError


@dataclass(frozen=True)
class PackingSource:
    """A compressed model as names, plans and tensors; the tensors may lie on disk until they are asked for.

    Attributes:
        tensors: State dict of the model with its compressed layers.
        plans: Plan of each compressed layer by module name.
        compressor: Method and configuration that all of them share.
    """

    tensors: Mapping[str, Tensor]
    plans: Mapping[str, LayerPlan]
    compressor: Compressor

    def states(self, name: str) -> dict[str, Tensor]:
        """The states of one compressed layer, stored or computed from its latents.

        Raises:
            UserError: They are missing or do not fit the plan.
        """
        plan = self.plans[name]
        if plan.stored_states:
            return self._held(name, plan.state_specs(), "state_")
        latents = self._held(name, plan.latent_specs(), "")
        energy = self.tensors.get(f"{name}.importance")
        return plan.encode({key: tensor.float() for key, tensor in latents.items()}, energy).states

    def _held(self, name: str, specs: Mapping[str, Spec], prefix: str) -> dict[str, Tensor]:
        held = {}
        for key, spec in specs.items():
            tensor = self.tensors.get(f"{name}.{prefix}{key}")
            if tensor is None or tuple(tensor.shape) != spec.shape:
                raise UserError(f"{name}: its {spec.role}s do not fit its plan; the checkpoint is damaged")
            held[key] = tensor
        return held


def from_checkpoint(saved: Mapping[str, Any], section: Mapping[str, Any]) -> PackingSource:
    """The model of a checkpoint of ``usllm-train``, loaded with its tensors left on disk.

    Args:
        saved: The checkpoint.
        section: Its part written by usllm: plans, compressor, patterns.

    Raises:
        UserError: It is that of a run that finetuned the dense model.
    """
    if not section["plans"]:
        raise UserError(
            "the checkpoint's model is dense: it was trained without calibration, there is nothing compressed to pack"
        )
    compressor = from_checkpoint_section(section)
    prefix = "model."
    tensors = {name[len(prefix) :]: tensor for name, tensor in saved["state_dict"].items() if name.startswith(prefix)}
    shapes = section.get("shapes", {})  # checkpoints of the first format hold sketches, whose latent has the shape
    plans = {}
    for name, stored in section["plans"].items():
        shape = shapes.get(name) or tuple(tensors.get(f"{name}.weight", torch.empty(0)).shape)
        if len(shape) != 2:
            raise UserError(f"{name}: its weight is missing; the checkpoint is damaged")
        plans[name] = compressor.restore(stored, (int(shape[0]), int(shape[1])), name)
    return PackingSource(tensors, plans, compressor)


def from_model(model: nn.Module) -> PackingSource:
    """A model whose compressed layers are planned and projected.

    Raises:
        UserError: It has no such layers.
    """
    plans = {name: layer.plan for name, layer in compressed_layers(model).items() if layer.plan is not None}
    if not plans:
        raise UserError(f"{type(model).__name__} has no compressed layers: call usllm.compress.compress_ first")
    return PackingSource(model.state_dict(), plans, next(iter(plans.values())).compressor)
