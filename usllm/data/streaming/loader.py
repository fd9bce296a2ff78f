"""Batches of a run whose text is streamed, alone or mixed with packed text.

The order is that of :class:`usllm.data.sampler.UnrolledSampler`: place number p belongs to rank ``p % ranks``, and
texts take their turns by their shares. Each worker process of a rank tokenises some of the lanes that the rank needs.
"""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from usllm.data.batches import Batch, collate
from usllm.data.sampler import UnrolledSampler, whose_turn
from usllm.data.streaming.lanes import LANES, Encode, Lanes, Position
from usllm.data.streaming.order import Corpus
from usllm.system.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset

CHUNK = 32
"""Sequences of a rank between two positions that are kept: as many may be made once more after a resume."""


@dataclass(frozen=True)
class StreamedPart:
    """A streamed text of training.

    Attributes:
        corpus: its documents in order.
        encode: from documents to tokens.
        context_length: tokens per sequence.
        first: token at the start of each sequence, or ``None``.
    """

    corpus: Corpus
    encode: Encode
    context_length: int
    first: int | None

    def lanes(self, own: Sequence[int], position: Position | None) -> Lanes:
        """Lanes of it, from a position on."""
        return Lanes(self.corpus, self.encode, self.context_length, self.first, own, position)


@dataclass(frozen=True)
class Share:
    """Which places of the order a rank takes.

    Attributes:
        shares: of the texts, which add up to 1.
        rank: of this process.
        world_size: number of processes.
        begin: sequences that this rank has drawn before.
        end: sequences that it draws in the whole run.
    """

    shares: tuple[float, ...]
    rank: int
    world_size: int
    begin: int
    end: int

    def chunks(self) -> Iterator[range]:
        """Numbers of draws, cut at multiples of ``CHUNK``."""
        begin = self.begin
        while begin < self.end:
            end = min((begin // CHUNK + 1) * CHUNK, self.end)
            yield range(begin, end)
            begin = end

    def text(self, draw: int) -> tuple[int, int]:
        """The text that a draw is from, and the number of the sequence in it."""
        return whose_turn(draw * self.world_size + self.rank, self.shares)

    def lanes(self) -> list[int]:
        """Lanes that this rank needs of any streamed text."""
        step = 1 if len(self.shares) > 1 else math.gcd(LANES, self.world_size)
        return list(range(self.rank % step, LANES, step))


Chunk = tuple[dict[int, list[NDArray[np.int32]]], dict[int, Position], UserError | None]
"""By text: a worker's sequences of a chunk in their order, and where its lanes stand behind it; or what went wrong."""


class _Worker(IterableDataset[Chunk]):
    """One process' lanes."""

    def __init__(self, parts: Mapping[int, StreamedPart], share: Share, positions: Mapping[int, Position]) -> None:
        self.parts, self.share, self.positions = parts, share, positions

    def __iter__(self) -> Iterator[Chunk]:
        info = get_worker_info()
        number, count = (0, 1) if info is None else (info.id, info.num_workers)
        own = self.share.lanes()[number::count]
        if not own:  # more workers than lanes
            yield from (({}, {}, None) for _ in self.share.chunks())
            return
        streams = {part: text.lanes(own, self.positions.get(part)) for part, text in self.parts.items()}
        mine = set(own)
        # Positions were kept before: what was drawn behind them is made once more, and they go on as they would have.
        made_before = range(self.share.begin // CHUNK * CHUNK, self.share.begin)
        for draws in self.share.chunks():
            found: dict[int, list[NDArray[np.int32]]] = {part: [] for part in self.parts}
            try:
                for part, taken in map(self.share.text, made_before):
                    if part in streams and taken % LANES in mine:
                        streams[part].drop(taken)
                made_before = range(0)
                for part, taken in map(self.share.text, draws):
                    if part in streams and taken % LANES in mine:
                        found[part].append(streams[part].sequence(taken))
                yield found, {part: stream.position() for part, stream in streams.items()}, None
            except UserError as error:  # a loader would hand it on with a traceback in its message
                yield {}, {}, error
                return


def _quiet(_: int) -> None:
    """A worker tokenises on one thread: it is forked, and there are others."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(1)


def _as_it_is(item: Any) -> Any:
    return item


class StreamLoader:
    """Batches from the place where the run stands; its length is that of the whole run.

    Args:
        parts: texts in the order of their shares; a packed one is a data set with a column ``input_ids``.
        share: places of this rank.
        batch_size: sequences per micro batch.
        per_step: sequences that this rank draws for an optimizer step.
        seed: of the order of packed texts.
        positions: by number of a text: where its lanes stand, at or before the share's beginning.
        num_workers: processes that tokenise; 0 does it here.
        observe: is called with the position of each streamed text behind a chunk, before its first sequence is given.
    """

    def __init__(
        self,
        parts: Sequence[StreamedPart | Dataset],
        share: Share,
        batch_size: int,
        per_step: int,
        seed: int,
        positions: Mapping[int, Position],
        num_workers: int = 0,
        observe: Callable[[int, Position], None] = lambda part, position: None,
    ) -> None:
        self.share, self.batch_size, self.per_step = share, batch_size, per_step
        self.num_workers, self.observe = num_workers, observe
        self.streams = {number: part for number, part in enumerate(parts) if isinstance(part, StreamedPart)}
        self.packed: dict[int, Any] = {number: part for number, part in enumerate(parts) if number not in self.streams}
        sizes = [len(self.packed[number]) if number in self.packed else 1 for number in range(len(parts))]
        self._order = UnrolledSampler(sizes, share.end, seed, shares=share.shares)
        self._kept: deque[tuple[int, dict[int, Position]]] = deque([(share.begin, dict(positions))])

    def __len__(self) -> int:
        return self.share.end // self.batch_size

    def state_dict(self) -> dict[str, Any]:
        """Nothing: the data module keeps the position, and Lightning sees that the loader can be resumed."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing to do."""

    def __iter__(self) -> Iterator[Batch]:
        rows = self.sequences()
        while len(batch := list(islice(rows, self.batch_size))) == self.batch_size:
            made = collate([{"input_ids": row} for row in batch])
            yield {key: value.pin_memory() for key, value in made.items()} if torch.cuda.is_available() else made

    def positions(self, drawn: int) -> dict[int, Position]:
        """By number of a text, where this rank's lanes stood when it had drawn ``drawn`` sequences, or a little before.

        Raises:
            ValueError: they have gone further, and nothing was kept.
        """
        while len(self._kept) > 1 and self._kept[1][0] <= drawn:
            self._kept.popleft()
        begin, positions = self._kept[0]
        if begin > drawn:
            raise ValueError(f"positions from {begin} sequences on are known, not of {drawn}")
        return positions

    def sequences(self) -> Iterator[NDArray[np.int32]]:
        """Token ids ``[context_length]`` of this rank, one sequence after another.

        Raises:
            UserError: something in a corpus cannot be read.
        """
        begin, positions = self._kept[0]
        self._kept = deque([(begin, positions)])
        worker = _Worker(self.streams, self.share, positions)
        source: Any = iter(worker)
        if self.num_workers:
            # A loader draws a seed for its workers even when it has none; not from the global generator, please.
            generator = torch.Generator()
            source = iter(
                DataLoader(
                    worker,
                    batch_size=None,
                    num_workers=self.num_workers,
                    collate_fn=_as_it_is,
                    worker_init_fn=_quiet,
                    generator=generator,
                )
            )
        owner = {lane: place % max(self.num_workers, 1) for place, lane in enumerate(self.share.lanes())}
        for draws in self.share.chunks():
            chunks: list[Chunk] = list(islice(source, max(self.num_workers, 1)))
            for _, _, failure in chunks:
                if failure is not None:
                    raise failure
            known = {part: [found[part] for _, found, _ in chunks if part in found] for part in self.streams}
            positions = {part: first.joined(others) for part, (first, *others) in known.items()}
            self._kept.append((draws.stop, positions))
            # A checkpoint is of the last step that was made: training may end within the one that is being made.
            begun = draws.start // self.per_step * self.per_step
            while len(self._kept) > 4 and self._kept[1][0] <= begun:
                self._kept.popleft()
            for part, position in positions.items():
                self.observe(part, position)
            queues = [{part: iter(rows) for part, rows in found.items()} for found, _, _ in chunks]
            for part, taken in map(self.share.text, draws):
                if part in self.packed:
                    yield np.asarray(self.packed[part][self._order.drawn(part, taken)]["input_ids"], dtype=np.int32)
                else:
                    yield next(queues[owner[taken % LANES]][part])
