"""Parts of a page that are made by a script, between two markers. Needs the standard library alone."""

from __future__ import annotations


class MissingMarkers(Exception):
    """The page does not hold the two markers, each once."""


def between_markers(page: str, begin: str, end: str, text: str) -> str:
    """A page with what stands between two markers replaced; the text before and after stays.

    Args:
        page: Markdown.
        begin: A line that the page holds once.
        end: The first such line after it ends the part.
        text: What is to stand between them.

    Raises:
        MissingMarkers: A marker is not there, or the first one twice.
    """
    head, found, rest = page.partition(begin)
    _, closed, tail = rest.partition(end)
    if not found or not closed or begin in rest:
        raise MissingMarkers(f"the page must hold one line {begin} and behind it one line {end}: put them back")
    return f"{head}{begin}\n\n{text.strip()}\n\n{end}{tail}"
