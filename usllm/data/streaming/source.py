"""A streamed source, opened: what can be known of a corpus before it is read."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from usllm.data.overlap import paragraph_hashes
from usllm.data.packing import Encoder, tokenizer_digest
from usllm.data.sources.files import is_remote
from usllm.data.sources.spec import SourceSpec
from usllm.data.streaming.loader import StreamedPart
from usllm.data.streaming.order import RAISE, Corpus
from usllm.data.streaming.rows import Bad, Place, read_rows
from usllm.data.streaming.shards import Shard, find_shards, shards_identity
from usllm.data.windows import start_token
from usllm.system.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BEHIND_ALL = Place(row=1 << 62)


def open_corpus(spec: SourceSpec, key: str, *, seed: int, shuffle_buffer: int, on_bad: str) -> Corpus:
    """Find the files of a source; of local Parquet files look at every footer where ``on_bad=raise``.

    Raises:
        UserError: there is none, or one that cannot be read.
    """
    shards = find_shards(spec, key)
    if on_bad == RAISE:
        for shard in shards:
            _refuse_unreadable(shard, spec, key)
    return Corpus(shards, spec, key, seed, shuffle_buffer, on_bad)


def streamed_part(
    corpus: Corpus, tokenizer: PreTrainedTokenizerBase, context_length: int, window_start: str, largest: int | None
) -> StreamedPart:
    """A corpus with what makes sequences of its documents.

    Args:
        corpus: with its held-out documents.
        tokenizer: of the model.
        context_length: tokens per sequence.
        window_start: ``none`` or ``each``.
        largest: token id that the model has an embedding for; ``None`` for all of the tokenizer.
    """
    encode = Encoder(tokenizer, largest, corpus.key)
    return StreamedPart(corpus, encode, context_length, start_token(window_start, tokenizer))


def corpus_identity(part: StreamedPart) -> dict[str, object]:
    """What a resumed run compares: the files by name and size, and all that decides on documents and tokens."""
    corpus = part.corpus
    settings = [tokenizer_digest(part.encode.tokenizer).hex(), part.context_length, part.first]  # type: ignore[attr-defined]
    held_out = sorted(each.hex() for each in corpus.held_out)
    spec = (corpus.spec.text_field, corpus.spec.separator, corpus.spec.document_start)
    return shards_identity(corpus.shards, repr([*settings, spec, corpus.seed, corpus.shuffle_buffer, held_out]))


def first_hashes(part: StreamedPart) -> tuple[NDArray[np.uint64], int | None]:
    """Hashes of the paragraphs, sorted ``[n]``, of the documents that training begins with.

    Returns:
        Beside the hashes how many documents those are; ``None`` if there are no others.

    Raises:
        UserError: there is no document.
    """
    first = next(part.corpus.windows()).texts
    hashes = [number for row in paragraph_hashes(first) for number in row]
    full = part.corpus.fills(len(first), sum(map(len, first)))
    return np.unique(np.array(hashes, dtype=np.uint64)), len(first) if full else None


def _refuse_unreadable(shard: Shard, spec: SourceSpec, key: str) -> None:
    if shard.kind != "parquet" or is_remote(shard.place):
        return
    for _, found in read_rows(shard, spec, _BEHIND_ALL):
        if isinstance(found, Bad):
            raise UserError(f"{key}: {found.reason}; mend the file, or pass data.on_bad=skip to go on without it")
