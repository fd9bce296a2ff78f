"""Packed folders to be damaged by tests: copies, changes of their JSON, and what refusing them means."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import usllm
from usllm.packed.inspection import inspect_folder
from usllm.system.errors import PackedFormatError

LAYER = "model.layers.0.mlp.up_proj"
WEIGHTS, CONFIG, INDEX = "model.safetensors", "config.json", "model.safetensors.index.json"


def copied(source: Path, target: Path) -> Path:
    target.mkdir()
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


def edit_json(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(file.read_text(encoding="utf-8"))
    change(content)
    file.write_text(json.dumps(content), encoding="utf-8")


def refused(folder: Path, named: str) -> None:
    with pytest.raises(PackedFormatError, match=named):
        inspect_folder(folder)
    with pytest.raises(PackedFormatError, match=named):
        usllm.load(folder)
