"""Merging a composed configuration into dataclasses, collecting every mismatch instead of stopping at the first.

The dataclasses belong to the parts they configure (``SketchConfig``, ``ModelSpec``, …): a field added there is a key
that the configuration accepts, with its type. OmegaConf converts and checks each value.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import types
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from usllm.system.errors import UserError

T = TypeVar("T")
NEEDS_A_VALUE = ": needs a value"
"""What follows the key of a value that nobody gave."""
_SCALARS = (bool, int, float, str)
_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", type(None): "null"}


def merge_typed(cls: type[T], given: Mapping[Any, Any], problems: list[str], path: str = "") -> T | None:
    """Build the dataclass ``cls`` from plain nested dictionaries.

    Args:
        cls: the dataclass.
        given: plain Python containers (``OmegaConf.to_container(..., resolve=True)``).
        problems: one line per mismatch is appended, each with the full key, the value and the way out. A field whose
            value does not fit keeps its default, so that the rules can still look at the others.
        path: dotted prefix of the keys of ``given``, with its last dot.

    Returns:
        The dataclass, or ``None`` where it refuses the values; its reasons are in ``problems``.
    """
    values = merge_values(cls, given, problems, path)
    return built(lambda: cls(**values), problems)


def merge_values(
    cls: type, given: Mapping[Any, Any], problems: list[str], path: str = "", exclude: Iterable[str] = ()
) -> dict[str, Any]:
    """As :func:`merge_typed`, giving the arguments for ``cls`` instead; ``exclude`` names fields set elsewhere."""
    hints = get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls) if f.name not in exclude}
    values: dict[str, Any] = {}
    for key, value in given.items():
        full = f"{path}{key}"
        if key not in fields:
            problems.append(f"{full}={_short(value)}: unknown key; {_nearest(str(key), fields, path)}")
        elif value == MISSING:
            problems.append(_wanted(full, hints[key]))
        else:
            _merge_value(hints[key], key, value, values, problems, full)
    for key, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and key not in values:
            if key not in given:
                problems.append(_wanted(f"{path}{key}", hints[key]))
            values[key] = None  # never used: there is a problem to report
    return values


def built(build: Callable[[], T], problems: list[str]) -> T | None:
    """The result of ``build``, or ``None`` with the lines of its error in ``problems``."""
    try:
        return build()
    except (UserError, ValueError, TypeError) as error:
        problems.extend(str(error).splitlines())
        return None


def _merge_value(hint: Any, key: str, value: Any, values: dict[str, Any], problems: list[str], full: str) -> None:
    section = _dataclass_in(hint)
    entries = _dataclass_in(get_args(hint)[1]) if get_origin(hint) is dict else None
    if section is not None and value is not None:
        if not isinstance(value, Mapping):
            problems.append(f"{full}={_short(value)}: must be a group of settings ({_names(section)})")
        elif (merged := merge_typed(section, value, problems, f"{full}.")) is not None:
            values[key] = merged
    elif entries is not None and isinstance(value, Mapping):
        values[key] = {}
        for name, entry in value.items():
            if isinstance(entry, Mapping):
                if (merged := merge_typed(entries, entry, problems, f"{full}.{name}.")) is not None:
                    values[key][str(name)] = merged
            elif entry is not None:  # null removes an entry of a group
                problems.append(f"{full}.{name}={_short(entry)}: must be a group of settings ({_names(entries)})")
    elif _is_group(hint) and not (isinstance(value, Mapping) or (value is None and type(None) in get_args(hint))):
        problems.append(f"{full}={_short(value)}: must be a group of settings")
    else:
        try:
            values[key] = _converted(hint, value)
        except OmegaConfBaseException:
            shown = "null" if value is None else _short(value)
            problems.append(f"{full}={shown}: must be {_in_words(hint)}")
        else:
            problems.extend(too_large(full, value))


def typed_arguments(
    build: Callable[..., Any], given: Mapping[str, Any], path: str, problems: list[str]
) -> dict[str, Any]:
    """Arguments of a class in the types that it annotates, as far as values can tell: 0 for a text becomes ``"0"``.

    Args:
        build: The class, or a function.
        given: Its arguments.
        path: Dotted key of the arguments.
        problems: One line is appended for each that is of another type.
    """
    try:
        hints = get_type_hints(getattr(build, "__init__") if isinstance(build, type) else build)  # noqa: B009
    except (NameError, TypeError, AttributeError):  # annotations that only a type checker can read
        return dict(given)
    values = dict(given)
    for key, value in given.items():
        if key in hints:
            found: dict[str, Any] = {}
            _merge_value(hints[key], key, value, found, problems, f"{path}.{key}")
            if _expressible(hints[key]):
                values |= found
    return values


def too_large(key: str, value: Any) -> list[str]:
    """One line for each whole number in a value that nothing here can compute with."""
    if isinstance(value, int):
        return [] if abs(value) < 2**63 else [f"{key}={_short(value)}: must fit into 64 bits"]
    entries = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else ()
    return [found for name, entry in entries for found in too_large(f"{key}.{name}", entry)]


def _in_words(hint: Any) -> str:
    """What a value of a type is, for a message."""
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(_in_words(part) for part in get_args(hint))
    if get_origin(hint) in (list, tuple):
        part = next((part for part in get_args(hint) if part is not Ellipsis), str)
        return f"a list, as in [{'1,2' if part is int else '0.5,1' if part is float else 'a,b'}]"
    return _WORDS.get(hint, "a group of settings")


def _converted(hint: Any, value: Any) -> Any:
    """``value`` in the type of ``hint``; hints that OmegaConf cannot express are left to the dataclass's own checks."""
    if not _expressible(hint):
        return value
    holder = OmegaConf.structured(_holder(hint))
    holder.value = value
    return OmegaConf.to_container(holder)["value"]  # type: ignore[index,call-overload]


