"""Launch parameters of the Triton kernels: those measured on a card, where a table of it lies here, else the defaults.

A table is ``<card>.json`` beside this file: ``{"few_tokens": {"channels": 16, …}, …}``. ``benchmarks/gpu.py`` measures
one and prints it; it is committed by hand. Nothing is measured when a kernel is launched, so the same card, table and
input give the same bits. States and decoded weights do not depend on any of these numbers; products, which add up
in tiles, do in their last bits.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import torch

DEFAULTS: dict[str, dict[str, int]] = {
    # Brings weights into hash order: tile of a program.
    "order": {"channels": 32, "outputs": 128, "num_warps": 4},
    # Decodes: 32 float32 fill a line; larger tiles spill registers.
    "query": {"channels": 32, "outputs": 32, "num_warps": 4},
    # Products of up to eight tokens; programs in all: a few for each multiprocessor of a large card.
    "few_tokens": {"channels": 16, "outputs": 128, "programs": 512, "num_warps": 4},
    # Products of one tile of tokens, in 16-bit floats; larger tiles spill registers. Few tokens want fewer warps.
    "many_tokens": {"channels": 32, "outputs": 64, "num_warps": 8, "num_warps_below_128_tokens": 4},
}
"""Parameters of every kernel that can be tuned; all are powers of two."""

_LIMIT = 1 << 16

_tried: dict[str, dict[str, int]] = {}


def launch_parameters(kernel: str, device: torch.device) -> Mapping[str, int]:
    """Parameters of one kernel on one device: a power of two each, named as in :data:`DEFAULTS`.

    Raises:
        ValueError: The card's table is damaged; it is named.
    """
    return _tried.get(kernel) or _of_card(card_name(device))[kernel]


@contextmanager
def tried_parameters(kernel: str, parameters: Mapping[str, int]) -> Iterator[None]:
    """Other parameters of one kernel inside the block, for a tuning run; what is not named keeps its default.

    Raises:
        ValueError: A name is unknown, or a number is no power of two.
    """
    before = _tried.get(kernel)
    _tried[kernel] = _checked({kernel: parameters}, "tried parameters")[kernel]
    try:
        yield
    finally:
        if before is None:
            del _tried[kernel]
        else:
            _tried[kernel] = before


@lru_cache(maxsize=64)
def card_name(device: torch.device) -> str:
    """A card's name as its table is called, such as ``nvidia_h100_80gb_hbm3``; ``cpu`` and the like elsewhere."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")


def table_text(found: Mapping[str, Mapping[str, int]]) -> str:
    """A table as it is committed.

    Raises:
        ValueError: A name is unknown, or a number is no power of two.
    """
    _checked(found, "table")
    return json.dumps(found, indent=2, sort_keys=True) + "\n"


@lru_cache(maxsize=16)
def _of_card(name: str, folder: Path = Path(__file__).parent) -> Mapping[str, Mapping[str, int]]:
    path = folder / f"{name}.json"
    if not path.is_file():
        return DEFAULTS
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): delete it, the defaults are used then") from error
    return {**DEFAULTS, **_checked(content, str(path))}


def _checked(content: object, source: str) -> dict[str, dict[str, int]]:
    way_out = "delete it, the defaults are used then"
    if not isinstance(content, Mapping):
        raise ValueError(f"{source} is no object of kernels: {way_out}")
    found = {}
    for kernel, parameters in content.items():
        if kernel not in DEFAULTS or not isinstance(parameters, Mapping):
            raise ValueError(f"{source}: {kernel!r} is no kernel of {', '.join(DEFAULTS)}: {way_out}")
        for name, value in parameters.items():
            good = type(value) is int and 0 < value <= _LIMIT and value & (value - 1) == 0
            if name not in DEFAULTS[kernel] or not good:
                known = ", ".join(DEFAULTS[kernel])
                raise ValueError(f"{source}: {kernel}.{name}={value!r} must be a power of two, one of {known}")
        found[kernel] = {**DEFAULTS[kernel], **parameters}
    return found
