"""What reconstruction has made of a model that stays on disk, read back block by block."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from usllm.compress import Compressor, LayerPlan, compressed_layers, load_plans_
from usllm.compress.report import CompressionReport, LayerReport
from usllm.stages.block_state import BlockStates
from usllm.stages.block_windows import BlockWindow
from usllm.stages.stored_blocks import REPORTS, StoredBlocks


class FinishedBlocks(Mapping[str, Tensor]):
    """Finished blocks by number, and all tensors of the compressed model by name, read when they are asked for.

    What is no block's is that of the dense model; latents that nobody needs any more are not there.

    Args:
        source: Blocks of the dense model.
        states: Of the stage that has finished them.
        windows: In which it trained them.
        compressor: Method and configuration.
    """

    def __init__(
        self, source: StoredBlocks, states: BlockStates, windows: Sequence[BlockWindow], compressor: Compressor
    ) -> None:
        self._source, self._states, self._compressor = source, states, compressor
        self._window_of = {number: window for window in windows for number in window.leaving}
        self._read: tuple[int, dict[str, Any]] | None = None

    def block(self, number: int) -> nn.Module:
        """A block with its states, on the device.

        Raises:
            RuntimeError: What was kept is another block's.
        """
        tensors, plans, _ = self._parts(number)
        block = self._source.compressed(number)
        load_plans_(block, plans, self._compressor)
        missing = block.load_state_dict(tensors, strict=False)
        latents = {
            f"{path}.{latent}" for path, layer in block.named_modules() for latent in getattr(layer, "latents", ())
        }
        if set(missing.missing_keys) - latents or missing.unexpected_keys:
            raise RuntimeError(f"{self._source.name(number)}: what was kept is another block's")
        return block

    def plans(self) -> dict[str, LayerPlan]:
        """Plans of all compressed layers by name."""
        shapes = {name: layer.shape for name, layer in compressed_layers(self._source.model).items()}
        stored = {name: plan for number in range(self._source.count) for name, plan in self._parts(number)[1].items()}
        return {name: self._compressor.restore(stored[name], shape, name) for name, shape in shapes.items()}

    def report(self) -> CompressionReport:
        """The account of the whole model."""
        layers = compressed_layers(self._source.model)
        kept = {name: row for number in range(self._source.count) for name, row in self._parts(number)[2].items()}
        weights = sum(layer.shape[0] * layer.shape[1] for layer in layers.values())
        parameters = sum(parameter.numel() for parameter in self._source.model.parameters())
        return CompressionReport(
            layers=tuple(LayerReport.from_dict(kept[name]) for name in layers),
            compressed_weights=weights,
            other_parameters=parameters - weights,
        )

    def __getitem__(self, name: str) -> Tensor:
        for number in range(self._source.count):
            prefix = f"{self._source.name(number)}."
            if name.startswith(prefix):
                return self._parts(number)[0][name.removeprefix(prefix)]
        if name not in self._source.weights:
            raise KeyError(name)
        return self._source.weights[name]

    def __iter__(self) -> Iterator[str]:
        names = tuple(f"{self._source.name(number)}." for number in range(self._source.count))
        yield from (name for name in self._source.model.state_dict() if not name.startswith(names))
        for number, prefix in enumerate(names):
            yield from (f"{prefix}{name}" for name in self._parts(number)[0])

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def _parts(self, number: int) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Any]]:
        """Tensors of a block by their names in it, plans and accounts of its layers by theirs in the model."""
        window = self._window_of[number]
        if self._read is None or self._read[0] != window.number:
            self._read = None  # makes room for the next one
            self._read = window.number, self._states.read_finished(window.number)
        saved, prefix = self._read[1], f"{number - window.blocks.start}."
        layers = self._source.layers(number)
        return (
            {name.removeprefix(prefix): value for name, value in saved["blocks"].items() if name.startswith(prefix)},
            {name: saved["plans"][name] for name in layers},
            {name: saved["more"][REPORTS][name] for name in layers},
        )
