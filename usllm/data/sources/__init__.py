"""Sources of text, one file each behind one protocol.

A source module offers ``documents`` (what training is packed from) and ``whole_text`` (what perplexity is measured on,
unchanged). To add one, write the module, name its kind in :data:`usllm.data.sources.spec.KINDS` and in :func:`_source`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Protocol, TypeVar

from usllm.data.sources.kinds import with_kind
from usllm.data.sources.messages import MESSAGES, NO_TEST_SET, spoken
from usllm.data.sources.spec import MixedSource, SourceSpec
from usllm.system.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["MESSAGES", "MixedSource", "SourceSpec", "documents_table", "read_documents", "read_text"]

T = TypeVar("T")


class Source(Protocol):
    """What a module of this package must define."""

    def documents(self, spec: SourceSpec) -> list[str]:
        """All documents, in an order that depends on the content alone."""

    def whole_text(self, spec: SourceSpec) -> str:
        """The text as it is, without document boundaries."""


def read_documents(spec: SourceSpec, key: str) -> Dataset:
    """All documents of a source that hold more than white space.

    Args:
        spec: the source.
        key: what it is called in the configuration, for messages.

    Returns:
        A data set with one row per document and the column ``text``; of conversations that is what was said in them,
        and ``messages`` holds them as :func:`usllm.data.sources.messages.conversation` writes them.

    Raises:
        UserError: the specification is wrong, a file is missing or unreadable, or there is no text.
    """
    found = _read(lambda source, resolved: source.documents(resolved), spec, key)
    what = f"{key} ({_describe(spec)})"
    if spec.messages_field is None:
        return documents_table(found, what)
    return documents_table(spoken(found), what, found)


def documents_table(documents: Iterable[str], what: str, conversations: Iterable[str] | None = None) -> Dataset:
    """Documents that hold more than white space, as a data set with the column ``text``.

    Args:
        documents: their text.
        what: they are of, for messages.
        conversations: the column ``messages``, of as many rows; ``None``: there is none.

    Raises:
        UserError: there is none in ``what``.
    """
    from datasets import Dataset, Features, Value

    rows = zip(documents) if conversations is None else zip(documents, conversations, strict=True)
    kept = [row for row in rows if row[0].strip()]
    if not kept:
        raise UserError(f"{what} holds no text; choose another file or data set")
    columns = dict(zip(("text", MESSAGES), map(list, zip(*kept, strict=True)), strict=False))
    return Dataset.from_dict(columns, features=Features({column: Value("large_string") for column in columns}))


def read_text(spec: SourceSpec, key: str) -> str:
    """The whole text of a source for perplexity: files as they are, rows joined by ``spec.separator``.

    Raises:
        UserError: as :func:`read_documents`.
    """
    if spec.messages_field is not None:
        raise UserError(f"{key}.messages_field={spec.messages_field}: {NO_TEST_SET}")
    text = _read(lambda source, resolved: source.whole_text(resolved), spec, key)
    if not text.strip():
        raise UserError(f"{key} ({_describe(spec)}) holds no text; choose another file or data set")
    return text


def _source(kind: str) -> Source:
    from usllm.data.sources import hub, jsonl, parquet, pydoc, text

    modules: dict[str, Source] = {"pydoc": pydoc, "text": text, "jsonl": jsonl, "parquet": parquet, "hub": hub}
    return modules[kind]


def _read(read: Callable[[Source, SourceSpec], T], spec: SourceSpec, key: str) -> T:
    """Read a source; name the configuration key in its errors."""
    problems = spec.problems(key)
    if problems:
        raise UserError("; ".join(problems))
    try:
        spec = with_kind(spec, key)
        return read(_source(spec.kind), spec)
    except UserError as error:
        raise type(error)(f"{key}: {error}") from error.__cause__


def _describe(spec: SourceSpec) -> str:
    return ", ".join(spec.paths) or spec.name or spec.kind
