"""What a module asks of whatever prepares its model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from torch import nn

if TYPE_CHECKING:
    from usllm.training.module import SketchFinetuner


class Preparing(Protocol):
    """What happens to a freshly loaded model before it is trained (:class:`usllm.stages.Preparation`)."""

    def look(self, module: SketchFinetuner, model: nn.Module) -> None:
        """Look at the dense model, which all ranks hold a copy or a shard of."""

    def change(self, module: SketchFinetuner, model: nn.Module, together: bool = False) -> None:
        """Compress it; it holds all weights. ``together``: all ranks do, each with a copy of it."""
