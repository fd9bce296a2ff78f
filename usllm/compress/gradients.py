"""Gradients between the backward pass and the optimizer."""

from __future__ import annotations

import torch
from torch import nn

from usllm.compress.layer import CompressedLinear, compressed_layers
from usllm.compress.parallel import over_layers
from usllm.compress.sharded import is_sharded, spread_sharded_
from usllm.system.ranks import sum_over_ranks_


def spread_gradients_(model: nn.Module) -> None:
    """What each layer's method makes of the straight-through gradients of its latents (:meth:`LayerPlan.spread_`).

    To be called once for each optimizer step, after gradients are summed over micro batches and ranks, before they are
    clipped. Layers whose method leaves them as they are cost nothing.
    """
    layers = {name: layer for name, layer in compressed_layers(model).items() if _has_work(layer)}
    if is_sharded(layers):
        spread_sharded_(layers)
    else:
        over_layers(_spread_, layers)


def sum_gradients_(model: nn.Module) -> None:
    """The gradients of all ranks added up, of copies of a model that each saw other sequences."""
    for parameter in model.parameters():
        if parameter.grad is not None:
            sum_over_ranks_(parameter.grad)


def _has_work(layer: CompressedLinear) -> bool:
    return layer.plan is not None and layer.plan.spreads and all(v.grad is not None for v in layer.latents.values())


@torch.no_grad()
def _spread_(layer: CompressedLinear) -> None:
    assert layer.plan is not None
    gradients = {name: latent.grad for name, latent in layer.latents.items() if latent.grad is not None}
    layer.plan.spread_(gradients, layer.states)
