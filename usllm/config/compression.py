"""The compression method that the groups ``sketch`` and ``allocation`` describe together."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from usllm.compress import Compressor
from usllm.compress.budgets import BUDGETS
from usllm.compress.registry import METHODS, method
from usllm.config.schema import AllocationConfig
from usllm.config.structure import built, merge_values
from usllm.sketch.allocation import ALLOCATIONS
from usllm.sketch.config import PRICE_EXPONENT
from usllm.system.errors import UserError
from usllm.system.plugins import unknown_name

DEFAULT_METHOD = "sketch"
"""Of configurations that name none: those of versions that had no other."""
_ALLOCATION_KEYS = {
    "allocation": "name",
    "layer_budget": "layer_budget",
    "min_importance": "min_importance",
    "price_list": "price_list",
    "price_exponent": "price_exponent",
}
"""Options of methods that the user sets in the group ``allocation``."""


def check_compressor(given: Mapping[str, Any], allocation: AllocationConfig, problems: list[str]) -> Compressor | None:
    """The compressor of ``sketch.method`` with the options of both groups.

    Args:
        given: The group ``sketch``.
        allocation: The group ``allocation``.
        problems: One line for each problem is appended, with key, value and way out.

    Returns:
        ``None`` where there is a problem that leaves nothing to build.
    """
    values = dict(given or {})
    try:
        found = method(str(values.pop("method", DEFAULT_METHOD)))
    except UserError as error:
        problems.append(str(error))
        return None
    fields = {field.name: field for field in dataclasses.fields(found.Options)}
    foreign = {key: line for key in values if (line := of_another_method(key, found.method)) is not None}
    if len(foreign) > 2 and "method" in given:  # the name was changed in an option of the group that belongs to another
        problems.append(
            f"sketch.method={found.method!r}: {', '.join(foreign)} belong to other methods; choose the whole option, "
            f"as sketch={found.method}"
        )
        foreign = dict.fromkeys(foreign, "")
    problems.extend(f"sketch.{key}={values[key]}: {line}" for key, line in foreign.items() if line)
    values = {key: value for key, value in values.items() if key not in foreign}
    options = merge_values(found.Options, values, problems, "sketch.", exclude=_ALLOCATION_KEYS)
    for key, place in _ALLOCATION_KEYS.items():
        value = getattr(allocation, place)
        if key in fields:
            options[key] = value
        elif value != _without_effect(key):
            problems.append(
                f"allocation.{place}={value!r}: method {found.method} shares nothing out over channels; pass "
                "allocation=none"
            )
    if "allocation" in fields and allocation.name not in ALLOCATIONS:
        problems.append(unknown_name("allocation.name", allocation.name, ALLOCATIONS, "rule"))
    if allocation.layer_budget not in BUDGETS:
        problems.append(unknown_name("allocation.layer_budget", allocation.layer_budget, BUDGETS, "rule"))
    lines: list[str] = []
    compressor = built(lambda: found(found.Options(**options)), lines)
    for line in lines + (compressor.problems() if compressor is not None else []):
        for key, place in _ALLOCATION_KEYS.items():
            line = line.replace(f"sketch.{key}=", f"allocation.{place}=")
        problems.append(line)
    return compressor


def of_another_method(key: str, chosen: str) -> str | None:
    """What to say about ``sketch.<key>``, which is an option of other methods than the chosen one; ``None`` otherwise.

    Raises:
        UserError: There is no such method.
    """
    mine = _sketch_keys(method(chosen))
    others = [name for name in METHODS if key in _sketch_keys(method(name))]
    if key in mine or not others:
        return None
    return f"belongs to method {' and '.join(others)}; {chosen} has {', '.join(mine)}"


def _without_effect(key: str) -> Any:
    """The value of an option of ``allocation`` that asks for nothing."""
    nothing = {"allocation": None, "layer_budget": "equal", "min_importance": 0.0}
    return (nothing | {"price_list": "untrained", "price_exponent": PRICE_EXPONENT})[key]


def _sketch_keys(found: type[Compressor]) -> list[str]:
    """Options of a method in the group ``sketch``."""
    return [field.name for field in dataclasses.fields(found.Options) if field.name not in _ALLOCATION_KEYS]
