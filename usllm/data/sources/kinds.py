"""What kind of source a file is: its name and its first bytes must say the same."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

from usllm.data.sources.files import COMPRESSIONS, HEAD_BYTES, compression_of, existing, head, refuse_other_encodings
from usllm.data.sources.spec import SourceSpec
from usllm.system.errors import UserError

JSON_DOCUMENT = "json"
"""A file that is one JSON value: no kind of source, but known, so that it is not read as plain text."""
_KIND_OF_SUFFIX = {
    ".txt": "text",
    ".text": "text",
    ".md": "text",
    ".rst": "text",
    ".raw": "text",
    ".tokens": "text",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",  # data sets on the hub name JSON lines so, too
    ".parquet": "parquet",
    ".pq": "parquet",
}
_TABLES = (".csv", ".tsv")
_IN_WORDS = {
    "text": "plain text",
    "jsonl": "JSON lines",
    "parquet": "Parquet",
    JSON_DOCUMENT: "a JSON document",
}
_OBJECT = re.compile(rb'\{\s*("|\})')
_ARRAY = re.compile(rb'\[\s*(\{\s*("|\})|\[|"|\])')
_UTF8_MARK = b"\xef\xbb\xbf"


def kind_by_name(path: Path) -> str | None:
    """The kind that a file's name says, packed or not; ``None`` where it says nothing."""
    return _KIND_OF_SUFFIX.get(_suffix(path))


def _suffix(path: Path) -> str:
    inner = path.with_suffix("") if path.suffix.lower() in COMPRESSIONS else path
    return inner.suffix.lower()


def kind_by_content(start: bytes) -> str | None:
    """The kind that a file's first bytes say: ``text``, ``jsonl``, ``parquet`` or ``JSON_DOCUMENT``; ``None``: empty.

    Args:
        start: the first bytes, unpacked; what is longer may be cut anywhere.
    """
    if start.startswith(b"PAR1"):
        return "parquet"
    start = start.removeprefix(_UTF8_MARK).lstrip()
    if not start:
        return None
    if _ARRAY.match(start) and _parses_as_far_as_it_goes(start):
        return JSON_DOCUMENT
    if not _OBJECT.match(start):
        return "text"
    first, line_end, _ = start.partition(b"\n")
    if not line_end:
        return "jsonl"  # one object, or a line longer than what was read
    if _is_object(first):
        return "jsonl"
    return JSON_DOCUMENT if _parses_as_far_as_it_goes(start) else "text"


def with_kind(spec: SourceSpec, key: str) -> SourceSpec:
    """``spec`` with the kind of its files in place of ``auto``; a kind that was given is compared with the files.

    A given kind wins where a file's name or its first bytes agree with it; it is refused where both say another one,
    because braces and field names read as prose, or prose as JSON, are mistakes that no figure would show.

    Args:
        key: what the source is called in the configuration, for messages.

    Raises:
        UserError: names the file, and how to say what is meant; or it is no text of any kind.
    """
    if not spec.paths or spec.kind not in ("auto", "text", "jsonl", "parquet"):
        return spec
    found = {path: _kind_of(path, spec.kind, key) for path in existing(spec.paths)}
    if len(set(found.values())) > 1:
        kinds = ", ".join(f"{path} is {_IN_WORDS[kind]}" for path, kind in found.items())
        raise UserError(f"{key}.path names files of several kinds ({kinds}); give one kind a source")
    return replace(spec, kind=next(iter(found.values())))


def _kind_of(path: Path, given: str, key: str) -> str:
    start = head(path)
    named, content = kind_by_name(path), kind_by_content(start)
    if given == "auto" and _suffix(path) in _TABLES:
        raise UserError(
            f"{path} is a table by its name: write its text column as JSON lines, or pass {key}.kind=text "
            f"{key}.path=<file> to read it, names of columns and quotes included, as plain text"
        )
    if "parquet" in (given, content) and compression_of(path) is not None:
        raise UserError(f"{path}: Parquet files are not unpacked; unpack it first")
    if "parquet" not in (given, named, content):
        refuse_other_encodings(path, start)  # now, not after a model has been decoded
    if content == JSON_DOCUMENT and (given == "jsonl" or (given == "auto" and named != "text")):
        raise UserError(
            f"{path} is one JSON document, not JSON lines; write one object a line, for example with "
            f"`jq -c '.[]'`, or pass {key}.kind=text {key}.path=<file> with a name in .txt to read it as plain text"
        )
    if given == "auto":
        if named is None or content is None or named == content:
            return content or named or "text"
        raise UserError(
            f"{path} is {_IN_WORDS[named]} by its name and begins like {_IN_WORDS[content]}: rename it, or say which "
            f"with {key}.kind={named} or {key}.kind={'text' if content == JSON_DOCUMENT else content} and "
            f"{key}.path=<file>"
        )
    of_json = {"jsonl", JSON_DOCUMENT}
    elsewhere = named == content or (named in of_json and content in of_json)
    if given != named and named is not None and content is not None and given != content and elsewhere:
        raise UserError(
            f"{path} is {_IN_WORDS[content]} by its name and its first bytes, not {_IN_WORDS[given]}: pass "
            f"{key}.kind={named}, or rename the file where {_IN_WORDS[given]} is meant"
        )
    return given


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _parses_as_far_as_it_goes(start: bytes) -> bool:
    """Whether ``start`` is JSON; where it was cut off after ``HEAD_BYTES``, whether the cut is its first mistake."""
    text = start.decode("utf-8", "ignore")
    try:
        json.loads(text)
    except json.JSONDecodeError as error:
        cut = len(start) > HEAD_BYTES // 2  # white space before it was taken off
        # A string that is cut off is reported where it begins, a word or an escape a few signs before the end.
        return cut and (error.pos >= len(text) - 16 or error.msg.startswith("Unterminated string"))
    except (ValueError, RecursionError):
        return False
    return True
