"""The figures of docs/results.md, made from the kept results of ``benchmarks/gpu.py``.

python benchmarks/gpu_table.py                write the tables into docs/results.md
python benchmarks/gpu_table.py --add DIR      keep DIR/results.jsonl as benchmarks/results/gpu_<card>.jsonl first
python benchmarks/gpu_table.py --check        say whether the page is what the results give
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a script, it finds only its own folder there

from benchmarks.gpu_parts.results import Refused, Results
from benchmarks.gpu_parts.table import card_of, file_name, page_with, section

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "results.md"
KEPT = ROOT / "benchmarks" / "results"


def kept_results(folder: Path = KEPT) -> list[Results]:
    """The files of all cards, by name."""
    return [Results(path) for path in sorted(folder.glob("gpu_*.jsonl"))]


def add(out: Path, folder: Path = KEPT) -> Path:
    """Keep the results of a run under the name of its card.

    Raises:
        Refused: There are none, or they are those of a dry run.
    """
    source = Results(out / "results.jsonl")
    card = card_of(source)
    if card is None:
        raise Refused(f"{source.path} holds no results of a card: run benchmarks/gpu.py --out {out} on one first")
    if "dry run" in card:
        raise Refused(f"{source.path} is of a dry run: its figures say nothing, run on a card")
    target = folder / file_name(card)
    shutil.copy(source.path, target)
    return target


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; what it returns is the exit status."""
    parser = argparse.ArgumentParser(description="Tables of docs/results.md from benchmarks/results/gpu_<card>.jsonl.")
    parser.add_argument("--add", type=Path, metavar="DIR", help="keep the results of a run first")
    parser.add_argument("--check", action="store_true", help="change nothing; status 1 if the page is another")
    found = parser.parse_args(arguments)
    try:
        if found.add:
            print(add(found.add))
        before = PAGE.read_text(encoding="utf-8")
        after = page_with(before, section(kept_results()))
    except Refused as error:
        print(f"gpu_table.py: {error}", file=sys.stderr)
        return 2
    if found.check:
        if after != before:
            print(f"{PAGE} is not what the results give: run python benchmarks/gpu_table.py", file=sys.stderr)
        return int(after != before)
    PAGE.write_text(after, encoding="utf-8")
    print(PAGE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
