"""Bits and starts of layers of a model that stays on disk: what calibrate, allocate and start do, by blocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from rich.progress import Progress
from torch import Tensor, nn

from usllm.calibration import SecondMoments
from usllm.compress import Statistics, compressed_layers
from usllm.compress.budgets import budget_needs
from usllm.compress.ceilings import layer_bits
from usllm.compress.sharded import channel_energy
from usllm.compress.surgery import plan_layer, start_, with_weight_energy
from usllm.stages.base import Work
from usllm.stages.blocks import outputs
from usllm.stages.calibrate import Calibrate, statistics_needed
from usllm.stages.reconstruct import Reconstruct
from usllm.stages.stored_blocks import StoredBlocks
from usllm.system.announce import announce
from usllm.system.errors import UserError


def prepare_(work: Work, source: StoredBlocks, calibrate: Calibrate, reconstruct: Reconstruct) -> None:
    """Fill ``work.statistics`` and ``work.bits``, and tell the blocks how to start.

    The dense model is run once, block by block, where a rule over layers, or ``statistics=dense``, reads what only that
    tells; otherwise each block is measured when it is its turn.

    Args:
        work: Of a model without weights.
        source: Its blocks.
        calibrate: How many sequences.
        reconstruct: Which statistics it plans with.

    Raises:
        UserError: A layer's bits leave no room, or an input is not finite.
    """
    compressor = work.compressor
    layers = compressed_layers(work.model)
    by_stream = reconstruct.statistics == "student" and bool(compressor.needs & {"energy", "covariance"})
    work.statistics = {name: Statistics(energy=None) for name in layers}
    if budget_needs(compressor.options.layer_budget) or (compressor.needs and not by_stream):
        store = work.store(calibrate)

        def measured() -> dict[str, dict[str, Tensor | None]]:
            found = dense_statistics(work, source, list(work.batches(calibrate.sequences)))
            return {name: vars(known) for name, known in found.items()}

        work.statistics = {name: Statistics(**known) for name, known in store.kept("statistics", measured).items()}
    work.bits = layer_bits(layers, compressor, work.statistics)
    source.start = nothing_yet if by_stream else partial(_start, work)


def dense_statistics(
    work: Work, source: StoredBlocks, batches: Sequence[Mapping[str, Tensor]]
) -> dict[str, Statistics]:
    """What :class:`usllm.stages.Calibrate` measures, of one dense block after another.

    Args:
        work: Says what is needed, and the precision.
        source: The blocks.
        batches: One sequence each.

    Returns:
        Statistics by layer name, with E[w²] of the channels.

    Raises:
        UserError: There was no sequence, or a layer's input is not finite.
    """
    if not batches:
        raise UserError("calibration: the training split gave no sequence; take a longer text")
    full = "covariance" in statistics_needed(work)
    stream, arguments = source.captured(batches, work.context, as_computed=False)
    found: dict[str, Statistics] = {}
    with Progress(disable=not work.shows_progress, transient=True) as bar:
        announce(bar, "Measuring importance")
        for number in bar.track(range(source.count), description="Measuring importance"):
            block, prefix = source.dense(number), source.name(number)
            layers = {name: block.get_submodule(name.removeprefix(f"{prefix}.")) for name in source.layers(number)}
            with SecondMoments(layers, full=full) as moments:
                for part, output in outputs(block, stream, arguments[number], 1, work.context):
                    stream[part] = output  # in its place: each sequence is read once
            try:
                energy = moments.mean()
                covariance = moments.full_mean() if full else {}
            except ValueError as error:
                raise UserError(f"calibration: {error}") from error
            for name, layer in layers.items():
                assert isinstance(layer.weight, Tensor)
                found[name] = Statistics(energy[name], channel_energy(layer.weight), covariance.get(name))
    source.without_dense()
    return found


def nothing_yet(block: nn.Module) -> None:
    """The start of a block whose plans come with the stream that reaches it."""


def _start(work: Work, block: nn.Module) -> None:
    layers = compressed_layers(block)
    known = {name: _on(work.device, work.statistics[name]) for name in layers}
    known = with_weight_energy(layers, work.compressor, known)
    plans = {name: plan_layer(layer, work.compressor, known[name], work.bits[name]) for name, layer in layers.items()}
    start_(block, plans, known)


def _on(device: torch.device, known: Statistics) -> Statistics:
    return Statistics(**{key: None if value is None else value.to(device) for key, value in vars(known).items()})
