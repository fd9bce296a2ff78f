"""The points of a run at which perplexity is measured: their names in files and metrics, and their headings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

DENSE, SKETCHED, RECONSTRUCTED, FINETUNED = "dense", "sketched", "reconstructed", "finetuned"
HEADINGS = {
    DENSE: "dense",
    SKETCHED: "sketched",
    RECONSTRUCTED: "reconstructed",
    FINETUNED: "finetuned",
}
"""Name -> heading, in the order of a run; ``sketched`` is the compressed model before anything has trained it."""
_EARLIER = {"before": SKETCHED, "after": FINETUNED}


def with_todays_names(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of perplexities, or stages by name, of any version, under the names of today."""
    return {_EARLIER.get(key, key): value for key, value in row.items()}
