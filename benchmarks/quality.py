"""Quality per bit: the runs behind the comparison in docs/results.md, one after another.

python benchmarks/quality.py                 all rows that are not there yet (about 45 minutes each on two cores)
python benchmarks/quality.py NAME [NAME ...] these rows
python benchmarks/quality.py --list          their names

A run that was stopped goes on. What is kept of a finished one is benchmarks/results/quality/NAME.json;
``python benchmarks/quality_table.py`` makes the tables from these files.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a script, it finds only its own folder there

from benchmarks.quality_rows import ROWS, Row

ROOT = Path(__file__).parents[1]
KEPT = ROOT / "benchmarks" / "results" / "quality"
LONG = (
    "evaluation.windows=[2048]",
    "evaluation.max_windows=null",
    "+evaluation.test_sets.imdb=null",
    "+evaluation.test_sets.pydoc=null",
)
"""All windows of WikiText-2, beside a checkpoint that would be measured on its run's texts."""
_DROPPED = ("callbacks", "logger", "hydra")
"""Parts of a configuration that change no figure."""


def overrides_of(row: Row, run: Path, kept: Path = KEPT) -> list[str]:
    """What ``usllm-train`` is asked for.

    Raises:
        FileNotFoundError: The row that this one takes its rate from was not made yet.
    """
    found = [*row.overrides]
    if row.rate_of is not None:
        path = kept / f"{row.rate_of}.json"
        if not path.is_file():
            raise FileNotFoundError(f"{row.name} has the bits of {row.rate_of}: make that row first")
        rate = json.loads(path.read_text(encoding="utf-8"))["bits_per_weight"]["achieved"]
        found.append(f"sketch.bits_per_weight={rate}")
    return [*found, f"name={row.name}", f"run_dir={run}", "resume=true"]


def outcome(row: Row, run: Path, long: dict[str, Any] | None = None) -> dict[str, Any]:
    """What is kept of a finished run.

    Args:
        row: Of the comparison.
        run: Folder of the run.
        long: The result of a measurement on long windows.
    """
    report = json.loads((run / "report.json").read_text(encoding="utf-8"))
    windows = json.loads((run / "windows.json").read_text(encoding="utf-8"))
    keys = ("bits_per_weight", "bytes", "perplexity", "intervals", "stages", "steps", "tokens", "seconds", "machine")
    return {
        "row": row.name,
        "method": row.method,
        "command": shlex.join(["usllm-train", *row.overrides]),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        **{key: report[key] for key in keys},
        "long_windows": None if long is None else long["perplexity"],
        "window_losses": windows,
        "code": report["code"],
        "config": {key: value for key, value in report["config"].items() if key not in _DROPPED},
    }


def make(row: Row, runs: Path, kept: Path = KEPT) -> Path:
    """Run a row, or what is left of it; the file that keeps it.

    Raises:
        subprocess.CalledProcessError: The run failed; it has said why.
    """
    run = runs / row.name
    environment = {"USLLM_DATA": str(ROOT.parent / "shared" / "data"), **os.environ}
    command = [sys.executable, "-m", "usllm.cli.train", *overrides_of(row, run, kept)]
    subprocess.run(command, check=True, env=environment)
    long = None
    if row.long:
        folder = run / "long_windows"
        again = [sys.executable, "-m", "usllm.cli.eval", f"ckpt={run}", *LONG, f"run_dir={folder}"]
        subprocess.run(again, check=True, env=environment)
        long = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
    kept.mkdir(parents=True, exist_ok=True)
    target = kept / f"{row.name}.json"
    beside = target.with_suffix(".part")
    beside.write_text(compact(outcome(row, run, long)), encoding="utf-8")
    beside.replace(target)
    return target


def compact(content: dict[str, Any]) -> str:
    """JSON with one line for each key, so that versions can be compared."""
    lines = (f"{json.dumps(key)}: {json.dumps(value, sort_keys=True)}" for key, value in content.items())
    return "{\n" + ",\n".join(lines) + "\n}\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; what it returns is the exit status."""
    parser = argparse.ArgumentParser(description="Runs behind the comparison of docs/results.md.")
    parser.add_argument("rows", nargs="*", metavar="NAME", help="rows to make; those that are missing by default")
    parser.add_argument("--runs", type=Path, default=Path("runs/quality"), help="folder of the runs")
    parser.add_argument("--list", action="store_true", help="print the names of all rows")
    found = parser.parse_args(arguments)
    if found.list:
        print("\n".join(ROWS))
        return 0
    if unknown := [name for name in found.rows if name not in ROWS]:
        print(f"quality.py: {unknown[0]}: no such row; see --list", file=sys.stderr)
        return 2
    names = found.rows or [name for name in ROWS if not (KEPT / f"{name}.json").is_file()]
    for name in names:
        try:
            print(make(ROWS[name], found.runs.resolve()))
        except FileNotFoundError as error:
            print(f"quality.py: {error}", file=sys.stderr)
            return 2
        except subprocess.CalledProcessError as error:
            print(f"quality.py: {name} ended with status {error.returncode}; call again to go on", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
