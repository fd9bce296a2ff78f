"""What a model's parameters are for: those that carry compressed weights, the scales of their methods, all others."""

from __future__ import annotations

from torch import nn

from usllm.compress.layer import compressed_layers

KINDS = ("latents", "scales", "rest")
"""Names of parameter groups. A learning rate that suits one of them is wrong for another (`docs/method.md` §5)."""

_OF_ROLE = {"latent": "latents", "scale": "scales"}


def parameter_kinds(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Every parameter of a model, or of a part of it, with its kind, in the model's order; tied ones come once.

    A layer that has no plan yet is the dense layer of its one latent.
    """
    roles: dict[int, str] = {}
    for layer in compressed_layers(model).values():
        specs = {} if layer.plan is None else layer.plan.latent_specs()
        for name, latent in layer.latents.items():
            roles[id(latent)] = _OF_ROLE[specs[name].role] if name in specs else "latents"
    return [(roles.get(id(parameter), "rest"), parameter) for parameter in model.parameters()]
