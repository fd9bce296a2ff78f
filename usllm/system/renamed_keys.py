"""Keys of the configuration that have other names now: one table, for commands, W&B sweeps and saved configurations."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

RENAMED = {
    "callbacks.importance_calibration.sequences": "stages.calibrate.sequences",
    "callbacks.importance_calibration.reuse": "stages.calibrate.reuse",
}
"""Old key -> new key."""
GONE = {"keep_decoded": "is layout=decoded layout_memory=… now"}
"""Keys for which there is more than another name: what to say of them."""
REPLACED = {"~callbacks.importance_calibration": "stages=none"}
"""Old override -> new override, for what is not said by a key and a value."""


def renamed_overrides(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Overrides with today's keys, and a line ``X is now Y`` for each that was another.

    Args:
        arguments: Of a command line, also those of the W&B agent; of a sweep too, whose values are left alone.
    """
    found, notes = [], []
    for argument in arguments:
        if argument in REPLACED:
            notes.append(f"{argument} is now {REPLACED[argument]}")
            found.append(REPLACED[argument])
            continue
        key, equals, value = argument.partition("=")
        bare = key.lstrip("+~")
        if bare in RENAMED:
            notes.append(f"{bare} is now {RENAMED[bare]}")
            key = key[: len(key) - len(bare)] + RENAMED[bare]
        found.append(key + equals + value)
    return found, notes


def with_todays_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    """A saved configuration in which values stand under their names of today; what is there already stays."""
    moved: dict[str, Any] = copy.deepcopy(dict(config))
    for old, new in RENAMED.items():
        *groups, last = old.split(".")
        inner: Any = moved
        for group in groups:
            inner = inner.get(group) if isinstance(inner, dict) else None
        if not isinstance(inner, dict) or last not in inner:
            continue
        value = inner.pop(last)
        *groups, last = new.split(".")
        target = moved
        for group in groups:
            if not isinstance(target.get(group), dict):
                target[group] = {}
            target = target[group]
        target.setdefault(last, value)
    return moved
