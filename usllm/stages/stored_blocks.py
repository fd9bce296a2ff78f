"""Blocks of a model that stays on disk: made one by one from its weight files, and given back."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from usllm.compress import CompressedLinear, compressed_layers, swap_linears_
from usllm.compress.report import layer_report
from usllm.data.batches import Batch
from usllm.models.hollow import Surroundings, filled, hollow_model
from usllm.models.stored_weights import StoredWeights
from usllm.stages.block_arguments import Arguments
from usllm.stages.block_source import Entered, Kept
from usllm.stages.block_windows import BlockWindow
from usllm.stages.blocks import Room, capture, decoder_blocks

REPORTS = "reports"
"""Key under which a finished window keeps the account of its layers (:class:`usllm.compress.LayerReport`)."""


class StoredBlocks:
    """One dense block and one window of compressed blocks at a time.

    Args:
        weights: Of the dense model.
        config: Of the model.
        patterns: Which of its layers are compressed.
        device: Where blocks compute.
        context: Makes the context of forward passes.
        room: Where streams are to live.

    Attributes:
        model: The model with compressed layers, without weights and plans: names and shapes.
        start: Called with a compressed block that was read anew, dense so far.
    """

    def __init__(
        self,
        weights: StoredWeights,
        config: PretrainedConfig,
        patterns: Collection[str],
        device: torch.device,
        context: Callable[[], AbstractContextManager[Any]],
        room: Room | None,
    ) -> None:
        self.weights, self.device, self.room = weights, device, room
        self._context = context
        self.model: PreTrainedModel = hollow_model(config)
        for layer in swap_linears_(self.model, patterns).values():
            layer.importance = torch.ones(layer.in_features)  # a buffer: it is nowhere on disk
        dense = hollow_model(config)
        self._blocks, self._dense = decoder_blocks(self.model), decoder_blocks(dense)
        self._names = {id(module): name for name, module in self.model.named_modules()}
        self.count = len(self._blocks)
        self.around = Surroundings(dense, self._dense, weights, device)
        self.start: Callable[[nn.Module], None] = lambda block: None
        self._lent: dict[int, nn.Module] = {}
        self._dense_lent: tuple[int, nn.Module] | None = None
        self.around.look_at(self.dense(0))

    def name(self, number: int) -> str:
        """Name of a block in the model."""
        return self._names[id(self._blocks[number])]

    def layers(self, number: int) -> list[str]:
        """Names of the compressed layers of a block."""
        return list(compressed_layers(self._blocks[number]))

    def enter(self, batches: Sequence[Batch]) -> Entered:
        """The stream that enters the first block, dense or compressed, in the type that is computed with."""
        stream, arguments = self.captured(batches, self._context, as_computed=True)
        return Entered(stream, stream, arguments)

    def captured(
        self,
        batches: Sequence[Mapping[str, Tensor]],
        context: Callable[[], AbstractContextManager[Any]],
        as_computed: bool,
    ) -> tuple[Tensor, list[Arguments]]:
        """As :func:`usllm.stages.blocks.capture`.

        Args:
            batches: Of equal shape.
            context: Makes the context of the forward passes.
            as_computed: Whether the stream is in the type that is computed with.
        """
        with context(), self.around.passing():
            return capture(self.around.model, self._dense, batches, self.device, self.room, as_computed)

    def dense(self, number: int) -> nn.Module:
        """A dense block, until another one is asked for."""
        if self._dense_lent is None or self._dense_lent[0] != number:
            self._dense_lent = None  # makes room for the next one
            self._dense_lent = number, filled(self._dense[number], self.name(number), self.weights, self.device)
        return self._dense_lent[1]

    def without_dense(self) -> None:
        """Give the dense block back."""
        self._dense_lent = None

    def compressed(self, number: int) -> nn.Module:
        """A block with compressed layers that are still dense, to be filled with what was kept of it."""
        return filled(self._blocks[number], self.name(number), self.weights, self.device)

    def window(self, window: BlockWindow) -> nn.ModuleList:
        """Compressed blocks; those before the window are given back."""
        self._lent = {number: block for number, block in self._lent.items() if number in window.blocks}
        for number in window.blocks:
            if number not in self._lent:
                self._lent[number] = self.compressed(number)
                self.start(self._lent[number])
        return nn.ModuleList(self._lent[number] for number in window.blocks)

    def without_window(self) -> None:
        """Give all compressed blocks back."""
        self._lent = {}

    def kept(self, window: BlockWindow, blocks: nn.ModuleList) -> Kept:
        """No latents of blocks that are finished, where their states say it all; the account of their layers."""
        without: set[str] = set()
        reports = {}
        for number in window.leaving:
            place = number - window.blocks.start
            for path, layer in blocks[place].named_modules():
                if not isinstance(layer, CompressedLinear):
                    continue
                reports[layer.name] = layer_report(layer).to_dict()
                if layer.plan is not None and layer.plan.stored_states:
                    without |= {f"{place}.{path}.{latent}" for latent in layer.latents}
        return Kept(frozenset(without), {REPORTS: reports})
