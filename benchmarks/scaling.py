"""Memory of a run through the sketch on one and on many GPUs: the tables of docs/scaling.md.

python benchmarks/scaling.py [--write] [--check]

Builds Llama-3.2-1B, Llama-3.1-8B and Llama-3.1-70B with sketched layers on the meta device, where tensors have shapes
but no memory, and counts bytes: of the parameters as FSDP2 would cut them, of the states of real plans, and of what the
forward pass of a decoder layer saves for the backward pass. --write puts the tables into docs/scaling.md; --check runs
small models on the CPU, and compares what they held at most with what is counted of them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a script, it finds only its own folder there

from benchmarks.page_sections import between_markers
from benchmarks.scaling_blocks import OneBlock, rows
from benchmarks.scaling_counts import SKETCH, build, counted, plan_bytes, saved_by_layer, size, sizes, state_bytes
from benchmarks.scaling_stages import OBJECTIVES, Counted, Setup, finetune, stages
from usllm.compress import CompressedLinear, compressed_layers
from usllm.sketch import build_plan

PAGE = Path(__file__).parents[1] / "docs" / "scaling.md"
BEGIN, END = "<!-- tables: benchmarks/scaling.py --write -->", "<!-- end of tables -->"

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


SETUPS = (
    Setup("DDP", 8, sharded=False, checkpointing=False),
    Setup("DDP, ckpt", 8, sharded=False, checkpointing=True),
    Setup("FSDP2 x8", 8, sharded=True, checkpointing=False),
    Setup("FSDP2 x8, ckpt", 8, sharded=True, checkpointing=True),
    Setup("FSDP2 x8, ckpt, offload", 8, sharded=True, checkpointing=True, offload=True),
    Setup("FSDP2 x64, ckpt", 64, sharded=True, checkpointing=True),
)
ROWS = {
    "latents": "latents and other weights (fp32)",
    "gradients": "gradients (fp32)",
    "optimizer": "AdamW (2 x fp32)",
    "teacher": "teacher (bf16)",
    "states": "states, scales, last winners",
    "decoded": "weights to compute with (bf16)",
    "activations": "activations",
    "moment": "logits and loss, or what FSDP2 gathers (the larger)",
}


def tables() -> Iterator[str]:
    """Two Markdown tables per model, and one of runs that hold one block."""
    heads = ["| GB | " + " | ".join(setup.title for setup in SETUPS) + " |", "|---|" + "---:|" * len(SETUPS)]
    for name, options in MODELS.items():
        model = build(options)
        found = [(counted(model, setup), setup) for setup in SETUPS]
        sketched = sum(layer.weight.numel() for layer in compressed_layers(model).values())
        yield f"**{name}**: {size(model) / 1e9:.2f} billion weights, {sketched / 1e9:.2f} billion of them sketched\n"
        yield from heads
        yield from _by_stage(found)
        yield "\nFinetuning with `objective=distill`, by what it is for:\n"
        yield from heads
        parts = [finetune(*each, "distill") for each in found]
        for row, title in ROWS.items():
            yield f"| {title} | " + " | ".join(_gigabytes(part[row]) for part in parts) + " |"
        yield ""
    yield from rows({name: one_block(build(options)) for name, options in MODELS.items()})


def _by_stage(found: list[tuple[Counted, Setup]]) -> Iterator[str]:
    plain, taught = ([stages(*each, objective) for each in found] for objective in OBJECTIVES)
    for name in ("calibrate", "start", "reconstruct"):
        yield f"| {name} | " + " | ".join(_gigabytes(column[name][0]) for column in plain) + " |"
    yield "| finetune | " + " | ".join(_gigabytes(column["finetune"][0]) for column in plain) + " |"
    yield "| **finetune with a teacher** | " + " | ".join(_gigabytes(column["finetune"][0]) for column in taught) + " |"
    for title, columns in (("host of rank 0, at most", plain), ("with a teacher", taught)):
        most = [max(host for _, host in column.values()) for column in columns]
        yield f"| {title} | " + " | ".join(_gigabytes(host) for host in most) + " |"


def one_block(model: LlamaForCausalLM) -> OneBlock:
    """What a run that holds one block of the model is counted by."""
    one = model.model.layers[0]
    layers = list(compressed_layers(one).values())
    blocks = model.config.num_hidden_layers
    return OneBlock(
        weights=size(one),
        compressed=sizes(one, (CompressedLinear,)),
        largest=max(size(layer) for layer in layers),
        states=state_bytes(one, SETUPS[0]),
        activations=saved_by_layer(model, SETUPS[0].context),
        hidden=model.config.hidden_size,
        blocks=blocks,
        parameters=size(model),
        held_states=blocks * sum(plan_bytes(layer.shape)[0] for layer in layers),
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
    parser.add_argument("--check", action="store_true", help="measure small models and compare; status 1 beyond 10 %%")
    given = parser.parse_args()
    if given.check:
        from benchmarks.scaling_check import check

        sys.exit(check())
    content = "\n".join(tables())
    if given.write:
        PAGE.write_text(page_with(PAGE.read_text(encoding="utf-8"), content), encoding="utf-8")
    else:
        print(content)


if __name__ == "__main__":
    main()
