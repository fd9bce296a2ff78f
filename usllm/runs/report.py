"""The report of a run: plain data for ``report.json``, and the table that closes a run on the screen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from usllm.compress.coverage import Coverage
from usllm.data.windows import EACH, NONE
from usllm.system.machine import machine_line
from usllm.system.stage_names import DENSE, FINETUNED, HEADINGS, with_todays_names
from usllm.system.text import human_seconds, perplexity_text


def perplexity_table(rows: list[dict[str, Any]], title: str | None = None, *, tokens: bool = True) -> Table:
    """Perplexities by test set and window.

    Args:
        rows: one per test set and window: ``test_set``, ``window``, ``tokens``, ``window_start``, and a figure for some
            of the points of :mod:`usllm.system.stage_names` and ``perplexity``.
        title: above it.
        tokens: whether it has a column for them; beside the four figures of a run that would not fit into 80 signs.
    """
    rows = [with_todays_names(row) for row in rows]
    stages = [
        (key, heading)
        for key, heading in (*HEADINGS.items(), ("perplexity", "perplexity"))
        if any(key in r for r in rows)
    ]
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column("test set")
    table.add_column("window, start", justify="right")
    if tokens:
        table.add_column("tokens", justify="right")
    for _, heading in stages:
        table.add_column(heading, justify="right")
    for row in rows:
        figures = [_figure(row.get(key)) for key, _ in stages]
        place = [str(row["test_set"]), f"{row['window']}, {_window_start(row)}"]
        table.add_row(*place, *([_tokens(row)] if tokens else []), *figures)
    return table


def print_facts(facts: list[tuple[str, str]], console: Console) -> None:
    """One line each: what, and its value. Long lines stay whole, so that paths can be copied."""
    width = max(len(name) for name, _ in facts) + 2
    for name, value in facts:
        console.print(Text(name.ljust(width), style="bold") + Text(value), soft_wrap=True)


def print_warnings(warnings: Sequence[str], console: Console) -> None:
    """One line each about the figures above."""
    for warning in warnings:
        console.print(f"warning: {warning}", style="yellow", markup=False, soft_wrap=True)


def print_report(report: dict[str, Any], console: Console | None = None) -> None:
    """Print the closing tables of a finetuning run (the content of ``report.json``)."""
    console = console or Console()
    console.print()
    console.print(perplexity_table(report["perplexity"], title=f"Perplexity, {report['name']}", tokens=False))
    print_samples(report.get("samples", []), console)
    print_facts([*_measured(report), *_certainty(report), *_size_facts(report), *_run_facts(report)], console)
    for warning in (report.get("health") or {}).get("warnings", []):
        console.print(f"warning (step {warning['step']}): {warning['message']}", style="yellow", markup=False)
    print_warnings(report.get("warnings", []), console)
    console.print("\nNext, try")
    for command in report["next"]:
        # Plain and unwrapped, so that it can be copied from the screen.
        console.print(f"  {command}", style="bold", markup=False, soft_wrap=True, highlight=False)


def print_samples(rows: Sequence[dict[str, str]], console: Console) -> None:
    """Print what both models wrote, each text in a line of its own."""
    for row in rows:
        console.print(f"\n{row['prompt']}", style="bold", markup=False, highlight=False)
        for name in (DENSE, FINETUNED):
            text = " ".join(row[name].split())
            console.print(f"  {name:<10} {text}", markup=False, highlight=False, soft_wrap=True)


def print_coverage(covered: Coverage, console: Console) -> None:
    """Print what the patterns of a run cover, and what a user most likely did not mean."""
    console.print(f"Compressing {covered.line()}", markup=False, soft_wrap=True, highlight=False)
    for warning in covered.warnings():
        console.print(f"warning: {warning}", style="yellow", markup=False, soft_wrap=True, highlight=False)


def print_outcome(report: dict[str, Any], console: Console | None = None) -> None:
    """Print one line about a run that has ended before (the content of its ``report.json``)."""
    rows = [with_todays_names(row) for row in report["perplexity"]]
    figures = [
        f"{row['test_set']}/{row['window']} {_figure(row.get(FINETUNED))} (window start: {_window_start(row)})"
        for row in rows
    ]
    bits = report["bits_per_weight"]
    rate = "dense" if bits is None else f"{bits['achieved']:.4f} bits per weight"
    early = f", ended early after {report['steps']:,} steps" if report.get("ended_early") else ""
    (console or Console()).print(
        f"Finished before: {report['report']}, {rate}, perplexity {', '.join(figures)}{early}",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


def _measured(report: dict[str, Any]) -> list[tuple[str, str]]:
    """How much text the figures stand on."""
    rows = report["perplexity"]
    lines = (f"{row['test_set']}/{row['window']}: {_tokens(row)} tokens" for row in rows)
    return [("" if number else "measured on", line) for number, line in enumerate(lines)]


def _certainty(report: dict[str, Any]) -> list[tuple[str, str]]:
    """How certain the last figures are; nothing for reports of older versions."""
    found: list[tuple[str, str]] = []
    for place, stages in (report.get("intervals") or {}).items():
        entry = stages.get(FINETUNED)
        if entry is None:
            continue
        low, high = (perplexity_text(bound) for bound in entry["perplexity"])
        words = f"{place}: {low} to {high}"
        if "over_dense" in entry:
            words += ", {:.3g} times the dense model's ({:.3g} to {:.3g})".format(*entry["over_dense"])
        found.append(("" if found else "95 % interval", words))
    return found


def _size_facts(report: dict[str, Any]) -> list[tuple[str, str]]:
    bits, size = report["bits_per_weight"], report["bytes"]
    if bits is None:
        return [("bits per weight", "the model was finetuned dense: no calibration, no sketch")]
    asked = "scales and metadata included" if bits["asked"] is None else f"of {bits['asked']:g} asked"
    return [
        ("bits per weight", f"{bits['achieved']:.4f} {asked} (compressed layers)"),
        *[("", f"less than asked: {reason}") for reason in (bits.get("reason"),) if reason],
        *[("", f"{stored:.4f} with the JSON entries of tensors") for stored in (bits.get("with_entries"),) if stored],
        ("", f"{bits['model']:.4f} over all parameters of the model"),
        *[("compressed", str(covered["line"])) for covered in (report.get("coverage"),) if covered],
        ("model", f"{human_bytes(size['sketched'])} sketched, {human_bytes(size['dense_bf16'])} dense, both with bf16"),
    ]


def _run_facts(report: dict[str, Any]) -> list[tuple[str, str]]:
    seconds = report["seconds"]
    where = "the last of its calls" if seconds.get("continued") else "all"
    early = report.get("ended_early")
    steps = f"{report['steps']:,} of {report['max_steps']:,} steps" if early else f"{report['steps']:,} steps"
    trained = f"{steps}, {report['tokens']:,} tokens, precision {report['precision']}"
    return [
        ("training", trained if report["steps"] or early else "none: the model is as its stages leave it"),
        *([("ended early", str(early))] if early else []),
        *[(f"stream {key}", _stream(seen)) for key, seen in (report.get("streams") or {}).items()],
        ("time", f"{human_seconds(seconds['training'])} training, {human_seconds(seconds['total'])} in {where}"),
        ("tokenizer", f"{report['tokenizer']['name']}, beginning-of-text token: {report['tokenizer']['bos']}"),
        ("machine", machine_line(report["machine"]) + _devices(report)),
        ("checkpoint", str(report["checkpoint"])),
        ("report", str(report["report"])),
    ]


def _devices(report: Mapping[str, Any]) -> str:
    """What a run computed on, for the line about the machine; reports of older versions do not say it."""
    found = report.get("devices")
    if found is None:
        return ""
    shared = f" by {found['processes']} processes ({found['strategy']})" * (found["processes"] > 1)
    return f"; computed on {found['kind']}{shared}"


def _stream(seen: Mapping[str, Any]) -> str:
    """How much of a streamed text was read, and what of it was left out."""
    left_out = seen["skipped"]
    words = f"{seen['documents']:,} documents read, in pass {seen['passes'] + 1} over its files"
    if left_out["rows"] or left_out["files"]:
        words += f"; skipped {left_out['rows']:,} rows and {left_out['files']:,} files or parts, first: "
        words += str(left_out["examples"][0])
    return words


def human_bytes(count: int) -> str:
    """Decimal units, as file managers and download pages show them."""
    size = float(count)
    for unit in ("bytes", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.2f} GB"


def _window_start(row: Mapping[str, Any]) -> str:
    return str(row.get("window_start", NONE))  # rows of older versions do not say it


def measured_tokens(row: Mapping[str, Any]) -> int:
    """Tokens of the text in the windows that a row was measured on."""
    return int(row["windows"] * (row["window"] - (_window_start(row) == EACH)))


def _tokens(row: Mapping[str, Any]) -> str:
    """Tokens measured, and of how many, where that is not all but the remainder."""
    measured = measured_tokens(row)
    whole = row["tokens"] - measured < row["window"]
    return f"{measured:,}" if whole else f"{measured:,} of {row['tokens']:,}"


def _figure(value: float | None) -> str:
    return perplexity_text(value, "not measured")
