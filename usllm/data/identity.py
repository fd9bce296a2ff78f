"""What a text is, apart from where it lies: what a resumed run compares with the run that it continues."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset

_BATCH = 1000


def texts(documents: Dataset, column: str = "text") -> Iterator[str]:
    """A column, row by row."""
    for batch in documents.select_columns(column).iter(batch_size=_BATCH):
        yield from batch[column]


def text_identity(documents: Dataset, sequences: Dataset) -> dict[str, Any]:
    """Fingerprints of a text by its content, local or from the hub, and of what was made of it.

    Args:
        documents: column ``text``.
        sequences: columns of int32 ``[context_length]`` per row, ``input_ids`` alone or the first of several.

    Returns:
        Plain Python: ``documents`` and ``characters`` (numbers), ``text`` and ``tokens`` (SHA-256).
    """
    count = characters = 0
    text, tokens = hashlib.sha256(), hashlib.sha256()
    for document in texts(documents):
        count, characters = count + 1, characters + len(document)
        text.update(hashlib.sha256(document.encode("utf-8", "surrogatepass")).digest())
    for batch in sequences.with_format("arrow").iter(batch_size=_BATCH):
        for column in batch.columns:
            tokens.update(column.combine_chunks().flatten().to_numpy().astype("<i4", copy=False).tobytes())
    return {"documents": count, "characters": characters, "text": text.hexdigest(), "tokens": tokens.hexdigest()}


def identity_differences(saved: Mapping[str, Any], ours: Mapping[str, Any]) -> list[str]:
    """One line for each text that is another one than it was, with the size of both.

    Args:
        saved: by key of the configuration, as :func:`text_identity` gives them; a text that it lacks is not compared.
        ours: the same of this run.
    """
    found = []
    for key in sorted(saved.keys() & ours.keys()):
        theirs, now = saved[key], ours[key]
        if theirs["text"] != now["text"]:
            found.append(f"{key}: {_size(theirs)} in the checkpoint, {_size(now)} of another content in this run")
        elif theirs["tokens"] != now["tokens"]:
            what = "order or tokens of it are others" if "shards" in now else "the tokenizer makes other tokens of it"
            found.append(f"{key}: the same text, but {what} in this run")
    return found


def _size(identity: Mapping[str, Any]) -> str:
    if "shards" in identity:
        return f"{identity['shards']:,} files of {identity['bytes']:,} bytes"
    return f"{identity['documents']:,} documents of {identity['characters']:,} characters"
