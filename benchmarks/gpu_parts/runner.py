"""The command line of ``benchmarks/gpu.py``, and the order of the parts under one clock."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu_parts.results import COMPLETE, Refused, Results
from benchmarks.gpu_parts.schedule import ENVIRONMENT, FINETUNING, PARTS, Part, part_end
from benchmarks.gpu_parts.supervise import run_part
from benchmarks.gpu_parts.table import section

FILE = "results.jsonl"
_RESERVE = 4.0  # seconds at the end for processes that have to be killed
REFUSED = 2


def run(
    parts: Sequence[Part],
    out: Path,
    minutes: float,
    *,
    options: Mapping[str, Any] | None = None,
    dry_run: bool = False,
    started: float | None = None,
    path: str = "",
) -> int:
    """Run what is missing of some parts, one after another, within a time that is never exceeded.

    Args:
        parts: In their order.
        out: Folder of ``results.jsonl``; made if it is not there.
        minutes: For everything.
        options: For the parts.
        dry_run: Everything small, on the CPU.
        started: When the minutes began, on :func:`time.monotonic`; now, if not given.
        path: More folders with modules of parts.

    Returns:
        Exit status: 0 where all parts are complete, 1 where something is missing, 2 where nothing could be done.
    """
    began = time.monotonic() if started is None else started
    end = began + 60 * minutes
    end -= min(_RESERVE, 0.2 * 60 * minutes)
    out.mkdir(parents=True, exist_ok=True)
    results = Results(out / FILE)
    call = results.last_call() + 1
    results.append("call", str(call), "begun", call=call, minutes=minutes, dry_run=dry_run)
    todo = [part for part in parts if part.essential or not results.is_complete(part.name)]
    complete = True
    for number, part in enumerate(todo):
        until = part_end(time.monotonic(), end, todo[number:], dry_run)
        status = run_part(part, results, call, until, options or {}, dry_run, path)
        if part.essential and status != COMPLETE:
            _say_why(results, part, call)
            return REFUSED
        complete = complete and status == COMPLETE
    return 0 if complete else 1


def _say_why(results: Results, part: Part, call: int) -> None:
    for line in results.lines():
        if line["part"] == part.name and line.get("call") == call and line["key"] and line.get("error"):
            print(str(line["error"]).strip().splitlines()[-1], file=sys.stderr)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line, checked.

    Raises:
        Refused: Values that do not go together.
    """
    parser = argparse.ArgumentParser(prog="gpu.py", description="Everything that a CUDA card has to show, in minutes.")
    parser.add_argument(
        "--out", required=True, type=Path, help="folder of results.jsonl; called again, the rest is run"
    )
    parser.add_argument("--minutes", type=float, default=9.0, help="that are never exceeded")
    parser.add_argument(
        "--model", type=Path, help="dense model to finetune (benchmarks/gpu_inputs.py makes the folder)"
    )
    parser.add_argument("--tokens", type=Path, help="its text as token ids, .npy (made by the same)")
    parser.add_argument("--bits", type=float, default=1.0, help="per weight, of the finetuned model")
    parser.add_argument("--only", nargs="+", choices=[part.name for part in (*PARTS, FINETUNING)], help="some parts")
    parser.add_argument("--dry-run", action="store_true", help="everything small, on the CPU, kernels interpreted")
    found = parser.parse_args(arguments)
    if found.minutes <= 0:
        raise Refused(f"--minutes={found.minutes} must be above 0")
    if (found.model is None) != (found.tokens is None):
        raise Refused(f"--model={found.model} and --tokens={found.tokens} belong together: give both or neither")
    for option in ("model", "tokens"):
        place = getattr(found, option)
        if place is not None and not place.exists() and not list(place.parent.glob(f"{place.name}.part-*")):
            raise Refused(f"--{option}={place} is not there: make it with benchmarks/gpu_inputs.py make")
    return found


def main(arguments: Sequence[str] | None = None, started: float | None = None) -> int:
    """Run the command line; what it returns is the exit status."""
    try:
        found = parse(arguments)
        with_model = found.model is not None or found.dry_run
        parts = [ENVIRONMENT, *PARTS, *([FINETUNING] if with_model else [])]
        if found.only:
            parts = [part for part in parts if part.essential or part.name in found.only]
        options = {"bits": found.bits, "out": str(found.out.absolute())}
        options |= {name: str(getattr(found, name).absolute()) for name in ("model", "tokens") if getattr(found, name)}
        status = run(parts, found.out, found.minutes, options=options, dry_run=found.dry_run, started=started)
    except Refused as error:
        print(f"gpu.py: {error}", file=sys.stderr)
        return REFUSED
    if status != REFUSED:
        print(f"\n{section([Results(found.out / FILE)])}")
        print(f"\nresults: {found.out / FILE}\nto keep them: python benchmarks/gpu_table.py --add {found.out}")
    return status
