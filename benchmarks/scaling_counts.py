"""What benchmarks/scaling.py counts of a model that has shapes and no memory."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM

from benchmarks.scaling_stages import BF16, FP32, Counted, Setup
from usllm.compress import CompressedLinear, compressed_layers, swap_linears_
from usllm.sketch import SketchConfig, build_plan
from usllm.training.sharding import units

SKETCH = SketchConfig(bits_per_weight=0.5, rows=1)


def build(options: dict[str, Any]) -> LlamaForCausalLM:
    """The Llama of these options with its compressed layers, on the meta device."""
    config = LlamaConfig(**{**options, "attn_implementation": "counted"})
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
        swap_linears_(model)
    return model


def counted(model: LlamaForCausalLM, setup: Setup, sketch: SketchConfig = SKETCH) -> Counted:
    """All that the memory of a run follows from."""
    parts, one = [size(unit) for unit in units(model)], model.model.layers[0]
    layers = compressed_layers(one).values()
    return Counted(
        weights=size(model),
        shard=sum(shard(parameter, setup.ranks if setup.sharded else 1) for parameter in model.parameters()),
        block=size(one),
        linears=sizes(one, (nn.Linear, CompressedLinear)),
        compressed=sizes(one, (CompressedLinear,)),
        largest=max(size(layer) for layer in layers),
        head=size(model.lm_head),
        unit=max(parts),
        own=size(model) - sum(parts),
        blocks=model.config.num_hidden_layers,
        hidden=model.config.hidden_size,
        vocabulary=model.config.vocab_size,
        states=state_bytes(model, setup, sketch),
        saved=saved_by_layer(model, setup.context),
        saved_frozen=saved_by_layer(model, setup.context, trained=False),
    )


def state_bytes(model: nn.Module, setup: Setup, sketch: SketchConfig = SKETCH) -> int:
    """States of all layers as the buffers hold them, and the winners of the layers that a rank projects."""
    layers = list(compressed_layers(model).values())
    total = 0
    for number, layer in enumerate(layers):
        states, winners = plan_bytes((layer.out_features, layer.in_features), sketch)
        total += states + layer.in_features * FP32  # E[a²]
        if not setup.sharded or number % setup.ranks == 0:
            total += winners
    return total


@cache
def plan_bytes(shape: tuple[int, int], sketch: SketchConfig = SKETCH) -> tuple[int, int]:
    """Bytes of the states of a layer, and of the winners of its last projection."""
    plan = build_plan(shape, None, sketch, "layer")
    states = sum(tensor.numel() * tensor.element_size() for tensor in plan.state_tensors("meta").values())
    return states, plan.num_states * torch.int16.itemsize


def saved_by_layer(model: LlamaForCausalLM, context: int, trained: bool = True) -> int:
    """Bytes that the forward pass of one decoder layer saves for its backward pass under autocast, weights left out.

    Args:
        context: Tokens.
        trained: Whether the weights get gradients; without, their inputs are not saved.
    """
    config = LlamaConfig(**{**model.config.to_dict(), "num_hidden_layers": 1, "attn_implementation": "counted"})
    saved: dict[int, Tensor] = {}
    with FakeTensorMode():
        single: Any = LlamaForCausalLM(config).requires_grad_(trained)
        layer = single.model.layers[0]
        weights = {parameter.untyped_storage()._cdata for parameter in single.parameters()}

        def keep(tensor: Tensor) -> Tensor:
            if tensor.untyped_storage()._cdata not in weights:
                saved[tensor.untyped_storage()._cdata] = tensor
            return tensor

        hidden = torch.zeros(1, context, config.hidden_size, requires_grad=True)
        angles = single.model.rotary_emb(hidden, torch.arange(context)[None])
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), torch.autocast("cpu"):
            layer(hidden, position_embeddings=angles)
    copied = BF16 * sizes(layer, (nn.Linear,))  # autocast's copies of the weights are counted elsewhere
    return sum(tensor.untyped_storage().nbytes() for tensor in saved.values()) - copied


class _CountedAttention(torch.autograd.Function):
    """What flash attention saves, without computing anything."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = torch.empty_like(query)
        sums = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, output, sums)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        raise NotImplementedError("only counted")


def _attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
    half = (tensor.to(torch.bfloat16) for tensor in (query, key, value))  # as autocast hands them over
    return _CountedAttention.apply(*half).transpose(1, 2), None


AttentionInterface.register("counted", _attention)


def shard(parameter: Tensor, ranks: int) -> int:
    """Elements of the largest shard: output rows are dealt out in runs of equal length."""
    return -(-parameter.shape[0] // ranks) * (parameter.numel() // parameter.shape[0])


def size(module: nn.Module) -> int:
    """Weights of a part."""
    return sum(parameter.numel() for parameter in module.parameters())


def sizes(module: nn.Module, kinds: tuple[type[nn.Module], ...]) -> int:
    """Weights of all parts of some kinds."""
    return sum(size(part) for part in module.modules() if isinstance(part, kinds))
