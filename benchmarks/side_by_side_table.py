"""The comparison with what a user would take instead, in docs/results.md, from benchmarks/results/side_by_side.json.

python benchmarks/side_by_side_table.py           write table and picture
python benchmarks/side_by_side_table.py --check   say whether the page is what the result gives
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a script, it finds only its own folder there

from benchmarks.page_sections import between_markers
from usllm.reports.style import ALLOCATION_COLOURS, DENSE_COLOUR, new_figure, png, styled

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks" / "results" / "side_by_side.json"
PICTURE = ROOT / "benchmarks" / "results" / "side_by_side.png"
BEGIN, END = "<!-- side by side: benchmarks/side_by_side_table.py -->", "<!-- end of side by side -->"
DENSE = "dense, bf16"
_TICKS = (10, 20, 30, 50, 100, 200, 500, 1000, 2000, 5000, 10_000)
_MOST = 1e6
"""Perplexity beyond which a point would push all others together; it is named instead."""
_CLOCKS = {
    "wall": "seconds of the clock",
    "cpu": "seconds that the process computed, since other work shared the machine",
}


def table(result: Mapping[str, Any]) -> str:
    """The table, with what it stands on before it."""
    rows = result["rows"]
    dense = next(row for row in rows if row["name"] == DENSE and row["engine"] == "transformers")
    threads = result["threads"]
    # Of the sorted keys the first is when a call began.
    calls = [json.loads(call) for call in sorted({json.dumps(row["call"], sort_keys=True) for row in rows})]
    lines = [
        f"{result['machine']['cpu']}, {threads} thread{'s' * (threads != 1)}, batch 1, "
        f"{_CLOCKS[result['clock']]}; {result['llama_cpp'] or 'without llama.cpp'}, "
        f"{result['vllm'] or 'without vLLM'}. Perplexity on the first {result['windows']} windows of "
        f"{result['window']} tokens of `{result['text']}`.",
        "",
        "| model | in | MB | perplexity | tokens/s | over dense | prompt tokens/s | peak MB | call |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        cells = [
            f"**{row['name']}**" if row["ours"] else row["name"],
            row["engine"],
            f"{row['bytes'] / 1e6:.1f}",
            _perplexity(row["perplexity"]),
            f"{row['tokens_per_second']:.1f}",
            f"{row['tokens_per_second'] / dense['tokens_per_second']:.2f}",
            f"{row['prompt_tokens_per_second']:.0f}",
            f"{row['peak'] / 1e6:.0f}",
            str(calls.index(row["call"]) + 1),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    if result["not_measured"]:
        lines += ["", f"Not measured: {'; '.join(result['not_measured'])}."]
    if len(calls) > 1:
        lines += ["", "Rows of different calls differ by what else the machine did, too."]
    lines += ["", *(f"{number}. {_call(call)}" for number, call in enumerate(calls, 1))]
    return "\n".join(lines)


def _call(call: Mapping[str, Any]) -> str:
    code, commit = call["code"], "no commit known"
    if "commit" in code:
        commit = f"commit {code['commit'][:10]}{' and changes' * code['changed']}"
    return f"{call['began']}, {commit}: `{call['command']}`"


def _perplexity(value: float) -> str:
    return f"{value:.2f}" if value < 1000 else f"{value:,.0f}"


@styled
def picture(result: Mapping[str, Any]) -> bytes:
    """Perplexity against bytes and against tokens per second, a point for each model: a PNG."""
    figure, axes = new_figure(10, 4.6, columns=2)
    shown = [row for row in result["rows"] if row["perplexity"] <= _MOST]
    beyond = [f"{_short(row['name'])} ({row['perplexity']:,.0f})" for row in result["rows"] if row not in shown]
    heights = [row["perplexity"] for row in shown]
    ticks = [tick for tick in _TICKS if 0.8 * min(heights) < tick < 1.5 * max(heights)]
    ours, gguf = ALLOCATION_COLOURS["waterfill"], ALLOCATION_COLOURS["proportional"]
    kinds = {
        "packed, in transformers": (ours, "o", ours),
        "packed, in vLLM": (ours, "o", "none"),
        "dense, in transformers": (DENSE_COLOUR, "s", DENSE_COLOUR),
        "dense, in vLLM": (DENSE_COLOUR, "s", "none"),
        "GGUF, in llama.cpp": (gguf, "^", gguf),
    }
    for axis, key, label, scale in zip(
        axes, ("bytes", "tokens_per_second"), ("MB of weight files", "tokens/s, batch 1"), (1e6, 1), strict=True
    ):
        for name, (colour, marker, inside) in kinds.items():
            rows = [row for row in shown if _kind(row) == name]
            points = [(row[key] / scale, row["perplexity"]) for row in rows]
            across, up = zip(*points, strict=True) if points else ((), ())
            axis.scatter(across, up, edgecolors=colour, facecolors=inside, marker=marker, label=name, zorder=3)
            if "vLLM" in name if key == "bytes" else "packed" in name:
                continue  # a model has its name once, and by its file
            for at, (row, point) in enumerate(zip(rows, points, strict=True)):
                place = (5, (4, -11, 14)[at % 3])  # neighbours of nearly equal perplexity
                axis.annotate(_short(row["name"]), point, place, textcoords="offset points", fontsize=7)
        axis.set_xlabel(label)
        axis.set_ylabel("perplexity")
        axis.set_yscale("log")
        axis.set_yticks(ticks, [f"{tick:,}" for tick in ticks])  # the style shows no mathematics
        axis.minorticks_off()
        axis.margins(x=0.25, y=0.15)
        axis.grid(visible=True)
    axes[0].set_title("Left and low is better" + "".join(f"; not shown: {name}" for name in beyond))
    axes[1].set_title("Right and low is better")
    axes[1].legend(loc="center right")
    return png(figure, dpi=110)


def _kind(row: Mapping[str, Any]) -> str:
    if row["engine"] == "llama.cpp":
        return "GGUF, in llama.cpp"
    return f"{'packed' if row['ours'] else 'dense'}, in {row['engine']}"


def _short(name: str) -> str:
    short = name.removesuffix(" of the dense model").removesuffix(", the file on PyPI")
    return short.replace("sign sketch at ", "").replace(" bits, rest ", " · ")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; what it returns is the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing; status 1 if the page is another")
    check = parser.parse_args(arguments).check
    result, page = json.loads(RESULT.read_text(encoding="utf-8")), ROOT / "docs" / "results.md"
    before = page.read_text(encoding="utf-8")
    after = between_markers(before, BEGIN, END, table(result))
    if check:
        if after != before:
            print("the page is not what the result gives: run python benchmarks/side_by_side_table.py", file=sys.stderr)
        return int(after != before)
    page.write_text(after, encoding="utf-8")
    PICTURE.write_bytes(picture(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
