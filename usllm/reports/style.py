"""How figures look: one palette, safe for colour-blind readers, that a page can turn dark.

Figures are drawn with the colours for white paper. :func:`themed` replaces them in an SVG by CSS variables of the page.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import math
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

P = ParamSpec("P")
T = TypeVar("T")

INK, SOFT, GRID, PAPER = "#1b1e23", "#5a6069", "#d9dce1", "#fefefe"
# Okabe and Ito's palette (Color Universal Design, 2008).
ALLOCATION_COLOURS = {"proportional": "#0072b2", "waterfill": "#d55e00", "uniform": "#009e73"}
DENSE_COLOUR = "#8a5aa8"
OTHER_COLOURS = ("#cc79a7", "#56b4e9", "#e69f00")
ROW_MARKERS = {1: "o", 2: "s", 3: "^", 4: "D"}
OTHER_MARKER = "P"
ROW_DASHES = {1: "solid", 2: (0, (5, 1.5)), 3: (0, (1.2, 1.2)), 4: (0, (5, 1.2, 1.2, 1.2))}
OTHER_DASHES = (0, (8, 2, 2, 2))
"""Line styles by rows of the sketch."""

VARIABLES = {
    INK: "--ink",
    SOFT: "--soft",
    GRID: "--grid",
    PAPER: "--paper",
    DENSE_COLOUR: "--dense",
    **{colour: f"--{name}" for name, colour in ALLOCATION_COLOURS.items()},
    **{colour: f"--other{number}" for number, colour in enumerate(OTHER_COLOURS)},
}
"""CSS variable of each colour."""

_SETTINGS: Any = {
    "font.size": 9.5,
    "font.family": ["DejaVu Sans"],
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.labelsize": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": SOFT,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.facecolor": PAPER,
    "axes.axisbelow": True,
    "figure.facecolor": PAPER,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "text.color": INK,
    "text.parse_math": False,  # names of runs are shown as they are, dollars included
    "legend.frameon": False,
    "legend.fontsize": 9,
    "svg.fonttype": "none",
    "lines.linewidth": 1.6,
}


def styled(function: Callable[P, T]) -> Callable[P, T]:
    """Let a function that draws a figure draw it in this style; every artist reads its settings when it is made."""

    @functools.wraps(function)
    def drawn(*args: P.args, **kwargs: P.kwargs) -> T:
        import matplotlib

        with matplotlib.rc_context(_SETTINGS):
            return function(*args, **kwargs)

    return drawn


def new_figure(width: float, height: float, rows: int = 1, columns: int = 1) -> tuple[Figure, list[Axes]]:
    """An empty figure, sizes in inches, drawn without a display and without global state."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def allocation_colour(name: str | None) -> str:
    """Colour of an allocation rule; rules that are not ours share three, by their names."""
    if name in ALLOCATION_COLOURS:
        return ALLOCATION_COLOURS[str(name)]
    return OTHER_COLOURS[hashlib.sha256(str(name).encode()).digest()[0] % len(OTHER_COLOURS)]


def shortened(name: str, length: int = 44) -> str:
    """A name that leaves room for the figure; its middle goes first, for names of runs differ at their ends."""
    if len(name) <= length:
        return name
    half = (length - 1) // 2
    return f"{name[: length - 1 - half]}…{name[-half:]}"


@contextlib.contextmanager
def _saving(settings: Any = None) -> Iterator[None]:
    import matplotlib

    with matplotlib.rc_context({**_SETTINGS, **(settings or {})}), warnings.catch_warnings():
        # A browser has the glyphs that matplotlib's font lacks; in a PNG boxes stand for them.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield


def settle(figure: Figure) -> None:
    """Lay the figure out once and for all; otherwise every file that it is saved to does it anew."""
    engine = figure.get_layout_engine()
    if engine is not None:
        with _saving():
            engine.execute(figure)
        figure.set_layout_engine("none")


def spread(places: Sequence[float], distance: float, bottom: float, top: float) -> list[float]:
    """Rising ``places`` moved as little as needed to lie ``distance`` apart between ``bottom`` and ``top``.

    Where there is no room for that, they are spaced evenly.
    """
    count = len(places)
    if count > 1 and (count - 1) * distance > top - bottom:
        return [bottom + (top - bottom) * index / (count - 1) for index in range(count)]
    moved: list[float] = []
    for place in places:
        moved.append(max(place, bottom, moved[-1] + distance if moved else -math.inf))
    ceiling = top
    for index in reversed(range(count)):
        moved[index] = min(moved[index], ceiling)
        ceiling = moved[index] - distance
    return moved


def png(figure: Figure, dpi: int = 150) -> bytes:
    """The figure on white paper."""
    buffer = io.BytesIO()
    with _saving():
        figure.savefig(buffer, format="png", dpi=dpi, metadata={"Software": None})
    return buffer.getvalue()


def svg(figure: Figure, name: str) -> str:
    """The figure as SVG on white paper; the same figure gives the same text.

    Args:
        figure: The figure.
        name: Goes before every id, so that several figures fit into one document.
    """
    buffer = io.StringIO()
    with _saving({"svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    text = re.sub(r'\bid="', f'id="{name}-', text)
    return re.sub(r'(url\(#|href="#)', rf"\g<1>{name}-", text)


def themed(drawing: str, description: str) -> str:
    """An SVG of :func:`svg` for a page: without its prologue, in the page's colours and font, with a description."""
    from markupsafe import escape

    body = re.sub(r"<metadata>.*?</metadata>", "", drawing[drawing.index("<svg") :], flags=re.DOTALL)
    width, height = re.search(r'<svg [^>]*?viewBox="0 0 ([\d.]+) ([\d.]+)"', body, re.DOTALL).groups()  # type: ignore[union-attr]
    body = re.sub(r"<svg [^>]*>", "", body, count=1)
    for colour, variable in VARIABLES.items():
        body = re.sub(colour, f"var({variable})", body, flags=re.IGNORECASE)
    body = re.sub(r"font: ([\d. a-z]*?)([\d.]+px) [^;\"]*", r"font: \1\2 var(--font)", body)
    opening = (
        f'<svg xmlns:xlink="http://www.w3.org/1999/xlink" xmlns="http://www.w3.org/2000/svg" role="img" '
        f'viewBox="0 0 {width} {height}" style="max-width:{float(width) * 4 / 3:.0f}px" '
        f'aria-label="{escape(description)}">'
    )
    return opening + body


def with_titles(drawing: str, titles: Mapping[str, str]) -> str:
    """An SVG whose parts show a text when the pointer rests on them.

    Args:
        drawing: An SVG.
        titles: Texts by the ``gid`` of the artist, as :func:`svg` writes it.
    """
    from markupsafe import escape

    for gid, title in titles.items():
        opening = f'<g id="{gid}">'
        drawing = drawing.replace(opening, f"{opening}<title>{escape(title)}</title>", 1)
    return drawing