@functools.cache  # made by compiling source, a millisecond each
def _holder(hint: Any) -> type:
    """A dataclass with one field of a type."""
    return dataclasses.make_dataclass("Field", [("value", hint, MISSING)])


def _expressible(hint: Any) -> bool:
    if get_origin(hint) in (Union, types.UnionType):
        return all(part in (*_SCALARS, type(None)) for part in get_args(hint))
    if get_origin(hint) in (list, tuple):
        return all(part in (*_SCALARS, Ellipsis) for part in get_args(hint))
    if get_origin(hint) is dict or hint is dict:
        return get_args(hint)[1:] not in ((), (Any,))  # of anything: also of a text such as ${, which it would parse
    return hint in _SCALARS


def _is_group(hint: Any) -> bool:
    """Whether a value of the type can be nothing but a dictionary, or null."""
    parts = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    found = [part is dict or get_origin(part) is dict for part in parts if part is not type(None)]
    return bool(found) and all(found)


def _dataclass_in(hint: Any) -> type | None:
    """The dataclass of ``Section`` or ``Section | None``."""
    candidates = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    return next((c for c in candidates if isinstance(c, type) and dataclasses.is_dataclass(c)), None)


def _wanted(full: str, hint: Any) -> str:
    """The line that asks for a missing value."""
    section = _dataclass_in(hint)
    if section is None:
        return f"{full}{NEEDS_A_VALUE}; pass {full}=…"
    group = f"choose another option of {full.partition('.')[0]}, or " if "." in full else ""
    return f"{full}{NEEDS_A_VALUE}; {group}pass '{full}={{…}}' ({_names(section)})"


def _names(cls: type) -> str:
    return ", ".join(f.name for f in dataclasses.fields(cls))


def _nearest(key: str, known: Mapping[str, Any], path: str) -> str:
    match = difflib.get_close_matches(key, known, n=1)
    return f"did you mean {path}{match[0]}?" if match else f"known here: {', '.join(known)}"


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 80 else f"{text[:77]}…"
