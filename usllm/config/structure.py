"""Merging a composed configuration into its typed form, collecting every mismatch instead of stopping at the first.

OmegaConf converts and checks each value against the dataclass field, one key at a time, so that two wrong keys give two
lines of one message.
"""

from __future__ import annotations

import difflib
import types
from collections.abc import Mapping
from dataclasses import is_dataclass
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

T = TypeVar("T")


def merge_typed(cls: type[T], given: Mapping[Any, Any], problems: list[str], path: str = "") -> T:
    """Build ``cls`` from plain nested dictionaries; what does not fit is described in ``problems`` and left at its default.

    Args:
        cls: a dataclass of ``usllm.config.schema``.
        given: plain Python containers (``OmegaConf.to_container(..., resolve=True)``).
        problems: one line per mismatch is appended, each with the full key, the value and the way out.
        path: dotted prefix of the keys of ``given``.
    """
    hints = get_type_hints(cls)
    base = OmegaConf.structured(cls)
    values: dict[str, Any] = {}
    for key, value in given.items():
        full = f"{path}{key}"
        if key not in hints:
            problems.append(f"{full}={_short(value)}: unknown key; {_nearest(str(key), hints, path)}")
        elif value == MISSING:
            problems.append(f"{full}: needs a value; pass {full}=...")
        else:
            _merge_value(hints[key], base, key, value, values, problems, full)
    # A required field that is still missing must not reach the rules as "???" with a wrong type.
    for key in hints:
        if key not in values and OmegaConf.is_missing(base, key):
            if key not in given:
                problems.append(f"{path}{key}: needs a value; pass {path}{key}=...")
            values[key] = MISSING
    return cls(**values)


def _merge_value(
    hint: Any, base: Any, key: str, value: Any, values: dict[str, Any], problems: list[str], full: str
) -> None:
    section = _dataclass_in(hint)
    entries = _dataclass_in(get_args(hint)[1]) if get_origin(hint) is dict else None
    if section is not None and value is not None:
        if isinstance(value, Mapping):
            values[key] = merge_typed(section, value, problems, f"{full}.")
        else:
            problems.append(f"{full}={_short(value)}: must be a group of settings ({', '.join(get_type_hints(section))})")
    elif entries is not None and isinstance(value, Mapping):
        values[key] = {}
        for name, entry in value.items():
            if isinstance(entry, Mapping):
                values[key][str(name)] = merge_typed(entries, entry, problems, f"{full}.{name}.")
            elif entry is not None:  # null removes an entry of a group
                problems.append(f"{full}.{name}={_short(entry)}: must be a group of settings")
    else:
        try:
            base[key] = value
            converted = base[key]
            values[key] = OmegaConf.to_container(converted) if OmegaConf.is_config(converted) else converted
        except OmegaConfBaseException as error:
            problems.append(f"{full}={_short(value)}: {str(error).splitlines()[0]}")


def _dataclass_in(hint: Any) -> type | None:
    """The dataclass of ``Section`` or ``Section | None``."""
    candidates = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    return next((c for c in candidates if isinstance(c, type) and is_dataclass(c)), None)


def _nearest(key: str, known: Mapping[str, Any], path: str) -> str:
    match = difflib.get_close_matches(key, known, n=1)
    if match:
        return f"did you mean {path}{match[0]}?"
    return f"known here: {', '.join(known)}"


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
