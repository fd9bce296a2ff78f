"""What small models held at most on the CPU, against what benchmarks/scaling_stages.py counts of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from benchmarks.scaling_counts import build, counted
from benchmarks.scaling_peaks import BATCH, CONTEXT, MODEL, SEQUENCES, SKETCH
from benchmarks.scaling_stages import OBJECTIVES, Setup, measured_as, stages

TOLERANCE = 0.1
SETUPS = {"auto": 1, "ddp": 2, "fsdp2": 2}
"""Ranks by strategy."""


def setup_of(strategy: str) -> Setup:
    """The column that a small run is."""
    return Setup(
        strategy,
        SETUPS[strategy],
        sharded=strategy == "fsdp2",
        checkpointing=False,
        on_cpu=True,
        context=CONTEXT,
        streamed=SEQUENCES * CONTEXT,
        step=BATCH * CONTEXT,
    )


def expected(strategy: str, objective: str) -> dict[str, int]:
    """Bytes by stage, counted."""
    setup = setup_of(strategy)
    return measured_as(stages(counted(build(MODEL), setup, SKETCH), setup, objective), setup)


def measured(strategy: str) -> dict[str, dict[str, int]]:
    """Bytes by objective and stage, of rank 0; all ranks are processes of their own."""
    script, ranks = str(Path(__file__).with_name("scaling_peaks.py")), SETUPS[strategy]
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    line = [sys.executable, *launcher, script, strategy]
    done = subprocess.run(line, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise RuntimeError(f"{' '.join(line)}: has failed\n{done.stderr[-2000:]}")
    found: dict[str, dict[str, int]] = json.loads(done.stdout.splitlines()[-1])
    return found


def check() -> int:
    """Print counted and measured peaks; 1 where one is more than 10 % from the other."""
    print(f"{'strategy':10}{'objective':15}{'stage':13}{'counted MB':>11}{'measured MB':>12}{'ratio':>7}")
    worst = 0.0
    for strategy in SETUPS:
        peaks = measured(strategy)
        for objective in OBJECTIVES:
            for stage, wanted in expected(strategy, objective).items():
                found = peaks[objective][stage]
                worst = max(worst, abs(wanted / found - 1))
                line = f"{strategy:10}{objective:15}{stage:13}{wanted / 1e6:11.1f}{found / 1e6:12.1f}"
                print(f"{line}{wanted / found:7.3f}", flush=True)
    print(f"worst: {worst:.1%} of {TOLERANCE:.0%}")
    return int(worst > TOLERANCE)
