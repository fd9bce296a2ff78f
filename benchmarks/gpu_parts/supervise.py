"""Runs the processes of one part until it is done or its time is over; no process outlives that."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

from benchmarks.gpu_parts.child import AGAIN, UNMET
from benchmarks.gpu_parts.results import COMPLETE, CRASHED, CUT, HUNG, INCOMPLETE, Results
from benchmarks.gpu_parts.schedule import DRY_PATIENCE, Part

ROOT = Path(__file__).parents[2]
_LOOK_EVERY = 0.05
_TO_TELL = 0.5  # seconds that a process has to write where it was before it is killed
_TO_DIE = 3.0  # seconds that are waited for a killed one; the driver may hold on to it
_MOST_STARTS = 25
_LONGEST_ERROR = 4000


def run_part(
    part: Part, results: Results, call: int, end: float, options: Mapping[str, Any], dry_run: bool, path: str = ""
) -> str:
    """Run one part to its end.

    Args:
        part: Which.
        results: Where its lines go; a line of the part itself comes last.
        call: Number of the runner's call.
        end: When its time is over, on :func:`time.monotonic`.
        options: For the part.
        dry_run: For the part.
        path: More folders with modules.

    Returns:
        ``complete`` or ``incomplete``.
    """
    started = time.monotonic()
    workers = 1 if dry_run else part.workers

    def work(worker: int) -> list[str]:
        told = {
            "part": part.name,
            "module": part.module,
            "results": str(results.path),
            "call": call,
            "end": end,
            "dry_run": dry_run,
            "patience": part.patience * (DRY_PATIENCE if dry_run else 1.0),
            "worker": worker,
            "workers": workers,
            "options": dict(options),
        }
        return _until_done(part, told, results, _environment(path))

    with ThreadPoolExecutor(workers) as pool:
        problems = [problem for found in pool.map(work, range(workers)) for problem in found]
    status = INCOMPLETE if problems else COMPLETE
    seconds = round(time.monotonic() - started, 2)
    results.append(part.name, "", status, call=call, seconds=seconds, **({"error": problems[0]} if problems else {}))
    print(f"{part.name:12} {status} after {seconds:.1f} s{''.join(f'; {p}' for p in problems[:1])}", flush=True)
    return status


def _until_done(part: Part, told: dict[str, Any], results: Results, environment: dict[str, str]) -> list[str]:
    """Start processes for one worker until all is measured or time is over; what is missing, in words."""
    problems: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        for start in range(_MOST_STARTS):
            if told["end"] - time.monotonic() <= 0:
                return [*problems, f"worker {told['worker']}: no time was left"]
            running = Path(folder, f"running{start}")
            with open(Path(folder, f"errors{start}"), "w+b") as errors:
                status, ended, late = _one_process({**told, "running": str(running)}, errors, environment)
                tail = _tail(errors)
            if status in (0, UNMET):
                return problems + (["something failed or had no time"] if status else [])
            key = running.read_text(encoding="utf-8") if running.exists() else ""
            if status == AGAIN:
                problems.append(f"{key}: the card was lost")
                continue
            name = key or f"worker {told['worker']}"
            lasted = f" with status {status}" if ended == CRASHED else f" after {late} s"
            problems.append(f"{name}: {ended}{lasted}")
            results.append(part.name, name, ended, call=told["call"], error=tail, exit=status)
            if not key:  # before any measurement: another process would do the same
                return problems
    return [*problems, f"worker {told['worker']}: {_MOST_STARTS} processes died"]


def _one_process(told: dict[str, Any], errors: IO[bytes], environment: dict[str, str]) -> tuple[int, str, float]:
    """Exit status of one process, how it ended, and the seconds that its last measurement had."""
    command = [sys.executable, "-m", "benchmarks.gpu_parts.child", json.dumps(told)]
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=errors, start_new_session=True)
    running, began, before = Path(told["running"]), time.monotonic(), -1.0
    try:
        while True:
            try:
                return process.wait(_LOOK_EVERY), CRASHED, round(time.monotonic() - began, 1)
            except subprocess.TimeoutExpired:
                pass
            changed = running.stat().st_mtime if running.exists() else 0.0
            if changed != before:
                before, began = changed, time.monotonic()
            now = time.monotonic()
            if now > min(told["end"], began + told["patience"]):
                _end(process)
                ended = HUNG if now > began + told["patience"] else CUT
                return process.returncode if process.returncode is not None else -9, ended, round(now - began, 1)
    finally:
        if process.poll() is None:
            _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Let it write where it is, then kill it with all that it started; it may hang in the driver even then."""
    for number, seconds in ((signal.SIGABRT, _TO_TELL), (signal.SIGKILL, _TO_DIE)):
        try:
            if number == signal.SIGKILL:
                os.killpg(process.pid, number)
            else:
                process.send_signal(number)
            process.wait(seconds)
        except ProcessLookupError:
            continue
        except subprocess.TimeoutExpired:
            continue


def _tail(errors: IO[bytes]) -> str:
    size = errors.seek(0, os.SEEK_END)
    errors.seek(max(size - _LONGEST_ERROR, 0))
    return errors.read().decode(errors="replace")


def _environment(path: str) -> dict[str, str]:
    """This repository's modules come first, whether or not it is installed."""
    folders = [path, str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    paths = os.pathsep.join(folder for folder in folders if folder)
    offline = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}
    return {**os.environ, **offline, "PYTHONPATH": paths}
