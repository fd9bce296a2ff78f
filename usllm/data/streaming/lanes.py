"""Sequences of a corpus: its documents are dealt to lanes, and each lane is a token stream of its own, cut as it grows.

Sequence number n of a corpus is number ``n // LANES`` of lane ``n % LANES``, whoever computes it. So ranks and workers
share the tokenising out by lanes, and a step takes the same sequences however many there are. A document goes to the
lane that has been given the fewest bytes: lanes grow alike, and none is far ahead in the corpus.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from usllm.data.streaming.order import NOTHING, Corpus, Skipped, Window
from usllm.data.streaming.rows import Place
from usllm.data.windows import cut_windows

LANES = 192
"""Divisible by 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96: on as many ranks no document is tokenised twice."""
_AT_ONCE = 64  # documents that are tokenised together

Encode = Callable[[Sequence[str]], Sequence[Sequence[int]]]
"""From documents to their tokens, with the end-of-text token behind each."""


@dataclass(frozen=True)
class Start:
    """Where to begin to read: a window, and the bytes that each lane had been given before it."""

    window: Window
    given: tuple[int, ...]


@dataclass(frozen=True)
class Position:
    """How far lanes are, as small numbers.

    Attributes:
        start: the last window that begins before what any of the lanes needs.
        lanes: by lane: sequences made, the number of the document that the next one begins in, and how many of its
            tokens are used.
        turn: pass of the document that is farthest in the corpus.
        documents: as many have been begun.
        skipped: what was left out until there.
    """

    start: Start
    lanes: dict[int, tuple[int, int, int]]
    turn: int = 0
    documents: int = 0
    skipped: Skipped = NOTHING

    def joined(self, others: Iterable[Position]) -> Position:
        """The position of all lanes, of which each process knows some."""
        found = self
        for other in others:
            farther = other if other.documents > found.documents else found
            lanes = {**found.lanes}
            for lane, state in other.lanes.items():
                lanes[lane] = max(state, lanes.get(lane, state))
            start = min(found.start, other.start, key=lambda start: start.window.documents)
            found = replace(farther, start=start, lanes=lanes)
        return found

    def to_plain(self) -> dict[str, Any]:
        """Numbers and texts alone, for checkpoints."""
        window = self.start.window
        return {
            "window": [window.turn, window.shard, *window.place, window.documents],
            "given": list(self.start.given),
            "lanes": [list(self.lanes.get(lane, (0, 0, 0))) for lane in range(LANES)],
            "turn": self.turn,
            "documents": self.documents,
            "skipped": [_plain(window.before), _plain(self.skipped)],
        }


def from_plain(plain: dict[str, Any]) -> Position:
    """The position that :meth:`Position.to_plain` wrote."""
    turn, shard, row, offset, documents = plain["window"]
    before, skipped = (Skipped(rows, files, held, tuple(told)) for rows, files, held, told in plain["skipped"])
    window = Window(turn, shard, Place(row, offset), documents, before, before)
    lanes = {lane: (made, document, used) for lane, (made, document, used) in enumerate(plain["lanes"])}
    return Position(Start(window, tuple(plain["given"])), lanes, plain["turn"], plain["documents"], skipped)


def _plain(skipped: Skipped) -> list[Any]:
    return [skipped.rows, skipped.files, skipped.held_out, list(skipped.examples)]


class _Lane:
    """Tokens that fill no sequence yet, and the documents that they are of."""

    def __init__(self, made: int, document: int, used: int) -> None:
        self.made, self.first, self.unused = made, document, used  # of the first document, tokens to drop
        self.tokens: NDArray[np.int32] = np.empty(0, dtype=np.int32)
        self.parts: list[NDArray[np.int32]] = []
        self.documents: deque[list[int]] = deque()  # number, tokens left
        self.behind = document  # the least number that the next document may have

    def add(self, number: int, ids: Sequence[int]) -> None:
        tokens = np.asarray(ids, dtype=np.int32)
        if number == self.first:
            tokens = tokens[self.unused :]
        self.parts.append(tokens)
        self.documents.append([number, len(tokens), len(ids)])
        self.behind = number + 1

    def take(self, length: int, first: int | None) -> NDArray[np.int32] | None:
        if len(self.tokens) + sum(map(len, self.parts)) <= length:
            return None
        if self.parts:
            self.tokens, self.parts = np.concatenate([self.tokens, *self.parts]), []
        needed = length if first is None else length - 1 + int(self.tokens[0] == first)
        rows, used = cut_windows(self.tokens[:needed], length, first)
        self.tokens = self.tokens[used:]
        while used:
            taken = min(used, self.documents[0][1])
            self.documents[0][1] -= taken
            used -= taken
            if self.documents[0][1] == 0:
                self.documents.popleft()
        self.made += 1
        return rows[0].astype(np.int32, copy=True)

    def state(self) -> tuple[int, int, int]:
        if not self.documents:
            return self.made, max(self.behind, self.first), 0 if self.behind > self.first else self.unused
        number, left, whole = self.documents[0]
        return self.made, number, whole - left


class Lanes:
    """Some lanes of a corpus, advanced one sequence at a time.

    Args:
        corpus: the source.
        encode: from documents to tokens.
        context_length: tokens per sequence.
        first: token at the start of each sequence, or ``None`` (:mod:`usllm.data.windows`).
        own: the lanes that this process needs; documents of others are read and not tokenised.
        position: where to begin.
    """

    def __init__(
        self,
        corpus: Corpus,
        encode: Encode,
        context_length: int,
        first: int | None,
        own: Iterable[int],
        position: Position | None = None,
    ) -> None:
        self.encode, self.length, self.first = encode, context_length, first
        known = {} if position is None else position.lanes
        self._lanes = {lane: _Lane(*known.get(lane, (0, 0, 0))) for lane in own}
        start = Start(Window(), (0,) * LANES) if position is None else position.start
        self._starts: deque[Start] = deque([start])
        self._dealt = self._deal(corpus, start)
        self._before = position

    def sequence(self, number: int) -> NDArray[np.int32]:
        """Sequence ``number`` of the corpus, int32 ``[context_length]``; those before it in its lane are dropped.

        Raises:
            ValueError: its lane is beyond it.
        """
        lane = self._lanes[number % LANES]
        if lane.made > number // LANES:
            raise ValueError(f"sequence {number} lies before where lane {number % LANES} stands")
        while True:
            found = lane.take(self.length, self.first)
            while found is None:
                self._tokenise_more()
                found = lane.take(self.length, self.first)
            if lane.made > number // LANES:
                return found

    def drop(self, number: int) -> None:
        """Let the lane of sequence ``number`` stand behind it."""
        if self._lanes[number % LANES].made <= number // LANES:
            self.sequence(number)

    def position(self) -> Position:
        """Where the own lanes stand."""
        lanes = {number: lane.state() for number, lane in self._lanes.items()}
        needed = min(document for _, document, _ in lanes.values())
        while len(self._starts) > 1 and self._starts[1].window.documents <= needed:
            self._starts.popleft()
        begun = max(document + (used > 0) for _, document, used in lanes.values())
        newest = next(
            s.window for s in reversed(self._starts) if s.window.documents < max(begun, 1) or s is self._starts[0]
        )
        found = Position(self._starts[0], lanes, newest.turn, begun, newest.after)
        return (
            found
            if self._before is None or self._before.documents <= begun
            else replace(found, turn=self._before.turn, documents=self._before.documents, skipped=self._before.skipped)
        )

    def _tokenise_more(self) -> None:
        texts: list[str] = []
        places: list[tuple[_Lane, int]] = []
        while len(texts) < _AT_ONCE:
            number, place, text = next(self._dealt)
            lane = self._lanes.get(place)
            if lane is not None and number >= lane.behind:
                texts.append(text)
                places.append((lane, number))
        for (lane, number), ids in zip(places, self.encode(texts), strict=True):
            lane.add(number, ids)

    def _deal(self, corpus: Corpus, start: Start) -> Iterator[tuple[int, int, str]]:
        """Documents with their number and lane."""
        loads = [(given, lane) for lane, given in enumerate(start.given)]
        heapq.heapify(loads)
        for window in corpus.windows(start.window):
            given = tuple(load for load, _ in sorted(loads, key=lambda load: load[1]))
            begun = Start(replace(window, texts=()), given)
            if window.documents == self._starts[0].window.documents and len(self._starts) == 1:
                self._starts[0] = begun  # now it is known what was left out in it
            else:
                self._starts.append(begun)
            for number, text in enumerate(window.texts, start=window.documents):
                load, lane = loads[0]
                heapq.heapreplace(loads, (load + len(text.encode("utf-8")), lane))
                yield number, lane, text
