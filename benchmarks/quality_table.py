"""The comparison in docs/results.md and its short form in README.md, made from benchmarks/results/quality/*.json.

python benchmarks/quality_table.py           write both
python benchmarks/quality_table.py --check   say whether the pages are what the results give
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a script, it finds only its own folder there

from benchmarks.page_sections import between_markers
from benchmarks.quality_rows import MODEL, RATES, ROWS
from usllm.eval.bootstrap import interval
from usllm.runs.time_spent import seconds_in_blocks

ROOT = Path(__file__).parents[1]
KEPT = ROOT / "benchmarks" / "results" / "quality"
BEGIN, END = "<!-- quality: benchmarks/quality_table.py -->", "<!-- end of quality -->"
TEXTS = {"wikitext2": "WikiText-2", "imdb": "film reviews", "pydoc": "Python's documentation"}
AIMS = {"sign_0.5": (5.0, 3.2), "sign_1.0": (3.3, 2.4)}
"""Times dense on the first two texts that were to be reached, by the beginning of a row's name."""
NONE = "No row has been made yet."


def kept_rows(folder: Path = KEPT) -> list[dict[str, Any]]:
    """The kept results, in the order of the comparison; files of rows that no longer exist come last."""
    names = list(ROWS)
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
    return sorted(found, key=lambda row: names.index(row["row"]) if row["row"] in ROWS else len(names))


def full(rows: Sequence[Mapping[str, Any]]) -> str:
    """Tables of all rows, each model's by themselves; the one of README.md comes first."""
    if not rows:
        return NONE
    of_models: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        of_models.setdefault(_model(row), []).append(row)
    parts = []
    for model, its_rows in of_models.items():
        window = _figures(its_rows[0], next(iter(TEXTS)))["window"]
        above = [] if model == MODEL else [f"The same on {model}, in windows of {window} tokens:", ""]
        parts.append("\n".join([*above, _of_model(its_rows)]))
    made = sorted({(row["date"], row["machine"]["cpu"]) for row in rows})
    return "\n\n".join([*parts, "Made " + "; ".join(f"{date} on {cpu}" for date, cpu in made) + "."])


def _model(row: Mapping[str, Any]) -> str:
    return ROWS[row["row"]].model if row["row"] in ROWS else MODEL


def _of_model(rows: Sequence[Mapping[str, Any]]) -> str:
    """After training, then untrained and what a row costs."""
    dense = {text: _figures(rows[0], text)["dense"] for text in TEXTS}
    lines = [
        "Dense: " + ", ".join(f"{TEXTS[text]} {_number(value)}" for text, value in dense.items()) + ".",
        "",
        *_table(
            ["method", "bits", "seed", *[f"{name} (95 %), times dense (95 %)" for name in TEXTS.values()]],
            (
                [row["method"], _bits(row), str(row["config"]["seed"]), *[_with_ratio(row, t) for t in TEXTS]]
                for row in rows
            ),
        ),
        "",
        "The same runs before training (untrained figures mislead, [method.md](method.md) §5), after the blocks, and",
        "what they took by the clock, which goes on while a process is stopped:",
        "",
        *_table(
            [
                "method",
                "bits",
                "over all",
                "MB",
                *[f"{n}: untrained, blocks" for n in list(TEXTS.values())[:2]],
                "tokens end to end",
                "minutes in blocks, end to end",
            ],
            (
                [
                    row["method"],
                    _bits(row),
                    *_size(row),
                    *[_before(row, t) for t in list(TEXTS)[:2]],
                    f"{row['tokens']:,}",
                    _minutes(row),
                ]
                for row in rows
            ),
        ),
    ]
    if pairs := list(_pairs(rows)):
        lines += [
            "",
            "The sign sketch's perplexity over LittleBit's, at equal bits, tokens and seed, windows in pairs (95 %;",
            "at most 0.7 was asked for):",
            "",
        ]
        lines += _table(["bits asked", "seed", *TEXTS.values()], pairs)
    if aims := list(_aims(rows)):
        lines += ["", "What was asked for at this budget, and what came out (seed: WikiText-2, film reviews):", ""]
        lines += _table(["figure", "asked", "reached"], aims)
    long = [row for row in rows if row.get("long_windows")]
    if long:
        lines += ["", "All windows of 2,048 tokens of WikiText-2 (dense 21.98):", ""]
        lines += _table(
            ["method", "bits", "windows", "perplexity"],
            (
                [row["method"], _bits(row), str(each["windows"]), _number(each["perplexity"])]
                for row in long
                for each in row["long_windows"]
            ),
        )
    return "\n".join(lines)


def _pairs(rows: Sequence[Mapping[str, Any]]) -> Iterator[list[str]]:
    named = {row["row"]: row for row in rows}
    for name, row in named.items():
        other = named.get(name.replace("sign_", "littlebit_"))
        if not name.startswith("sign_") or other is None:
            continue
        found = []
        for text in TEXTS:
            place = f"{text}/{_figures(row, text)['window']}"
            ours, theirs = (each["window_losses"][place]["finetuned"] for each in (row, other))
            ratio = math.exp(math.fsum(ours) / len(ours) - math.fsum(theirs) / len(theirs))
            low, high = interval(ours, theirs)
            found.append(f"{ratio:.3f} ({low:.3f} to {high:.3f})")
        yield [str(row["bits_per_weight"]["asked"]), str(row["config"]["seed"]), *found]


