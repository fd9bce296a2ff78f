"""The files of a packed folder as bytes, and places in them."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path

CONFIG, WEIGHTS = "config.json", "model.safetensors"


@dataclass(frozen=True)
class Files:
    """The two files of a folder that decide what is loaded."""

    config: bytes
    weights: bytes

    def write(self, folder: Path) -> Path:
        (folder / CONFIG).write_bytes(self.config)
        (folder / WEIGHTS).write_bytes(self.weights)
        return folder

    @property
    def size(self) -> int:
        return len(self.config) + len(self.weights)

    @classmethod
    def read(cls, folder: Path) -> Files:
        return cls((folder / CONFIG).read_bytes(), (folder / WEIGHTS).read_bytes())


def tensor_places(weights: bytes) -> dict[str, tuple[int, int]]:
    """First byte and end of every tensor in a safetensors file."""
    length = int.from_bytes(weights[:8], "little")
    header = json.loads(weights[8 : 8 + length])
    return {
        name: (8 + length + entry["data_offsets"][0], 8 + length + entry["data_offsets"][1])
        for name, entry in header.items()
        if name != "__metadata__"
    }


def flip_bits(data: bytes, draw: random.Random, end: int) -> bytes:
    changed = bytearray(data)
    for _ in range(draw.choice([1, 1, 2, 8])):
        changed[draw.randrange(min(end, len(data)))] ^= 1 << draw.randrange(8)
    return bytes(changed)


def with_header(weights: bytes, header: bytes) -> bytes:
    length = int.from_bytes(weights[:8], "little")
    return len(header).to_bytes(8, "little") + header + weights[8 + length :]


def header_of(files: Files) -> bytes:
    return files.weights[8 : 8 + int.from_bytes(files.weights[:8], "little")]
