"""``quantization_config`` of format version 1, which knew the sketch alone, as what version 2 says, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from usllm.packed.plain import check_version, shorten
from usllm.sketch.hash import HASH_VERSION
from usllm.system.errors import PackedFormatError

_FORMAT = ("operator", "query", "hash", "group_size", "output_scale", "seed")
_OPTIONS = ("bits_per_weight", "rows", "state_bits", "rounding", "allocation", "layer_budget", "min_importance")


def from_version_1(content: Mapping[str, Any]) -> dict[str, Any]:
    """``method``, ``method_version``, ``format`` and ``options`` of a section of version 1.

    Raises:
        PackedFormatError: A key is missing or unknown; named.
    """
    section, known = content.get("sketch"), {*_FORMAT, *_OPTIONS}
    if not isinstance(section, Mapping) or set(section) != known:
        odd = sorted(set(section) ^ known) if isinstance(section, Mapping) else section
        raise PackedFormatError(f"quantization_config.sketch: keys are missing or unknown: {shorten(odd)}")
    try:
        check_version("hash_version", content.get("hash_version"), HASH_VERSION)
    except ValueError as error:
        raise PackedFormatError(f"quantization_config.{error}") from error
    return {
        "method": "sketch",
        "method_version": 1,
        "format": {"hash_version": HASH_VERSION} | {key: section[key] for key in _FORMAT},
        "options": {key: section[key] for key in _OPTIONS},
    }


def to_version_1(kept: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Inverse of :func:`from_version_1`."""
    sketch = {key: value for key, value in kept.items() if key != "hash_version"}
    return {"hash_version": kept["hash_version"], "sketch": sketch | {key: options[key] for key in _OPTIONS}}
