"""What the user typed beside a checkpoint: an override changes what it names and nothing else, or is refused.

A checkpoint brings the configuration of its run. Hydra has composed the defaults of another command with what was
typed, so only the keys that were typed may be taken from there.
"""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

from usllm.config.schema import EvaluationConfig

_GROUP = "evaluation"
_TEST_SETS = "test_sets"
_KEY = re.compile(r"^[+~]*([^=@]+)")


def key_of(override: str) -> str:
    """The dotted key of an override of Hydra's grammar: ``evaluation.windows`` of ``++evaluation.windows=[64]``."""
    match = _KEY.match(override)
    return match[1] if match else ""


def group_of(override: str) -> str:
    """The first part of an override's key."""
    return key_of(override).partition(".")[0]


def evaluation_beside(run: Mapping[str, Any], composed: EvaluationConfig, given: Sequence[str]) -> dict[str, Any]:
    """The group ``evaluation`` of a run with what the user typed changed in it.

    A single key replaces that key. A test set that is given with its kind is a new one, whatever the run had under its
    name; one key of a test set changes that key; ``~`` or ``null`` removes. Choosing an option of the group
    (``evaluation=files``) names all of it.

    Args:
        run: the group as the run stored it.
        composed: the group as Hydra composed it, of which only what was typed is used.
        given: the overrides that were typed.

    Returns:
        Plain Python, to be checked as any other section.
    """
    keys = [key_of(override) for override in given if group_of(override) == _GROUP]
    values = dataclasses.asdict(composed)
    if _GROUP in keys:
        return values
    changed: dict[str, Any] = copy.deepcopy(dict(run))
    with_kind = {key.removesuffix(".kind") for key in keys if key.endswith(".kind")}
    for test_set in (f"{_GROUP}.{_TEST_SETS}.{name}" for name in values[_TEST_SETS]):  # in the order that was typed
        if test_set in with_kind:
            _set(changed, values, test_set.split(".")[1:])
    for key in keys:
        _set(changed, values, key.split(".")[1:])
    return changed


def _set(target: dict[str, Any], source: Mapping[str, Any], path: Sequence[str]) -> None:
    """Give ``target`` at ``path`` what ``source`` holds there; what ``source`` lacks is removed."""
    *parents, last = path
    for name in parents:
        source = source.get(name) or {}
        inner = target.get(name)
        target[name] = inner if isinstance(inner, dict) else {}
        target = target[name]
    if last in source:
        target[last] = source[last]
    else:
        target.pop(last, None)


def idle_beside_checkpoint(ckpt: str, given: Sequence[str], decided: Sequence[str]) -> list[str]:
    """One line for each override that a checkpoint decides.

    Args:
        ckpt: the checkpoint, as it was given.
        given: the overrides that were typed.
        decided: groups and keys that the checkpoint decides.
    """
    return [
        f"{override.lstrip('+~')}: ckpt={ckpt} decides that; leave it out"
        for override in given
        if group_of(override) in decided
    ]


def idle_beside_packed(folder: str, given: Sequence[str], decided: Sequence[str]) -> list[str]:
    """One line for each override that a packed model decides; those of ``model`` that say which it is are none.

    Args:
        folder: of the packed model.
        given: the overrides that were typed.
        decided: groups and keys that it decides.
    """
    named = ("model", *(f"model.{key}" for key in ("kind", "name", "file", "revision")))
    return [
        f"{override.lstrip('+~')}: model={folder} decides that; leave it out"
        for override in given
        if group_of(override) in decided and key_of(override) not in named
    ]
