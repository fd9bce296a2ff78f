"""Memory of finetuning through the sketch on one and on many GPUs: the tables of docs/scaling.md.

python benchmarks/scaling.py [--write]

Builds Llama-3.2-1B, Llama-3.1-8B and Llama-3.1-70B with sketched layers on the meta device, where tensors have shapes
but no memory, and counts bytes: of the parameters as FSDP2 would cut them, of the states of real plans, and of what the
forward pass of a decoder layer saves for the backward pass. --write puts the tables into docs/scaling.md.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a script, it finds only its own folder there

from benchmarks.page_sections import between_markers
from benchmarks.scaling_blocks import OneBlock, rows
from usllm.compress import CompressedLinear, compressed_layers, swap_linears_
from usllm.sketch import SketchConfig, build_plan
from usllm.training.sharding import units

PAGE = Path(__file__).parents[1] / "docs" / "scaling.md"
BEGIN, END = "<!-- tables: benchmarks/scaling.py --write -->", "<!-- end of tables -->"
CONTEXT = 2048
SKETCH = SketchConfig(bits_per_weight=0.5, rows=1)
FP32, BF16 = 4, 2

# What config.json of the models says; the vocabulary and the rest are alike.
_SHARED = {"vocab_size": 128256, "max_position_embeddings": 131072, "head_dim": 128, "num_key_value_heads": 8}
MODELS: dict[str, dict[str, Any]] = {
    "Llama-3.2-1B": {
        **_SHARED,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "head_dim": 64,
        "tie_word_embeddings": True,
    },
    "Llama-3.1-8B": {
        **_SHARED,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
    },
    "Llama-3.1-70B": {
        **_SHARED,
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
    },
}


@dataclass(frozen=True)
class Setup:
    """How a run is laid out: one column of a table."""

    title: str
    ranks: int
    sharded: bool
    checkpointing: bool
    offload: bool = False


SETUPS = (
    Setup("DDP", 8, sharded=False, checkpointing=False),
    Setup("DDP, ckpt", 8, sharded=False, checkpointing=True),
    Setup("FSDP2 x8", 8, sharded=True, checkpointing=False),
    Setup("FSDP2 x8, ckpt", 8, sharded=True, checkpointing=True),
    Setup("FSDP2 x8, ckpt, offload", 8, sharded=True, checkpointing=True, offload=True),
    Setup("FSDP2 x64, ckpt", 64, sharded=True, checkpointing=True),
)


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU, by what they are for; ``host`` is in the memory of the machine, for each GPU."""

    latents: int
    gradients: int
    optimizer: int
    teacher: int
    states: int
    decoded: int
    gathered: int
    activations: int
    host: int = 0

    @property
    def total(self) -> int:
        return sum(getattr(self, field.name) for field in fields(self) if field.name != "host")


ROWS = {
    "latents": "latents and other weights (fp32)",
    "gradients": "gradients (fp32)",
    "optimizer": "AdamW (2 x fp32)",
    "teacher": "teacher (bf16, `objective=distill` only)",
    "states": "states, scales, last winners",
    "decoded": "weights to compute with (bf16)",
    "gathered": "gathered for a moment (fp32)",
    "activations": "activations",
    "total": "**sum per GPU**",
    "host": "host memory per GPU",
}


def build(name: str) -> LlamaForCausalLM:
    """The model with its sketched layers, on the meta device."""
    options: dict[str, Any] = {**MODELS[name], "attn_implementation": "counted"}
    config = LlamaConfig(**options)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
        swap_linears_(model)
    return model


def count(model: LlamaForCausalLM, setup: Setup) -> Memory:
    """Bytes on one GPU under ``setup``, at one sequence of ``CONTEXT`` tokens a micro batch."""
    ranks = setup.ranks if setup.sharded else 1
    weights = sum(_shard(parameter, ranks) for parameter in model.parameters())
    parts = [_size(unit) for unit in units(model)]
    own = _size(model) - sum(parts)
    layer, ends = saved_by_layer(model), logits(model)
    number = model.config.num_hidden_layers
    boundary = CONTEXT * model.config.hidden_size * FP32
    # What waits for the backward pass. Recomputed activations leave the weights of one layer at a time and the head's,
    # but replicas keep all decoded weights from one projection to the next.
    one = model.model.layers[0]
    decoded = _sizes(one if setup.checkpointing and setup.sharded else model, CompressedLinear)
    cast = _sizes(one, nn.Linear) + _size(model.lm_head) if setup.checkpointing else _sizes(model, nn.Linear)
    # A sharded unit and the next one are gathered, one has its whole gradient, and the rest of the model is whole.
    gathered = FP32 * (3 * max(parts) + 2 * own) if setup.sharded else 0
    on_host = FP32 * 4 * weights if setup.offload else 0
    return Memory(
        latents=0 if setup.offload else FP32 * weights,
        gradients=0 if setup.offload else FP32 * weights,
        optimizer=0 if setup.offload else 2 * FP32 * weights,
        teacher=0 if setup.offload else BF16 * weights,
        states=state_bytes(model, setup),
        decoded=BF16 * (decoded + cast),
        gathered=gathered,
        activations=ends + (layer + number * boundary if setup.checkpointing else number * layer),
        host=on_host + (BF16 * weights if setup.offload else 0),
    )


