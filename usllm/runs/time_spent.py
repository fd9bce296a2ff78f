"""How long blocks were trained for, of which some may have been in earlier calls."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from itertools import groupby
from typing import Any


def seconds_in_blocks(rows: Iterable[Mapping[str, Any]]) -> float:
    """Seconds that blocks were trained for, in whatever calls; 0.0 where none was.

    Args:
        rows: That reconstruction reports of the blocks in their order. Those of one window have the same number.
    """
    return math.fsum(seconds for seconds, _ in groupby(float(row.get("seconds") or 0.0) for row in rows))
