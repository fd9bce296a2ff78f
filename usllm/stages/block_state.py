"""What a stage that works block by block keeps, so that a killed run continues to the same bits.

A finished block is written once; the one that is being worked on is written now and then, with its optimizer.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim import Optimizer

from usllm.compress import Compressor, load_plans_, recall_winners_, save_plans
from usllm.stages.store import Store

_UNFINISHED = "unfinished"


class BlockStates:
    """Blocks of one stage in its store.

    Args:
        store: Of the stage.
    """

    def __init__(self, store: Store) -> None:
        self.store = store

    def load_plans(self, number: int, block: nn.Module, compressor: Compressor) -> bool:
        """Give a block that was being worked on its plans; whether there was one."""
        saved = self._of_block(number)
        if saved is None:
            return False
        load_plans_(block, saved["plans"], compressor)
        return True

    def load_finished(self, number: int, block: nn.Module, compressor: Compressor) -> bool:
        """Fill a block that was finished before; whether there was one."""
        saved = self.store.load(_finished(number))
        if saved is None:
            return False
        load_plans_(block, saved["plans"], compressor)
        block.load_state_dict(saved["block"])
        return True

    def save_finished(self, number: int, block: nn.Module) -> None:
        """Keep a block for good."""
        self.store.save(_finished(number), {"block": block.state_dict(), "plans": save_plans(block)})
        self.store.drop(_UNFINISHED)

    def load_unfinished(self, number: int, block: nn.Module, optimizer: Optimizer) -> int:
        """Fill a block and its optimizer as they were when they were last kept; the steps that were made."""
        saved = self._of_block(number)
        if saved is None:
            return 0
        block.load_state_dict(saved["block"])
        optimizer.load_state_dict(saved["optimizer"])
        recall_winners_(block)
        return int(saved["steps"])

    def save_unfinished(self, number: int, block: nn.Module, optimizer: Optimizer, steps: int) -> None:
        """Keep a block that is being worked on."""
        content = {"number": number, "block": block.state_dict(), "plans": save_plans(block), "steps": steps}
        self.store.save(_UNFINISHED, {**content, "optimizer": optimizer.state_dict()})

    def _of_block(self, number: int) -> dict[str, Any] | None:
        saved = self.store.load(_UNFINISHED)
        return saved if saved is not None and saved["number"] == number else None


def _finished(number: int) -> str:
    return f"block_{number:04}"
