"""One source of text as a value: what ``data.train``, ``data.validation`` and each test set hold."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from usllm.data.sources.files import is_remote, matching

KINDS = ("pydoc", "text", "jsonl", "parquet", "hub", "auto")


@dataclass(frozen=True)
class SourceSpec:
    """Where documents come from.

    Attributes:
        kind: ``pydoc`` (Python's own documentation, always at hand), ``text``, ``jsonl``, ``parquet`` (files),
            ``auto`` (files whose name and first bytes agree on which of the three they are) or ``hub`` (a Hugging Face
            data set).
        path: file or files, also patterns such as ``shards/*.parquet``; ``.xz``, ``.lzma``, ``.gz`` and ``.bz2`` are
            unpacked on the fly (not Parquet). Streamed ones may lie behind an address (``hf://datasets/…``).
        name: data set on the hub, for example ``Salesforce/wikitext``.
        config: configuration of the hub data set, for example ``wikitext-2-raw-v1``.
        split: split of the hub data set.
        text_field: column that holds the text (``jsonl``, ``parquet``, ``hub``).
        messages_field: column that holds conversations, lists of messages with ``role`` and ``content``, in its place.
        separator: what lies between two documents of a text file; also what joins rows into one test text. ``\\n`` and
            ``\\t``, as a shell hands them over, are the line end and the tabulator.
        document_start: regular expression; a line (text files) or row (the others) that matches it begins a new
            document, and rows up to the next one belong together. Null: every row is a document.
        streaming: read, tokenise and pack while training, for text that nobody wants to hold whole. Only for training.
    """

    kind: str = "pydoc"
    path: str | Sequence[str] | None = None
    name: str | None = None
    config: str | None = None
    split: str = "train"
    text_field: str = "text"
    messages_field: str | None = None
    separator: str = "\n\n"
    document_start: str | None = None
    streaming: bool = False

    def __post_init__(self) -> None:
        if self.path is not None and not isinstance(self.path, str):
            object.__setattr__(self, "path", tuple(str(path) for path in self.path))
        if isinstance(self.separator, str):
            object.__setattr__(self, "separator", self.separator.replace("\\n", "\n").replace("\\t", "\t"))

    @property
    def paths(self) -> tuple[str, ...]:
        """All files, as given."""
        if self.path is None:
            return ()
        return (self.path,) if isinstance(self.path, str) else tuple(self.path)

    @property
    def field(self) -> str:
        """The column that is read."""
        return self.text_field if self.messages_field is None else self.messages_field

    def shared_with(self, other: SourceSpec) -> str | None:
        """What both sources read: a file, under whatever path, or a split of a data set; ``None`` where nothing."""
        if self.kind == "hub" and other.kind == "hub":
            place, theirs = (self.name, self.config, self.split), (other.name, other.config, other.split)
            return f"{other.name}, split {other.split}" if place == theirs else None
        if self.kind == "pydoc" and other.kind == "pydoc":
            return "Python's documentation"
        ours = {file.resolve() for path in self.paths for file in _files(path)}
        return next((path for path in other.paths if any(file.resolve() in ours for file in _files(path))), None)

    def problems(self, key: str) -> list[str]:
        """Everything wrong with the values themselves (nothing is opened).

        Args:
            key: what the source is called in the configuration, for example ``data.train``.
        """
        found = []
        if self.kind not in KINDS:
            found.append(f"{key}.kind={self.kind!r} is unknown; use one of {', '.join(KINDS)}")
        if self.kind in ("text", "jsonl", "parquet", "auto") and not self.paths:
            found.append(f"{key}.kind={self.kind} needs {key}.path=/path/to/file")
        if self.kind == "hub" and not self.name:
            found.append(f"{key}.kind=hub needs {key}.name=…, for example Salesforce/wikitext")
        if self.streaming and self.kind == "pydoc":
            found.append(f"{key}.streaming=true: streamed are hub, parquet, jsonl and text; leave it out for pydoc")
        if not self.streaming and (address := next((path for path in self.paths if is_remote(path)), None)):
            found.append(f"{key}.path={address}: is an address, which is only read with {key}.streaming=true")
        if self.messages_field is not None:
            found += self._problems_of_messages(key)
        if self.kind == "text" and not self.separator:
            found.append(f"{key}.separator is empty; give what lies between documents, for example a blank line")
        if self.document_start is not None:
            try:
                re.compile(self.document_start)
            except re.error as error:
                found.append(f"{key}.document_start={self.document_start!r} is not a regular expression: {error}")
        return found

    def _problems_of_messages(self, key: str) -> list[str]:
        found = []
        if self.kind in ("pydoc", "text"):
            found.append(f"{key}.messages_field={self.messages_field}: jsonl, parquet and hub have columns")
        if self.streaming:
            found.append(f"{key}.streaming=true: conversations are packed before the first step; leave it out")
        if self.document_start is not None:
            found.append(
                f"{key}.document_start={self.document_start!r}: every conversation is a document; leave it out"
            )
        return found


def _files(path: str) -> list[Path]:
    return [] if is_remote(path) else matching(path)


@dataclass(frozen=True)
class MixedSource(SourceSpec):
    """A source that takes a share of the training sequences, however much text it has.

    Attributes:
        share: of the sequences, above 0; the training source takes what all others leave.
    """

    share: float = 0.5

    def problems(self, key: str) -> list[str]:
        found = super().problems(key)
        if not 0 < self.share < 1:
            found.append(f"{key}.share={self.share}: is a share of the sequences; must lie between 0 and 1")
        return found
