"""What a stage that works block by block keeps, so that a killed run continues to the same bits.

A finished block is written once; the one that is being worked on is written now and then, with its optimizer.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from usllm.compress import Compressor, load_plans_, recall_winners_, save_plans
from usllm.system.files import write_torch

_UNFINISHED = "unfinished.pt"


class BlockStates:
    """Files of one stage.

    Args:
        folder: Where they are; ``None`` keeps nothing.
        writes: Whether this process writes them.
        key: What the work depends on; files of other work are passed over.
    """

    def __init__(self, folder: Path | None, writes: bool, key: Mapping[str, Any]) -> None:
        digest = hashlib.sha256(json.dumps(key, sort_keys=True, default=str).encode()).hexdigest()[:16]
        self.folder = None if folder is None else folder / digest
        self.writes = writes

    def load_plans(self, number: int, block: nn.Module, compressor: Compressor) -> bool:
        """Give a block that was being worked on its plans; whether there was one."""
        saved = self._read(_UNFINISHED)
        if saved is None or saved["number"] != number:
            return False
        load_plans_(block, saved["plans"], compressor)
        return True

    def load_finished(self, number: int, block: nn.Module, compressor: Compressor) -> bool:
        """Fill a block that was finished before; whether there was one."""
        saved = self._read(f"block_{number:04}.pt")
        if saved is None:
            return False
        load_plans_(block, saved["plans"], compressor)
        block.load_state_dict(saved["block"])
        return True

    def save_finished(self, number: int, block: nn.Module) -> None:
        """Keep a block for good."""
        self._write(f"block_{number:04}.pt", {"block": block.state_dict(), "plans": save_plans(block)})
        if self.folder is not None and self.writes:
            (self.folder / _UNFINISHED).unlink(missing_ok=True)

    def load_unfinished(self, number: int, block: nn.Module, optimizer: Optimizer) -> int:
        """Fill a block and its optimizer as they were when they were last kept; the steps that were made."""
        saved = self._read(_UNFINISHED)
        if saved is None or saved["number"] != number:
            return 0
        block.load_state_dict(saved["block"])
        optimizer.load_state_dict(saved["optimizer"])
        recall_winners_(block)
        return int(saved["steps"])

    def save_unfinished(self, number: int, block: nn.Module, optimizer: Optimizer, steps: int) -> None:
        """Keep a block that is being worked on."""
        content = {"number": number, "block": block.state_dict(), "plans": save_plans(block), "steps": steps}
        self._write(_UNFINISHED, {**content, "optimizer": optimizer.state_dict()})

    def _read(self, name: str) -> dict[str, Any] | None:
        if self.folder is None or not (self.folder / name).is_file():
            return None
        found: dict[str, Any] = torch.load(self.folder / name, weights_only=True, map_location="cpu")
        return found

    def _write(self, name: str, content: dict[str, Any]) -> None:
        if self.folder is not None and self.writes:
            write_torch(self.folder / name, content)
