"""How long a run has taken, over all calls that it took."""

from __future__ import annotations

import math
from pathlib import Path

from lightning.pytorch.callbacks import Timer

from usllm.system.run_files import found_by_stages


def seconds_in_blocks(run_dir: Path) -> float:
    """Seconds that the finished blocks of a run were trained for, in whatever calls; 0.0 where there is none."""
    rows = [row for found in found_by_stages(run_dir).values() for row in found if isinstance(row, dict)]
    return math.fsum(row.get("seconds", 0.0) for row in rows)


def seconds_spent(timer: Timer, invocation: float, earlier: float, continued: bool) -> dict[str, float | bool]:
    """Seconds of training end to end and in all, for a report.

    Args:
        timer: Of training, which goes on from checkpoint to checkpoint.
        invocation: Seconds since this call began.
        earlier: Seconds of blocks that were finished when it began.
        continued: Whether it goes on from something: what earlier calls spent on their starts, on measuring and on
            what was lost is known to nobody.
    """
    started, ended = timer.start_time(), timer.end_time()
    here = ended - started if started is not None and ended is not None else 0.0
    training = timer.time_elapsed()
    return {"training": training, "total": invocation + earlier + training - here, "continued": continued}
