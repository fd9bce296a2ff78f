"""What is exported: the tensors of a sketched model, from a checkpoint on disk or from a model in memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from usllm.compress import sketched_layers
from usllm.sketch import Plan, SketchConfig
from usllm.sketch.codec import States
from usllm.system.errors import UserError


@dataclass(frozen=True)
class PackingSource:
    """A sketched model as names, plans and tensors; the tensors may lie on disk until they are asked for.

    Attributes:
        tensors: State dict of the model with its sketched layers.
        plans: Plan of each sketched layer by module name.
        sketch: Configuration that all of them share.
    """

    tensors: Mapping[str, Tensor]
    plans: Mapping[str, Plan]
    sketch: SketchConfig

    def states(self, name: str) -> States:
        """The states of one sketched layer.

        Raises:
            UserError: They are missing or do not fit the plan.
        """
        states = {}
        for key, empty in self.plans[name].state_tensors("meta").items():
            tensor = self.tensors.get(f"{name}.state_{key}")
            if tensor is None or tensor.shape != empty.shape:
                raise UserError(f"{name}: its states do not fit its plan; the checkpoint is damaged")
            states[key] = tensor
        return states


def from_checkpoint(saved: Mapping[str, Any], section: Mapping[str, Any]) -> PackingSource:
    """The model of a checkpoint of ``usllm-train``, loaded with its tensors left on disk.

    Args:
        saved: The checkpoint.
        section: Its part written by usllm: plans, sketch, patterns.

    Raises:
        UserError: It is that of a run that finetuned the dense model.
    """
    if not section["plans"]:
        raise UserError(
            "the checkpoint's model is dense: it was trained without calibration, there is no sketch to pack"
        )
    sketch = SketchConfig(**section["sketch"])
    prefix = "model."
    tensors = {name[len(prefix) :]: tensor for name, tensor in saved["state_dict"].items() if name.startswith(prefix)}
    plans = {}
    for name, stored in section["plans"].items():
        weight = tensors.get(f"{name}.weight")
        if weight is None:
            raise UserError(f"{name}: its weight is missing; the checkpoint is damaged")
        plans[name] = Plan.from_tensors(stored, (weight.shape[0], weight.shape[1]), sketch, name)
    return PackingSource(tensors, plans, sketch)


def from_model(model: nn.Module) -> PackingSource:
    """A model whose sketched layers are planned and projected.

    Raises:
        UserError: It has no such layers.
    """
    plans = {name: layer.plan for name, layer in sketched_layers(model).items() if layer.plan is not None}
    if not plans:
        raise UserError(f"{type(model).__name__} has no sketched layers: call usllm.compress.compress_ first")
    return PackingSource(model.state_dict(), plans, next(iter(plans.values())).config)
