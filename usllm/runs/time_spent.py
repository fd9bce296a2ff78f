"""How long a run has taken, of which some was in earlier calls."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from itertools import groupby
from typing import Any

from lightning.pytorch.callbacks import Timer


def seconds_in_blocks(rows: Iterable[Mapping[str, Any]]) -> float:
    """Seconds that blocks were trained for, in whatever calls; 0.0 where none was.

    Args:
        rows: That reconstruction reports of the blocks in their order. Those of one window have the same number.
    """
    return math.fsum(seconds for seconds, _ in groupby(float(row.get("seconds") or 0.0) for row in rows))


def seconds_spent(timer: Timer, invocation: float, continued: bool) -> dict[str, float | bool]:
    """Seconds for a report: of training end to end in all calls, and of this call.

    Args:
        timer: Of training, which goes on from checkpoint to checkpoint.
        invocation: Seconds since this call began.
        continued: Whether it may have gone on from something that an earlier one has left.
    """
    return {"training": timer.time_elapsed(), "total": invocation, "continued": continued}