def state_bytes(model: nn.Module, setup: Setup) -> int:
    """States of all layers as the buffers hold them, and the winners of the layers that a rank projects."""
    layers = list(compressed_layers(model).values())
    total = 0
    for number, layer in enumerate(layers):
        states, winners = _plan_bytes((layer.out_features, layer.in_features))
        total += states + layer.in_features * FP32  # E[a²]
        if not setup.sharded or number % setup.ranks == 0:
            total += winners
    return total


@cache
def _plan_bytes(shape: tuple[int, int]) -> tuple[int, int]:
    plan = build_plan(shape, None, SKETCH, "layer")
    states = sum(tensor.numel() * tensor.element_size() for tensor in plan.state_tensors("meta").values())
    return states, plan.num_states * torch.int16.itemsize


def saved_by_layer(model: LlamaForCausalLM) -> int:
    """Bytes that the forward pass of one decoder layer saves for its backward pass, weights left out."""
    config = LlamaConfig(**{**model.config.to_dict(), "num_hidden_layers": 1, "attn_implementation": "counted"})
    with torch.device("meta"):
        single: Any = LlamaForCausalLM(config)
        single.to(torch.bfloat16)  # autocast computes in bf16
        weights = {parameter.untyped_storage()._cdata for parameter in single.parameters()}
        saved: dict[int, Tensor] = {}

        def keep(tensor: Tensor) -> Tensor:
            if tensor.untyped_storage()._cdata not in weights:
                saved[tensor.untyped_storage()._cdata] = tensor
            return tensor

        hidden = torch.zeros(1, CONTEXT, config.hidden_size, dtype=torch.bfloat16, requires_grad=True)
        positions = torch.arange(CONTEXT)[None]
        angles = single.model.rotary_emb(hidden, positions)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            single.model.layers[0](hidden, position_embeddings=angles)
    return sum(tensor.untyped_storage().nbytes() for tensor in saved.values())


def logits(model: LlamaForCausalLM) -> int:
    """Logits and their gradient, bf16."""
    return 2 * CONTEXT * model.config.vocab_size * BF16


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
    return _CountedAttention.apply(query, key, value).transpose(1, 2), None


AttentionInterface.register("counted", _attention)


def _shard(parameter: Tensor, ranks: int) -> int:
    """Elements of the largest shard: output rows are dealt out in runs of equal length."""
    return -(-parameter.shape[0] // ranks) * (parameter.numel() // parameter.shape[0])


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _sizes(module: nn.Module, kind: type[nn.Module]) -> int:
    """Weights of all parts of one kind."""
    return sum(_size(part) for part in module.modules() if isinstance(part, kind))


def tables() -> Iterator[str]:
    """One Markdown table per model, and one of runs that hold one block."""
    for name in MODELS:
        model = build(name)
        found = [count(model, setup) for setup in SETUPS]
        sketched = sum(layer.weight.numel() for layer in compressed_layers(model).values())
        yield f"**{name}**: {_size(model) / 1e9:.2f} billion weights, {sketched / 1e9:.2f} billion of them sketched\n"
        yield "| GB | " + " | ".join(setup.title for setup in SETUPS) + " |"
        yield "|---|" + "---:|" * len(SETUPS)
        for row, title in ROWS.items():
            yield f"| {title} | " + " | ".join(_gigabytes(getattr(memory, row)) for memory in found) + " |"
        yield ""
    yield from rows({name: one_block(build(name)) for name in MODELS})


def one_block(model: LlamaForCausalLM) -> OneBlock:
    """What a run that holds one block of the model is counted by."""
    one = model.model.layers[0]
    layers = list(compressed_layers(one).values())
    blocks = model.config.num_hidden_layers
    return OneBlock(
        weights=_size(one),
        compressed=_sizes(one, CompressedLinear),
        largest=max(_size(layer) for layer in layers),
        states=state_bytes(one, SETUPS[0]),
        activations=saved_by_layer(model),
        hidden=model.config.hidden_size,
        blocks=blocks,
        parameters=_size(model),
        held_states=blocks * sum(_plan_bytes(layer.shape)[0] for layer in layers),
        packed_states=blocks * sum(build_plan(layer.shape, None, SKETCH, "layer").total_bits // 8 for layer in layers),
    )


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.1f}" if count else "0"


def page_with(text: str, content: str) -> str:
    """``text`` with ``content`` between its two markers."""
    return between_markers(text, BEGIN, END, content)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="put the tables into docs/scaling.md")
    content = "\n".join(tables())
    if parser.parse_args().write:
        PAGE.write_text(page_with(PAGE.read_text(encoding="utf-8"), content), encoding="utf-8")
    else:
        print(content)


if __name__ == "__main__":
    main()
