"""Documents of a corpus in the order of training: a function of the seed and the place, and of nothing else.

A pass takes the shards in a new random order. Its documents are read into windows, one after another, and each window
is shuffled. No buffer is ever saved: whoever knows where a window begins reads it again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from itertools import islice

from usllm.data.sampler import permutation
from usllm.data.sources.spec import SourceSpec
from usllm.data.streaming.rows import BEGINNING, LONGEST, Bad, Place, read_rows
from usllm.data.streaming.shards import Shard
from usllm.system.errors import UserError

RAISE, SKIP = "raise", "skip"
WINDOW_CHARACTERS = 1 << 24
"""A window ends behind the document that makes it longer than that."""
_EXAMPLES = 5


@dataclass(frozen=True)
class Skipped:
    """What was left out of a corpus so far, over all passes.

    Attributes:
        rows: that could not be read.
        files: of which the rest, or a part of many rows, could not be read.
        held_out: documents that are copies of held-out ones.
        examples: the first reasons.
    """

    rows: int = 0
    files: int = 0
    held_out: int = 0
    examples: tuple[str, ...] = ()

    def and_bad(self, bad: Bad) -> Skipped:
        """With one more that could not be read."""
        examples = self.examples if len(self.examples) == _EXAMPLES else (*self.examples, bad.reason)
        counts = {"files": self.files + 1} if bad.whole else {"rows": self.rows + 1}
        return replace(self, examples=examples, **counts)


NOTHING = Skipped()


@dataclass(frozen=True)
class Window:
    """Where a window begins, and what it holds.

    Attributes:
        turn: passes before it.
        shard: shards of this pass before the one that its first document lies in.
        place: of its first document in that shard.
        documents: in all windows before it.
        before: what was left out before it.
        after: what was left out before its end.
        texts: its documents in the order of training.
    """

    turn: int = 0
    shard: int = 0
    place: Place = BEGINNING
    documents: int = 0
    before: Skipped = NOTHING
    after: Skipped = NOTHING
    texts: Sequence[str] = ()


@dataclass(frozen=True)
class Corpus:
    """A streamed source.

    Attributes:
        shards: its files.
        spec: how they are read.
        key: what it is called in the configuration, for messages.
        seed: of the order.
        shuffle_buffer: documents of a window.
        on_bad: ``raise``, or ``skip`` for what cannot be read.
        held_out: digests of documents that are never trained on (:func:`digest`).
    """

    shards: Sequence[Shard]
    spec: SourceSpec
    key: str
    seed: int = 0
    shuffle_buffer: int = 4096
    on_bad: str = RAISE
    held_out: frozenset[bytes] = field(default_factory=frozenset)

    def first_documents(self, count: int) -> list[str]:
        """The first documents of the files in their own order.

        Raises:
            UserError: something cannot be read where ``on_bad=raise``.
        """

        def read() -> Iterator[str]:
            for shard in self.shards:
                for _, found in read_rows(shard, self.spec):
                    if isinstance(found, Bad):
                        self._refuse(found)
                    elif found.strip():
                        yield found

        return list(islice(read(), count))

    def windows(self, start: Window | None = None) -> Iterator[Window]:
        """Windows without end, pass after pass, from one on that was handed out before.

        Raises:
            UserError: something cannot be read where ``on_bad=raise``, or a pass gave no document.
        """
        at = start or Window()
        while True:
            begun = at.documents if (at.shard, at.place) == (0, BEGINNING) else -1
            order = permutation(len(self.shards), f"usllm shards {self.seed} {at.turn} of {self.key}").tolist()
            for window in self._pass(at, order):
                at = window
                if at.texts:
                    yield at
            if at.documents == begun:
                held = len(self.held_out)
                besides = f" besides the {held} documents held out; set data.validation_documents below that"
                raise UserError(
                    f"{self.key}: {len(self.shards)} files hold no text to train on"
                    + (besides if held else "")
                    + (f" (first of what was skipped: {at.after.examples[0]})" if at.after.examples else "")
                )
            at = Window(turn=at.turn + 1, documents=at.documents, before=at.after)

    def fills(self, documents: int, characters: int) -> bool:
        """Whether a window holds no more: one that is not full ends with its pass."""
        return documents >= self.shuffle_buffer or characters > WINDOW_CHARACTERS

    def _pass(self, start: Window, order: Sequence[int]) -> Iterator[Window]:
        """Windows of one pass; the last one is empty, and says how far it came."""
        window, texts, characters, skipped = start, list[str](), 0, start.before
        for shard in range(start.shard, len(order)):
            first = start.place if shard == start.shard else BEGINNING
            for place, found in read_rows(self.shards[order[shard]], self.spec, first):
                if not texts:
                    window = replace(window, shard=shard, place=place, before=skipped)
                if isinstance(found, Bad):
                    self._refuse(found)
                    skipped = skipped.and_bad(found)
                elif not found.strip():
                    continue
                elif self.held_out and digest(found) in self.held_out:
                    skipped = replace(skipped, held_out=skipped.held_out + 1)
                else:
                    texts += [found[begin : begin + LONGEST] for begin in range(0, len(found), LONGEST)]
                    characters += len(found)
                if self.fills(len(texts), characters):
                    yield self._shuffled(window, texts, skipped)
                    window = replace(window, documents=window.documents + len(texts))
                    texts, characters = [], 0
        if texts:
            yield self._shuffled(window, texts, skipped)
        yield replace(window, documents=window.documents + len(texts), after=skipped, texts=())

    def _shuffled(self, window: Window, texts: Sequence[str], skipped: Skipped) -> Window:
        words = f"usllm documents {self.seed} {window.documents} of {self.key}"
        order = permutation(len(texts), words).tolist()
        return replace(window, after=skipped, texts=[texts[number] for number in order])

    def _refuse(self, bad: Bad) -> None:
        if self.on_bad == RAISE:
            raise UserError(f"{self.key}: {bad.reason}; mend the file, or pass data.on_bad=skip to go on without it")


def digest(document: str) -> bytes:
    """What tells a document from others."""
    return blake2b(document.encode("utf-8", "surrogatepass"), digest_size=16).digest()
