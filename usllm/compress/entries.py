"""What a compressed layer takes in the header of a weight file, beside its own bytes: one JSON entry and its checksum.

Bits per weight do not hold it, so that the figure of a layer is a property of the layer: an entry grows with the name
of the layer and the size of the file. On small layers it shows.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable


def entry_bytes(layer: str, size: int, file_bytes: int) -> int:
    """Bytes of a layer's entry: name, type, shape and place of its tensor, and the checksum.

    Places are counted with as many digits as the size of the file has, so that the figure is known before the file is.

    Args:
        layer: Its name in the model.
        size: Bytes of its tensor.
        file_bytes: Of the weight files.
    """
    name = f"{layer}.packed"
    place = {"dtype": "U8", "shape": [size], "data_offsets": [file_bytes, file_bytes]}
    entry = json.dumps({name: place}, separators=(",", ":"))[1:-1] + ","
    checksum = f'\\"{name}\\":{2**32 - 1},'  # in a string of the header's metadata
    return len(entry.encode()) + len(checksum.encode())


def bits_with_entries(layers: Iterable[tuple[str, tuple[int, int], int]], file_bytes: int) -> float:
    """Bits per compressed weight, the entries in the weight files' headers included.

    Args:
        layers: Name, shape and bytes of each.
        file_bytes: Of the weight files.
    """
    layers = list(layers)
    stored = sum(size + entry_bytes(name, size, file_bytes) for name, _, size in layers)
    return 8 * stored / sum(math.prod(shape) for _, shape, _ in layers)
