"""Conversations side by side in sequences of one length, none of which sees another one."""

from __future__ import annotations

import bisect
import hashlib
from collections.abc import Iterator, Sequence
from itertools import chain, count, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from usllm.data.batches import NO_TARGET
from usllm.data.chat.template import ChatTemplate
from usllm.data.identity import texts
from usllm.data.packing import ROWS_PER_BATCH, sequence_file, tokenised, tokenizer_digest
from usllm.data.sources.messages import MESSAGES, messages_of
from usllm.data.windows import NONE, start_token
from usllm.system.cache import published
from usllm.system.errors import UserError
from usllm.system.files import expanded

if TYPE_CHECKING:
    from datasets import Dataset

COLUMNS = ("input_ids", "labels", "position_ids")
_FORMAT = 1  # part of the cache key: raise it when the same input is to give other sequences


class Tokens(NamedTuple):
    """Of a conversation or of a part of one, int32 ``[n]``; ``labels`` are ``NO_TARGET`` where nothing is learnt."""

    input_ids: NDArray[np.int32]
    labels: NDArray[np.int32]


def pack_conversations(
    documents: Dataset,
    template: ChatTemplate,
    context_length: int,
    *,
    key: str,
    cache_dir: Path,
    num_proc: int = 2,
    window_start: str = NONE,
) -> Dataset:
    """Write conversations as tokens and pack them, from a cache under ``cache_dir/sequences`` that content decides.

    A conversation lies whole in a sequence, beside others, where it fits (best fit, longest first); a longer one is cut
    into parts, of which those with targets are kept, and only its beginning knows what was said before. Positions
    restart with each conversation, which keeps it from seeing others where the model reads them so. What is left of a
    sequence is filled with conversations of the next ones, without targets: there is no padding, which would be
    calibrated on.

    Args:
        documents: column ``messages``, as :func:`usllm.data.sources.read_documents` gives conversations.
        template: of the model.
        context_length: tokens per sequence.
        key: what the source is called in the configuration, for messages.
        cache_dir: folder of the cache.
        num_proc: processes that tokenise.
        window_start: ``none``, or ``each`` for the beginning-of-text token at the start of each sequence.

    Returns:
        Columns ``input_ids``, ``labels`` (``NO_TARGET`` where nothing is learnt) and ``position_ids``: int32
        ``[context_length]`` per row.

    Raises:
        UserError: a conversation cannot be written, or all of them together do not fill one sequence.
    """
    from datasets import Dataset

    first = start_token(window_start, template.tokenizer)
    digest = hashlib.sha256(f"conversations {_FORMAT},{context_length},{first}".encode())
    digest.update(tokenizer_digest(template.tokenizer))
    digest.update(template.identity())
    for text in texts(documents, MESSAGES):
        digest.update(hashlib.sha256(text.encode()).digest())

    def build(folder: Path) -> None:
        def encode(batch: dict[str, Any]) -> dict[str, Any]:
            written = [template(messages_of(text)) for text in batch[MESSAGES]]
            return {"input_ids": [one.input_ids for one in written], "labels": [one.labels for one in written]}

        table = tokenised(documents, encode, COLUMNS[:2], num_proc, folder)
        written = list(_written(table))
        tokens = sum(len(one.input_ids) for one in written)
        if tokens < context_length:
            raise UserError(
                f"{key} holds {tokens} tokens, fewer than one sequence of data.context_length="
                f"{context_length}; give more conversations (where they are split off, a larger "
                "data.validation_fraction, such as 0.2) or a shorter context"
            )
        rows = packed(written, context_length, first)
        if not _write(rows, folder / "sequences.arrow"):
            raise UserError(f"{key}: no part of a conversation holds a target; take a longer data.context_length")
        del table, written
        for file in folder.glob("tokenised*.arrow"):
            file.unlink()

    folder = published(expanded(cache_dir) / "sequences" / digest.hexdigest()[:32], build)
    return Dataset.from_file(str(folder / "sequences.arrow"))


def packed(written: Sequence[Tokens], length: int, first: int | None = None) -> Iterator[NDArray[np.int32]]:
    """Sequences of conversations, int32 ``[3, length]``: token ids, labels, positions.

    Args:
        written: the conversations.
        length: tokens per sequence.
        first: token at the start of each sequence, which a part of a long conversation lacks; ``None``: none is put
            there.
    """
    pieces = [piece for one in written for piece in _pieces(one, length, first)]
    groups = _best_fit([len(piece.input_ids) for piece in pieces], length)
    for place, group in enumerate(groups):
        parts = [pieces[number] for number in group]
        missing = length - sum(len(part.input_ids) for part in parts)
        following = chain.from_iterable(groups[(place + after) % len(groups)] for after in count(1))
        while missing:
            ids = pieces[next(following)].input_ids[:missing]
            parts.append(Tokens(ids, np.full_like(ids, NO_TARGET)))
            missing -= len(ids)
        positions = np.concatenate([np.arange(len(part.input_ids)) for part in parts])
        ids, labels = (np.concatenate([part[column] for part in parts]) for column in (0, 1))
        yield np.stack([ids, labels, positions]).astype(np.int32)


def _pieces(one: Tokens, length: int, first: int | None) -> Iterator[Tokens]:
    """A conversation in parts that fit; those in which nothing is learnt are left out."""
    begin = 0
    while begin < len(one.input_ids):
        head = np.array([] if first is None or one.input_ids[begin] == first else [first], dtype=np.int32)
        part = slice(begin, begin + length - len(head))
        labels = np.concatenate([np.full_like(head, NO_TARGET), one.labels[part]])
        labels[0] = NO_TARGET  # nothing predicts the first token of a sequence
        if bool((labels != NO_TARGET).any()):
            yield Tokens(np.concatenate([head, one.input_ids[part]]), labels)
        begin = part.stop


def _best_fit(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Groups of numbers whose lengths fit into ``room``, in order; longest first, each goes where least is left."""
    groups: list[list[int]] = []
    free: list[tuple[int, int]] = []  # room left, group
    for number in sorted(range(len(lengths)), key=lambda number: -lengths[number]):
        place = bisect.bisect_left(free, (lengths[number], -1))
        left, group = free.pop(place) if place < len(free) else (room, len(groups))
        if group == len(groups):
            groups.append([])
        groups[group].append(number)
        if left > lengths[number]:
            bisect.insort(free, (left - lengths[number], group))
    return sorted(map(sorted, groups))


def _written(table: Dataset) -> Iterator[Tokens]:
    for batch in table.with_format("arrow").iter(batch_size=ROWS_PER_BATCH):
        for row in zip(*(batch[column] for column in COLUMNS[:2]), strict=True):
            yield Tokens(*(value.values.to_numpy() for value in row))


def _write(rows: Iterator[NDArray[np.int32]], path: Path) -> int:
    """Write sequences; returns their number."""
    number = 0
    with sequence_file(path, COLUMNS) as write:
        while batch := list(islice(rows, ROWS_PER_BATCH)):
            write(*np.stack(batch, 1))
            number += len(batch)
    return number
