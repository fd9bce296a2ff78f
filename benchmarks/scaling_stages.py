"""Memory of each stage of a run: what the second table of each model in docs/scaling.md is made from.

Counted as in benchmarks/scaling.py; `python benchmarks/scaling.py --check` measures small models and compares.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from usllm.training.objectives.base import CHUNK_ELEMENTS
from usllm_kernels.ops.sketch_linear.op import SLAB

FP32, BF16 = 4, 2
OBJECTIVES = ("cross_entropy", "distill")


@dataclass(frozen=True)
class Setup:
    """How a run is laid out: one column of a table.

    Attributes:
        title: Of the column.
        ranks: Devices.
        sharded: By FSDP2.
        checkpointing: Activations are computed again in the backward pass.
        offload: Shards lie in the memory of the host.
        on_cpu: The device is the CPU: what lies on the host counts too, and shards are decoded whole.
        context: Tokens of a sequence; a micro batch has one.
        streamed: Tokens that reconstruction learns from.
        step: Tokens of a step of reconstruction.
    """

    title: str
    ranks: int
    sharded: bool
    checkpointing: bool
    offload: bool = False
    on_cpu: bool = False
    context: int = 2048
    streamed: int = 512 * 512
    step: int = 2048


@dataclass(frozen=True)
class Counted:
    """What is counted of a model.

    Attributes:
        weights: Of the model.
        shard: Of them, on one rank.
        block: Of one decoder layer.
        linears: In linear layers of one decoder layer.
        compressed: In compressed layers of one decoder layer.
        largest: In the largest compressed layer.
        head: In the head.
        unit: In the largest part that FSDP2 gathers by itself.
        own: In what stays gathered for a whole pass.
        blocks: Decoder layers.
        hidden: Width of the stream.
        vocabulary: Width of the logits.
        states: Bytes of states, scales and last winners on one rank.
        saved: Bytes that a decoder layer saves for its backward pass, weights left out.
        saved_frozen: The same, where no weight gets a gradient.
    """

    weights: int
    shard: int
    block: int
    linears: int
    compressed: int
    largest: int
    head: int
    unit: int
    own: int
    blocks: int
    hidden: int
    vocabulary: int
    states: int
    saved: int
    saved_frozen: int


def copies(model: Counted, setup: Setup, compressed: bool) -> int:
    """Weights in bf16 that a pass holds until its backward pass: autocast's copies, and those that are decoded.

    Args:
        compressed: Whether layers are compressed by now: each keeps its decoded weight, unless latents are sharded;
            then a card decodes as it goes, a slab at a time.
    """
    kept = model.blocks * model.compressed if compressed and not setup.sharded else 0
    slabs = compressed and setup.sharded and not setup.on_cpu
    of_block = model.linears - (model.compressed if kept or slabs else 0)
    blocks = 1 if setup.checkpointing and compressed else model.blocks
    slab = min(SLAB, model.largest) if slabs else 0
    return BF16 * (kept + blocks * of_block + slab + model.head)


def loss(model: Counted, setup: Setup, objective: str) -> int:
    """Logits, what a loss makes of them, and the gradient of the head where it is made along with them.

    In shards there is the head, gathered, and the buffer that the part before it was gathered in: FSDP2 keeps it until
    the next one is asked for. Both are there of the teacher, too.
    """
    whole = setup.context * model.vocabulary
    some = min(whole, max(CHUNK_ELEMENTS, model.vocabulary))
    together = model.head + model.unit if setup.sharded else 0
    if objective == "cross_entropy":
        return 2 * BF16 * whole + 3 * FP32 * some + FP32 * together
    return (2 * BF16 + 5 * FP32) * some + FP32 * model.head + (FP32 + BF16) * together


def gathered(model: Counted, setup: Setup, gradients: bool = True) -> int:
    """What FSDP2 brings together in a backward pass: a part, the next one, one whole gradient, and what stays."""
    return FP32 * ((3 if gradients else 2) * model.unit + (2 if gradients else 1) * model.own) if setup.sharded else 0


def activations(model: Counted, setup: Setup) -> int:
    """What waits for the backward pass of finetuning, logits left out."""
    if setup.checkpointing:
        return model.saved + model.blocks * setup.context * model.hidden * FP32
    return model.blocks * model.saved


def finetune(model: Counted, setup: Setup, objective: str) -> dict[str, int]:
    """Bytes on one device by what they are for."""
    held = FP32 * model.shard
    on_device = 0 if setup.offload else 1
    return {
        "latents": on_device * held,
        "gradients": on_device * held,
        "optimizer": on_device * 2 * held,
        "teacher": on_device * BF16 * model.shard if objective == "distill" else 0,
        "states": model.states,
        "decoded": copies(model, setup, compressed=True),
        "activations": activations(model, setup),
        "moment": max(loss(model, setup, objective), gathered(model, setup)),
    }


def stages(model: Counted, setup: Setup, objective: str) -> dict[str, tuple[int, int]]:
    """Bytes on one device, and those on the host of rank 0, of each stage until finetuning ends.

    Under FSDP2 rank 0 starts and reconstructs, on the CPU: then that is all there is, and it is on the host.
    """
    teacher = FP32 * model.weights if objective == "distill" else 0  # a copy, fp32, until finetuning begins
    held = FP32 * (model.shard if setup.sharded else model.weights)
    logits = (3 * FP32 + BF16) * setup.context * model.vocabulary
    calibrate = held + copies(model, replace(setup, checkpointing=False), compressed=False)
    calibrate += model.blocks * model.saved_frozen + max(logits, gathered(model, setup, gradients=False))
    decoded = FP32 * model.blocks * model.compressed  # until the first pass says in which type it computes
    start = FP32 * model.weights + model.states + decoded + FP32 * model.largest
    share = 1 if setup.sharded else setup.ranks
    kept = BF16 * model.blocks * model.compressed  # of all layers: shards are of a model that was reconstructed whole
    reconstruct = 2 * FP32 * model.weights + model.states + 3 * FP32 * model.block + kept
    reconstruct += BF16 * model.linears + 3 * BF16 * setup.streamed * model.hidden
    reconstruct += model.saved * setup.step // setup.context // share
    tuned = sum(finetune(model, setup, objective).values())
    offloaded = (4 * FP32 + (BF16 if objective == "distill" else 0)) * model.shard if setup.offload else 0
    checkpoint = 3 * FP32 * model.weights  # latents and moments, gathered on rank 0
    if setup.sharded:
        both = {"start": (0, start + teacher), "reconstruct": (0, reconstruct + teacher)}
        found = {"calibrate": (calibrate, FP32 * model.weights), **both, "finetune": (tuned, offloaded + checkpoint)}
    else:
        before = {"calibrate": calibrate, "start": start, "reconstruct": reconstruct}
        found = {name: (size, teacher) for name, size in before.items()} | {"finetune": (tuned, 0)}
    return found


def measured_as(found: dict[str, tuple[int, int]], setup: Setup) -> dict[str, int]:
    """What a run on the CPU of rank 0 is to be seen to hold: shards of a dense model are given out before it runs."""
    shown = {}
    for name, (device, host) in found.items():
        given_out = setup.sharded and name in ("calibrate", "finetune")
        shown[name] = device if given_out else device + host
    return shown
