"""What a stage that works block by block keeps, so that a killed run continues to the same bits.

A finished window of blocks is written once; the one that is being worked on is written now and then, with its
optimizer.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim import Optimizer

from usllm.compress import Compressor, load_plans_, recall_winners_, save_plans
from usllm.stages.block_source import Kept
from usllm.stages.store import Store

_UNFINISHED = "unfinished"


class BlockStates:
    """Windows of blocks of one stage in its store.

    Args:
        store: Of the stage.
    """

    def __init__(self, store: Store) -> None:
        self.store = store

    def load_plans(self, number: int, blocks: nn.Module, compressor: Compressor) -> bool:
        """Give blocks that were being worked on their plans; whether there were any."""
        saved = self._of_window(number)
        if saved is None:
            return False
        load_plans_(blocks, saved["plans"], compressor)
        return True

    def load_finished(self, number: int, blocks: nn.Module, compressor: Compressor) -> dict[str, Any] | None:
        """Fill a window that was finished before, and what :meth:`save_finished` was told; ``None`` if it was not."""
        saved = self.store.load(_finished(number))
        if saved is None:
            return None
        load_plans_(blocks, saved["plans"], compressor)
        missing = blocks.load_state_dict(saved["blocks"], strict=False)
        if set(missing.missing_keys) != set(saved.get("without", ())) or missing.unexpected_keys:
            raise RuntimeError(f"{self.store.folder}: window {number} is not one of these blocks")
        found: dict[str, Any] = saved["found"]
        return found

    def save_finished(self, number: int, blocks: nn.Module, found: dict[str, Any], kept: Kept | None = None) -> None:
        """Keep a window for good, with plain Python about it.

        Args:
            number: Of the window.
            blocks: Its blocks.
            found: What :meth:`load_finished` gives back.
            kept: Which of its tensors are left out, and what else is kept.
        """
        kept = kept or Kept()
        tensors = {name: tensor for name, tensor in blocks.state_dict().items() if name not in kept.without}
        content: dict[str, Any] = {"blocks": tensors, "plans": save_plans(blocks), "found": found}
        content |= {"without": sorted(kept.without), "more": kept.more}
        self.store.save(_finished(number), content)
        self.store.drop(_UNFINISHED)

    def read_finished(self, number: int) -> dict[str, Any]:
        """What :meth:`save_finished` has kept: tensors in ``blocks``, ``plans``, ``found``, plain Python in ``more``.

        Raises:
            RuntimeError: The window is not finished.
        """
        saved = self.store.load(_finished(number))
        if saved is None:
            raise RuntimeError(f"{self.store.folder}: window {number} is not finished")
        return saved

    def load_unfinished(self, number: int, blocks: nn.Module, optimizer: Optimizer) -> tuple[int, float]:
        """Fill blocks and their optimizer as they were when they were last kept; steps made, and seconds they took."""
        saved = self._of_window(number)
        if saved is None:
            return 0, 0.0
        blocks.load_state_dict(saved["blocks"])
        optimizer.load_state_dict(saved["optimizer"])
        recall_winners_(blocks)
        return int(saved["steps"]), float(saved["seconds"])

    def save_unfinished(self, number: int, blocks: nn.Module, optimizer: Optimizer, steps: int, seconds: float) -> None:
        """Keep a window that is being worked on."""
        content = {"number": number, "blocks": blocks.state_dict(), "plans": save_plans(blocks)}
        counts = {"steps": steps, "seconds": seconds}
        self.store.save(_UNFINISHED, {**content, **counts, "optimizer": optimizer.state_dict()})

    def _of_window(self, number: int) -> dict[str, Any] | None:
        saved = self.store.load(_UNFINISHED)
        return saved if saved is not None and saved["number"] == number else None


def _finished(number: int) -> str:
    return f"window_{number:04}"
