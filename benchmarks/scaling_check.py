"""What small models held at most on the CPU, against what benchmarks/scaling_stages.py counts of them."""

from __future__ import annotations

import json
import os
import socket
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
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = SETUPS[strategy]
    launched = {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "GROUP_RANK": 0, "TORCHELASTIC_RUN_ID": "check"}
    launched |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
    line = [sys.executable, str(Path(__file__).with_name("scaling_peaks.py")), strategy]
    started = [
        subprocess.Popen(
            line,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=os.environ
            | ({name: str(value) for name, value in ({**launched, "RANK": rank, "LOCAL_RANK": rank}).items()}),
        )
        for rank in range(ranks)
    ]
    outputs = [process.communicate()[0] for process in started]
    if any(process.returncode for process in started):
        raise RuntimeError(f"{' '.join(line)}: has failed; run it alone to see why")
    found: dict[str, dict[str, int]] = json.loads(outputs[0].splitlines()[-1])
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
