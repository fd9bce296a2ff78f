"""Memory of a run that holds one block (`block_by_block=true`): the last table of docs/scaling.md.

Counted as in benchmarks/scaling.py, which hands over what it counts; `benchmarks/block_by_block.py` measures.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

FP32, BF16 = 4, 2
SEQUENCES, CONTEXT = 512, 512
"""Of the default of stages.reconstruct, with data.context_length=512."""
STREAMS = 4
"""Student and dense stream, before and after the block that is being read."""


@dataclass(frozen=True)
class OneBlock:
    """What is counted of a model.

    Attributes:
        weights: Of a block.
        compressed: Those of them in compressed layers.
        largest: Weights of its largest compressed layer.
        states: Bytes of its states, and of what its next projection compares with.
        activations: Bytes that it saves for its backward pass, for 2,048 tokens a step.
        hidden: Width of the stream.
        blocks: Of the model.
        parameters: Of the model.
        held_states: Bytes of the states of all blocks as buffers hold them.
        packed_states: The same, packed.
    """

    weights: int
    compressed: int
    largest: int
    states: int
    activations: int
    hidden: int
    blocks: int
    parameters: int
    held_states: int
    packed_states: int

    def memory(self) -> dict[str, int]:
        """Bytes on the device by what they are for, while a block is trained."""
        parts = {
            "latents and other weights of a block (fp32)": FP32 * self.weights,
            "gradients (fp32)": FP32 * self.weights,
            "AdamW (2 x fp32)": 2 * FP32 * self.weights,
            "states, scales, last winners": self.states,
            "weights to compute with (bf16)": BF16 * self.weights,
            "one layer's projection (2 x fp32)": 2 * FP32 * self.largest,
            "activations": self.activations,
        }
        return {**parts, "**sum**": sum(parts.values())}

    def disk(self) -> dict[str, int]:
        """Bytes on the disk, besides the model's own files, by what they are for."""
        rest = self.parameters - self.blocks * self.compressed
        return {
            "disk: the dense model (bf16)": BF16 * self.parameters,
            "disk: streams (bf16)": STREAMS * SEQUENCES * CONTEXT * self.hidden * BF16,
            "disk: the block that is being trained (fp32)": 3 * FP32 * self.weights,
            "disk: finished blocks": self.held_states + FP32 * self.blocks * (self.weights - self.compressed),
            "disk: the packed folder": self.packed_states + BF16 * rest,
        }


def rows(models: Mapping[str, OneBlock]) -> Iterator[str]:
    """The table, Markdown."""
    yield "**One block at a time** (`block_by_block=true`), one device, steps of 2,048 tokens\n"
    yield "| GB | " + " | ".join(models) + " |"
    yield "|---|" + "---:|" * len(models)
    columns = [{**model.memory(), **model.disk()} for model in models.values()]
    for title in columns[0]:
        yield f"| {title} | " + " | ".join(f"{column[title] / 1e9:.1f}" for column in columns) + " |"
    yield ""
