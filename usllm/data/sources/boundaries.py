"""Where one document ends and the next begins."""

from __future__ import annotations

import re
from collections.abc import Iterable


def split_text(text: str, separator: str, document_start: str | None) -> list[str]:
    """Cut a text at every ``separator`` and before every line that matches ``document_start``."""
    pieces = text.split(separator)
    if document_start is None:
        return pieces
    return [part for piece in pieces for part in group_rows(piece.splitlines(keepends=True), document_start)]


def group_rows(rows: Iterable[str], document_start: str) -> list[str]:
    """Join rows unchanged into documents, each beginning with a row that matches ``document_start``.

    The expression is matched from the row's start, without its line end, so that ``$`` means what it seems to. Rows
    before the first match make up a document of their own.
    """
    starts = re.compile(document_start)
    groups: list[list[str]] = []
    for row in rows:
        if not groups or starts.match(row.rstrip("\r\n")):
            groups.append([])
        groups[-1].append(row)
    return ["".join(group) for group in groups]
