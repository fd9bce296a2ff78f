"""Results of cards as Markdown: what was aimed at beside what was measured. Needs the standard library alone."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from benchmarks.gpu_parts.results import Refused, Results
from benchmarks.page_sections import MissingMarkers, between_markers

BEGIN = "<!-- figures: benchmarks/gpu_table.py -->"
END = "<!-- end of figures -->"
NONE = "No figure has been measured on a GPU yet."

Lines = Mapping[tuple[str, str], Mapping[str, Any]]


class Aim(NamedTuple):
    """One aim and where its figures are.

    Attributes:
        title: In words.
        part: Of the results.
        pattern: Of the keys.
        value: Name in the lines.
        bound: That is aimed at.
        most: Whether the bound is the most that is allowed; otherwise the least.
    """

    title: str
    part: str
    pattern: str
    value: str
    bound: float
    most: bool

    def met(self, figure: float) -> bool:
        """Whether a figure reaches the aim."""
        return figure <= self.bound if self.most else figure >= self.bound


AIMS = (
    Aim("project + query, in copies of the weights", "kernels", "codec .*", "project_query_over_copy", 1.3, True),
    Aim("query, in copies of the weights", "kernels", "codec .*", "query_over_copy", 1.1, True),
    Aim("decode, times faster than the naive one", "kernels", "codec .*", "naive_over_query", 50.0, False),
    Aim("decode, times faster than the matrix form", "kernels", "codec .*", "matrix_form_over_query", 3.0, False),
    Aim(
        "one-token product, times faster than dense bf16, MLP of 8B at 0.5 bits",
        "kernels",
        r"product 8b\.(gate|down) .* 1",
        "faster_than_dense",
        3.0,
        False,
    ),
    Aim("training step, over dense", "training", "step .* eager", "over_dense", 1.05, True),
    Aim("training step, over dense, compiled", "training", "step .* compiled.*", "over_dense", 1.05, True),
)


def card_of(results: Results) -> str | None:
    """The card that results are of; ``None`` where they do not say."""
    for (part, _), line in results.good().items():
        if part == "environment" and line.get("card"):
            return str(line["card"])
    return None


def file_name(card: str) -> str:
    """``gpu_<card>.jsonl``."""
    return f"gpu_{re.sub('[^a-z0-9]+', '_', card.lower()).strip('_')}.jsonl"


def page_with(page: str, text: str) -> str:
    """A page with its section of figures replaced.

    Raises:
        Refused: The page has no such section.
    """
    try:
        return between_markers(page, BEGIN, END, text)
    except MissingMarkers as error:
        raise Refused(str(error)) from error


def section(kept: Iterable[Results]) -> str:
    """The figures of all cards; a sentence where there are none."""
    parts = [text for results in kept if (text := "\n".join(of_card(results)))]
    return "\n\n".join(parts) if parts else NONE


def of_card(results: Results) -> Iterator[str]:
    """Headline, aims and tables of one card."""
    card, good = card_of(results), results.good()
    if card is None:
        return
    machine = next(line for (part, _), line in good.items() if part == "environment")
    versions = machine.get("versions", {})
    yield f"### {card}\n"
    named = [f"{name} {versions[name]}" for name in ("torch", "triton", "transformers") if name in versions]
    yield (
        f"Driver {machine.get('driver', '?')}, CUDA {machine.get('cuda', '?')}, Python {machine.get('python', '?')}, "
        f"{', '.join(named)}; {machine['date'][:10]}; sources {machine.get('commit', machine.get('sources', '?'))[:16]}"
        f"{', changed' if machine.get('changed') else ''}.\n"
    )
    yield from _tests(good, results.newest())
    yield from _aims(good)
    for title, part, pattern, columns in TABLES:
        yield from _table(good, title, part, pattern, columns)
    yield from _missing(results.newest(), good)


def _tests(good: Lines, newest: Lines) -> Iterator[str]:
    counts = dict.fromkeys(("passed", "failed", "skipped"), 0)
    for (part, key), line in newest.items():
        if part == "correctness" and key:
            for kind in counts:
                counts[kind] += int(line.get(kind, 0))
    if sum(counts.values()):
        yield f"Tests on the card: {counts['passed']} passed, {counts['failed']} failed, {counts['skipped']} skipped.\n"


def _aims(good: Lines) -> Iterator[str]:
    rows = []
    for aim in AIMS:
        figures = [float(line[aim.value]) for line in _matching(good, aim.part, aim.pattern) if aim.value in line]
        bound = f"{'≤' if aim.most else '≥'} {aim.bound:g}"
        if figures:
            reached = sum(aim.met(figure) for figure in figures)
            rows.append(f"| {aim.title} | {bound} | {_span(figures)} | {reached} of {len(figures)} |")
        else:
            rows.append(f"| {aim.title} | {bound} | not measured | |")
    yield "| aim | bound | measured | met by |\n|---|---|---|---|"
    yield "\n".join(rows) + "\n"


def _span(figures: list[float]) -> str:
    low, high = (f"{figure:.3g}" for figure in (min(figures), max(figures)))
    return low if low == high else f"{low} to {high}"


TABLES: tuple[tuple[str, str, str, dict[str, str]], ...] = (
    (
        "Codec",
        "kernels",
        "codec .*",
        {
            "copy, µs": "copy_us",
            "project / copy": "project_over_copy",
            "query / copy": "query_over_copy",
            "both / copy": "project_query_over_copy",
            "launched singly": "launched_project_query_over_copy",
            "as in training": "with_winners_and_sums_over_copy",
            "naive / query": "naive_over_query",
            "matrix form / query": "matrix_form_over_query",
        },
    ),
    (
        "Products from packed states (last number: tokens)",
        "kernels",
        "product .*",
        {
            "µs": "us",
            "dense bf16, µs": "dense_us",
            "times faster": "faster_than_dense",
            "from planes, µs": "planes_us",
            "times faster from planes": "planes_faster_than_dense",
        },
    ),
    (
        "Backward pass of a layer",
        "kernels",
        "backward .*",
        {"tokens": "tokens", "µs": "us", "dense, µs": "dense_us", "over dense": "over_dense"},
    ),
    (
        "Training step",
        "training",
        "step .*",
        {
            "dense, ms": "dense_ms",
            "sketched, ms": "sketched_ms",
            "over dense": "over_dense",
            "of it re-projection, ms": "reprojection_ms",
            "dense peak, GiB": "dense_peak_gib",
            "sketched peak, GiB": "sketched_peak_gib",
        },
    ),
    ("Generation", "generation", "generate .*", {"tokens/s": "tokens_per_second", "peak, GiB": "peak_gib"}),
    ("One decoding step", "generation", "step .*", {"ms": "ms", "in a CUDA graph": "in_graph"}),
    ("Finetuning", "finetuning", "perplexity .*", {"perplexity": "perplexity"}),
)


def _table(good: Lines, title: str, part: str, pattern: str, columns: Mapping[str, str]) -> Iterator[str]:
    lines = _matching(good, part, pattern)
    if not lines:
        return
    yield f"| {title} | " + " | ".join(columns) + " |"
    yield "|---|" + "---:|" * len(columns)
    for line in lines:
        cells = (_cell(line.get(name)) for name in columns.values())
        yield f"| {line['key'].partition(' ')[2] or line['key']} | " + " | ".join(cells) + " |"
    yield ""


def _missing(newest: Lines, good: Lines) -> Iterator[str]:
    """What went wrong stands where the figures stand."""
    odd = [
        (part, key, line)
        for (part, key), line in newest.items()
        if key and line["status"] in ("failed", "hung", "crashed")
    ]
    for part, key, line in odd:
        kept = " (an earlier figure is shown)" if (part, key) in good else ""
        last = str(line.get("error", "")).strip().splitlines() or [""]
        yield f"- {part}, {key}: {line['status']}{kept}: `{last[-1][:160]}`"
    cut = Counter(part for (part, key), line in newest.items() if key and line["status"] == "cut")
    for part, count in cut.items():
        yield f"- {part}: time was over in the midst of {count}, and others had no turn; another call goes on."


def _matching(good: Lines, part: str, pattern: str) -> list[Mapping[str, Any]]:
    matches: Callable[[str], object] = re.compile(pattern).fullmatch
    return [line for (of, key), line in good.items() if of == part and matches(key)]


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.3g}" if isinstance(value, float) else str(value)