def _aims(rows: Sequence[Mapping[str, Any]]) -> Iterator[list[str]]:
    """The aims that rows can be held against; each seed's figures by themselves."""
    texts, named = list(TEXTS)[:2], {row["row"]: row for row in rows}
    for beginning, most in AIMS.items():
        reached = {row["config"]["seed"]: row for name, row in named.items() if name.startswith(f"{beginning}_seed")}
        if reached:
            figures = (f"{seed}: " + ", ".join(f"{_ratio(r, t)[0]:.3g}" for t in texts) for seed, r in reached.items())
            rate = beginning.removeprefix("sign_")
            yield [
                f"sign sketch, {rate} bits, times dense",
                "at most " + ", ".join(f"{x:g}" for x in most),
                "; ".join(figures),
            ]
    for rate in RATES:
        trained, published = named.get(f"paper_plus_{rate}"), named.get(f"paper_{rate}")
        if trained and published:
            shares = (_figures(trained, t)["finetuned"] / _figures(published, t)["finetuned"] for t in texts)
            both = ", ".join(f"{share:.3g}" for share in shares)
            yield [f"AbsMaxMin over the paper's sketch, {rate} bits, perplexity", "shown to be lower", f"0: {both}"]


def short(rows: Sequence[Mapping[str, Any]]) -> str:
    """The table of README.md: a line for each method, seed 0, two texts at each rate, as ratio to the dense model."""
    texts = list(TEXTS)[:2]
    cells: dict[str, dict[float, str]] = {}
    for row in rows:
        rate = min(RATES, key=lambda rate: abs(rate - row["bits_per_weight"]["achieved"]))
        near = abs(rate - row["bits_per_weight"]["achieved"]) <= 0.1 and _model(row) == MODEL
        if row["config"]["seed"] == 0 and row["row"] in ROWS and ROWS[row["row"]].rate_of is None and near:
            figures = ", ".join(f"{_ratio(row, text)[0]:.3g}" for text in texts)
            cells.setdefault(row["method"], {})[rate] = f"{figures} ({row['bits_per_weight']['achieved']:.3f} bits)"
    if not cells:
        return NONE
    return "\n".join(
        _table(
            [
                "times dense, " + " and ".join(TEXTS[text] for text in texts),
                *[f"{rate:g} bit{'s' * (rate != 1)}" for rate in RATES],
            ],
            ([method, *[found.get(rate, "") for rate in RATES]] for method, found in cells.items()),
        )
    )


def _table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [headings, ["---"] * len(headings), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]


def _figures(row: Mapping[str, Any], text: str) -> Mapping[str, Any]:
    return next(each for each in row["perplexity"] if each["test_set"] == text)


def _interval(row: Mapping[str, Any], text: str) -> Mapping[str, Any]:
    found: Mapping[str, Any] = row["intervals"][f"{text}/{_figures(row, text)['window']}"]["finetuned"]
    return found


def _ratio(row: Mapping[str, Any], text: str) -> Sequence[float]:
    found: Sequence[float] = _interval(row, text)["over_dense"]
    return found


def _with_ratio(row: Mapping[str, Any], text: str) -> str:
    low, high = _interval(row, text)["perplexity"]
    ratio, least, most = _ratio(row, text)
    figure = _number(_figures(row, text)["finetuned"])
    return f"{figure} ({_number(low)} to {_number(high)}), {ratio:.3g} ({least:.3g} to {most:.3g})"


def _before(row: Mapping[str, Any], text: str) -> str:
    figures = _figures(row, text)
    return f"{_number(figures.get('sketched'))}, {_number(figures.get('reconstructed'))}"


def _bits(row: Mapping[str, Any]) -> str:
    return f"{row['bits_per_weight']['achieved']:.4f}"


def _size(row: Mapping[str, Any]) -> tuple[str, str]:
    return f"{row['bits_per_weight']['model']:.2f}", f"{row['bytes']['sketched'] / 1e6:.1f}"


def _minutes(row: Mapping[str, Any]) -> str:
    blocks = seconds_in_blocks(row["stages"].get("reconstruct", ()))
    return f"{blocks / 60:.0f}, {row['seconds']['training'] / 60:.0f}"


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    if not math.isfinite(value) or value >= 1e6:
        return f"{value:.1e}"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; what it returns is the exit status."""
    parser = argparse.ArgumentParser(description="Tables of docs/results.md and README.md from kept results.")
    parser.add_argument("--check", action="store_true", help="change nothing; status 1 if a page is another")
    check = parser.parse_args(arguments).check
    rows, changed = kept_rows(), False
    for page, text in ((ROOT / "docs" / "results.md", full(rows)), (ROOT / "README.md", short(rows))):
        before = page.read_text(encoding="utf-8")
        after = between_markers(before, BEGIN, END, text)
        changed |= after != before
        if not check and after != before:
            page.write_text(after, encoding="utf-8")
            print(page)
    if check and changed:
        print("the pages are not what the results give: run python benchmarks/quality_table.py", file=sys.stderr)
    return int(check and changed)


if __name__ == "__main__":
    sys.exit(main())
