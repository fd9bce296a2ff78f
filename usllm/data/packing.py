"""Documents to token sequences of one length, cached by content."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from usllm.data.identity import texts
from usllm.data.windows import NONE, cut_windows, start_token
from usllm.system.cache import published
from usllm.system.errors import UserError
from usllm.system.files import expanded

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

_FORMAT = 1  # part of the cache key: raise it when the same input is to give other sequences
ROWS_PER_BATCH = 256
NO_END = "The tokenizer has no end-of-text token (eos_token) to put between documents; set one in it"


def pack(
    documents: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    context_length: int,
    *,
    key: str,
    cache_dir: Path,
    num_proc: int = 2,
    window_start: str = NONE,
) -> Dataset:
    """Tokenise documents, put the end-of-text token after each, and cut the stream into sequences.

    Special tokens that the tokenizer adds by itself (a Llama 3's BOS) are kept at the start of each document. The
    remainder that fills no sequence is dropped. The result is memory-mapped from a cache under
    ``cache_dir/sequences``, whose key is the text, the tokenizer, the length and what stands at the start of a
    sequence: nothing else decides the content.

    Args:
        documents: data set with a column ``text``.
        tokenizer: any tokenizer with an end-of-text token.
        context_length: tokens per sequence.
        key: what the source is called in the configuration, for messages.
        cache_dir: folder of the cache.
        num_proc: processes that tokenise.
        window_start: ``none``, or ``each`` for the beginning-of-text token at the start of each sequence
            (:mod:`usllm.data.windows`).

    Returns:
        Data set with one column, ``input_ids``: int32 ``[context_length]`` per row.

    Raises:
        UserError: the text does not fill one sequence.
    """
    from datasets import Dataset

    if tokenizer.eos_token_id is None:
        raise UserError(NO_END)
    digest = hashlib.sha256(f"{_FORMAT},{context_length}".encode())
    digest.update(tokenizer_digest(tokenizer))
    first = start_token(window_start, tokenizer)
    if first is not None:
        digest.update(f"each sequence begins with {first}".encode())
    for text in texts(documents):
        digest.update(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest())

    def build(folder: Path) -> None:
        encoder = Encoder(tokenizer)
        table = tokenised(documents, lambda batch: {"ids": encoder(batch["text"])}, ["ids"], num_proc, folder)
        found = _write_sequences(table, context_length, first, folder / "sequences.arrow")
        if found < context_length:
            raise UserError(
                f"{key} holds {found} tokens, fewer than one sequence of data.context_length={context_length}; "
                "give more text (or, if it was split off, a larger data.validation_fraction, of a stream "
                "data.validation_documents) or a shorter context"
            )
        del table
        for file in folder.glob("tokenised*.arrow"):
            file.unlink()

    folder = published(expanded(cache_dir) / "sequences" / digest.hexdigest()[:32], build)
    return Dataset.from_file(str(folder / "sequences.arrow"))


class Encoder:
    """From documents to tokens, with the end-of-text token behind each.

    Args:
        tokenizer: any tokenizer with an end-of-text token.
        largest: token ids above it are refused; ``None`` takes all.
        key: what the source is called in the configuration, for messages.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, largest: int | None = None, key: str = "") -> None:
        if tokenizer.eos_token_id is None:
            raise UserError(NO_END)
        self.tokenizer, self.largest, self.key = tokenizer, largest, key

    def __call__(self, documents: Sequence[str]) -> list[list[int]]:
        """Token ids of each document.

        Raises:
            UserError: one is too large.
        """
        found = self.tokenizer(list(documents), return_attention_mask=False, verbose=False).input_ids
        if self.largest is not None and (most := max((max(ids, default=0) for ids in found), default=0)) > self.largest:
            raise UserError(
                f"{self.key} holds token {most}, but the model has {self.largest + 1} tokens: its tokenizer belongs to "
                "another model, or has tokens that were added later; use the tokenizer that came with it"
            )
        return [[*ids, self.tokenizer.eos_token_id] for ids in found]


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> bytes:
    """Fingerprint of vocabulary, merges, normalisation and special tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = json.dumps(sorted(tokenizer.get_vocab().items())) if backend is None else backend.to_str()
    probe = tokenizer("A probe: 1 2\n\n three.").input_ids  # what it adds by itself shows only in use
    return hashlib.sha256(f"{content}|{probe}|{tokenizer.eos_token_id}".encode()).digest()


def tokenised(
    documents: Dataset,
    encode: Callable[[dict[str, Any]], dict[str, Any]],
    columns: Sequence[str],
    num_proc: int,
    folder: Path,
) -> Dataset:
    """A table of int32 lists made of documents, a row each, in ``folder/tokenised*.arrow``.

    Args:
        documents: any table.
        encode: from a batch of its columns to one of ``columns``.
        columns: of the result.
        num_proc: processes that encode.
        folder: of the cache entry that is being made, whose name tells the content.
    """
    from datasets import Features

    return documents.map(
        encode,
        batched=True,
        batch_size=ROWS_PER_BATCH,
        num_proc=num_proc if num_proc > 1 and len(documents) >= 2 * ROWS_PER_BATCH else None,
        remove_columns=documents.column_names,
        features=Features.from_arrow_schema(_lists(columns)),
        cache_file_name=str(folder / "tokenised.arrow"),
        # Our own key has taken care of the content; this keeps datasets from hashing the tokenizer by pickling it.
        new_fingerprint=folder.name.replace(".", "_")[:64],
        desc="tokenising",
    )


@contextmanager
def sequence_file(path: Path, columns: Sequence[str]) -> Iterator[Callable[..., None]]:
    """Write sequences as an Arrow stream.

    Yields:
        What writes some of them: takes the columns, int32 ``[rows, context_length]`` each.
    """
    import pyarrow as pa

    schema = _lists(columns)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:

        def write(*parts: NDArray[np.integer]) -> None:
            offsets = np.arange(len(parts[0]) + 1, dtype=np.int32) * parts[0].shape[1]
            lists = [pa.ListArray.from_arrays(offsets, pa.array(part.reshape(-1))) for part in parts]
            writer.write_batch(pa.record_batch(lists, schema=schema))

        yield write


def _lists(columns: Sequence[str]) -> Any:
    import pyarrow as pa

    return pa.schema({column: pa.list_(pa.int32()) for column in columns})


def _write_sequences(documents: Dataset, context_length: int, first: int | None, path: Path) -> int:
    """Write the packed sequences of tokenised documents; returns the number of tokens found, remainder included."""
    total = 0
    rest = np.empty(0, dtype=np.int32)
    with sequence_file(path, ["input_ids"]) as write:
        for batch in documents.with_format("arrow").iter(batch_size=ROWS_PER_BATCH):
            ids = batch["ids"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
            total += len(ids)
            stream = np.concatenate([rest, ids])
            rows, used = cut_windows(stream, context_length, first)
            rest = stream[used:]
            if len(rows):
                write(rows)
    return total
