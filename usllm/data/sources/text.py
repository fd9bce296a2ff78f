"""Plain text files."""

from __future__ import annotations

from pathlib import Path

from usllm.data.sources.boundaries import split_text
from usllm.data.sources.files import existing, opened
from usllm.data.sources.plain import plain_text
from usllm.data.sources.spec import SourceSpec


def documents(spec: SourceSpec) -> list[str]:
    """Documents of all files in the order given, cut at ``spec.separator`` and ``spec.document_start``."""
    return [
        document
        for path in existing(spec.paths)
        for document in split_text(_content(path), spec.separator, spec.document_start)
    ]


def whole_text(spec: SourceSpec) -> str:
    """The files' text as it is, one after the other."""
    return "".join(_content(path) for path in existing(spec.paths))


def _content(path: Path) -> str:
    with opened(path) as file:
        return plain_text(file.read(), str(path))
