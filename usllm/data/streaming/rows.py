"""The documents of one shard, from any row on; what cannot be read is named with file and row, and passed on."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from io import TextIOWrapper
from typing import Any, NamedTuple

from usllm.data.sources.boundaries import group_rows
from usllm.data.sources.files import of_system
from usllm.data.sources.plain import plain_text
from usllm.data.sources.spec import SourceSpec
from usllm.data.streaming.shards import Shard, opened_bytes
from usllm.system.errors import RunError, UserError, first_line

LONGEST = 1 << 18
"""Characters of a document; a longer one is cut into several of that length, so that memory is bounded."""
_BLOCK = 1 << 20
_ROWS = 256


class Place(NamedTuple):
    """Where in a shard: rows before it, and bytes where those of the file can be counted (0 elsewhere)."""

    row: int = 0
    offset: int = 0


BEGINNING = Place()


class Bad(NamedTuple):
    """What could not be read: a line that names file and row, and whether one row is lost or the rest of a file."""

    reason: str
    whole: bool = False


Found = tuple[Place, "str | Bad"]
Reader = Callable[[Shard, SourceSpec, Place], Iterator[Found]]


def read_rows(shard: Shard, spec: SourceSpec, start: Place = BEGINNING) -> Iterator[Found]:
    """Documents of a shard in its order, each with the place where it begins.

    Rows are joined into documents where ``spec.document_start`` says so. A place that was given for a document gives
    that document again, and those behind it.

    Raises:
        RunError: an address does not answer, or a file is gone.
    """
    found = _contained(shard, spec, start)
    grouped = spec.document_start is not None and shard.kind != "text"
    return _grouped(found, str(spec.document_start)) if grouped else found


def _contained(shard: Shard, spec: SourceSpec, start: Place) -> Iterator[Found]:
    """The rows, and in place of an error that ends the file what it says."""
    last: Place | None = None
    try:
        for last, found in _READERS[shard.kind](shard, spec, start):
            yield last, found
    except RunError:
        raise
    except UserError as error:
        where = "" if last is None else f", behind row {last.row + 1}"
        yield last or start, Bad(f"{error}{where}", whole=True)


def _grouped(rows: Iterator[Found], document_start: str) -> Iterator[Found]:
    starts = re.compile(document_start)
    begin, parts = BEGINNING, list[str]()
    for place, row in rows:
        if isinstance(row, Bad):
            yield place, row
            continue
        if parts and starts.match(row.rstrip("\r\n")):
            yield begin, "".join(parts)
            parts = []
        if not parts:
            begin = place
        parts.append(row)
    if parts:
        yield begin, "".join(parts)


def _json_lines(shard: Shard, spec: SourceSpec, start: Place) -> Iterator[Found]:
    with opened_bytes(shard.place) as file:
        file.seek(start.offset)
        row, offset = start
        for line in file:
            place = Place(row, offset)
            row, offset = row + 1, offset + len(line)
            if line.strip():
                yield place, _json_text(line, spec.text_field, f"{shard.place}, line {row}")


def _json_text(line: bytes, field: str, where: str) -> str | Bad:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        return Bad(f"{where} is not JSON ({error})")
    text = record.get(field) if isinstance(record, dict) else None
    if not isinstance(text, str):
        return Bad(f"{where} has no text in {field!r}; set text_field")
    return _plain(text, where)


def _parquet(shard: Shard, spec: SourceSpec, start: Place) -> Iterator[Found]:
    import pyarrow
    from pyarrow.parquet import ParquetFile

    with opened_bytes(shard.place) as raw:
        try:
            file = ParquetFile(raw, pre_buffer=False)
        except (pyarrow.ArrowException, OSError) as error:
            raise _unreadable(shard, error) from error
        names = file.schema_arrow.names
        if spec.text_field not in names:
            raise UserError(f"{shard.place} has no column {spec.text_field!r} but {names}; set text_field")
        kind = file.schema_arrow.field(spec.text_field).type
        if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
            raise UserError(f"{shard.place}: column {spec.text_field!r} holds {kind}, not text; set text_field")
        first = 0
        for group in range(file.num_row_groups):
            count = file.metadata.row_group(group).num_rows
            if first + count > start.row:
                yield from _row_group(file, group, first, shard, spec.text_field, start.row)
            first += count


def _row_group(file: Any, group: int, first: int, shard: Shard, field: str, start: int) -> Iterator[Found]:
    import pyarrow

    row = first
    try:
        for batch in file.iter_batches(_ROWS, row_groups=[group], columns=[field], use_threads=False):
            for text in batch.column(0).to_pylist():
                row += 1
                if row > start and text is not None:
                    yield Place(row - 1), _plain(text, f"{shard.place}, row {row}")
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = _unreadable(shard, error)
        yield Place(row), Bad(f"{reason}, from row {row + 1} to the end of row group {group + 1}", whole=True)


def _unreadable(shard: Shard, error: BaseException) -> UserError:
    if of_system(error):
        raise RunError(f"{shard.place} cannot be read ({first_line(error)})") from error
    return UserError(f"{shard.place} cannot be read as parquet ({first_line(error)})")


def _text(shard: Shard, spec: SourceSpec, start: Place) -> Iterator[Found]:
    """Documents are counted: a file of plain text is read from its beginning."""
    row = 0
    with opened_bytes(shard.place) as raw, TextIOWrapper(raw, encoding="utf-8-sig") as file:
        try:
            for document in _cut(file, spec.separator, spec.document_start):
                if row >= start.row:
                    yield Place(row), _plain(document, f"{shard.place}, document {row + 1}")
                row += 1
        except UnicodeDecodeError as error:
            yield Place(row), Bad(f"{shard.place}, behind document {row}: is not UTF-8 text ({error})", whole=True)


def _cut(file: TextIOWrapper, separator: str, document_start: str | None) -> Iterator[str]:
    """As ``split_text``, of a file that is never held as a whole."""
    rest = ""
    while block := file.read(_BLOCK):
        *pieces, rest = (rest + block).split(separator)
        for piece in pieces:
            yield from group_rows(piece.splitlines(keepends=True), document_start) if document_start else [piece]
        # What is long without a separator is cut where a document begins, or else by its length.
        if document_start and len(rest) > LONGEST:
            lines, line_end, begun = rest.rpartition("\n")
            if documents := group_rows((lines + line_end).splitlines(keepends=True), document_start):
                yield from documents[:-1]
                rest = documents[-1] + begun
        while len(rest) > LONGEST + len(separator):
            yield rest[:LONGEST]
            rest = rest[LONGEST:]
    yield from group_rows(rest.splitlines(keepends=True), document_start) if document_start else [rest]


def _plain(text: str, where: str) -> str | Bad:
    try:
        return plain_text(text, where)
    except UserError as error:
        return Bad(str(error))


_READERS: dict[str, Reader] = {"jsonl": _json_lines, "parquet": _parquet, "text": _text}
