"""The texts of training, packed and streamed, each with its share of the sequences, as one order."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader

from usllm.data.batches import collate
from usllm.data.sampler import UnrolledSampler
from usllm.data.streaming.lanes import Position, from_plain
from usllm.data.streaming.loader import Share, StreamedPart, StreamLoader
from usllm.system.ranks import gathered, ranks

if TYPE_CHECKING:
    from datasets import Dataset

POSITIONS = "streams"
"""Where checkpoints of the data module hold the positions of streamed texts."""


class PositionedLoader(DataLoader[Any]):
    """A loader whose sampler begins where the run stands, so that there is no state to save or to load.

    The two methods tell Lightning that it can be resumed; states of checkpoints of older versions are ignored.
    """

    def state_dict(self) -> dict[str, Any]:
        """Nothing: the position is a function of the optimizer step."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing to do."""


class TrainingText:
    """Texts of training and calibration.

    Args:
        parts: by what they are called in the configuration: packed sequences (column ``input_ids``) or a stream.
        shares: of the sequences, in the same order; they add up to 1.
        seed: of the order.
    """

    def __init__(self, parts: Mapping[str, Dataset | StreamedPart], shares: Sequence[float], seed: int) -> None:
        self.keys, self.parts, self.shares, self.seed = list(parts), list(parts.values()), tuple(shares), seed
        self.streamed = [key for key, part in parts.items() if isinstance(part, StreamedPart)]
        self.packed = {key: part for key, part in parts.items() if key not in self.streamed}
        self.sizes = [1 if isinstance(part, StreamedPart) else len(part) for part in self.parts]
        self._table: Any = None
        self._loader: StreamLoader | None = None
        self._restored: dict[str, Position] = {}
        self._first: list[NDArray[np.int32]] = []  # of a stream, for all who calibrate on them
        self._seen_first: dict[str, Position] = {}
        self._last: dict[str, Position] = {}
        self._told: set[str] = set()

    @property
    def table(self) -> Dataset:
        """All sequences, where none of the texts is streamed; those of the first text come first."""
        from datasets import concatenate_datasets

        if self._table is None:
            self._table = concatenate_datasets(self.parts) if len(self.parts) > 1 else self.parts[0]
        return self._table

    def loader(self, share: Share, per_step: int, batch_size: int, num_workers: int) -> PositionedLoader | StreamLoader:
        """Batches of a rank from its place on.

        Args:
            share: places of this rank.
            per_step: sequences that this rank draws for an optimizer step.
            batch_size: sequences per micro batch.
            num_workers: processes that load or tokenise.
        """
        if self.streamed:
            restored = self._restored if share.begin else {}
            positions = {self.keys.index(key): position for key, position in restored.items() if key in self.keys}
            observe = partial(self._observe, self._last)
            self._loader = StreamLoader(
                self.parts, share, batch_size, per_step, self.seed, positions, num_workers, observe
            )
            return self._loader
        sampler = UnrolledSampler(
            self.sizes, share.end, self.seed, share.rank, share.world_size, share.begin, shares=share.shares
        )
        return PositionedLoader(
            self.table,
            batch_size=batch_size,
            sampler=sampler,
            num_workers=num_workers,
            collate_fn=collate,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator().manual_seed(self.seed),
        )

    def first_sequences(self, count: int) -> Iterator[NDArray[np.int32]]:
        """The first sequences that training will see, int32 ``[context_length]``; packed texts give each but once."""
        if self.streamed:
            if len(self._first) < count:
                share, observe = Share(self.shares, 0, 1, 0, count), partial(self._observe, self._seen_first)
                loader = StreamLoader(self.parts, share, 1, 1, self.seed, {}, observe=observe)
                self._first = list(loader.sequences())
            yield from self._first[:count]
            return
        order = UnrolledSampler(self.sizes, min(count, len(self.table)), self.seed, shares=self.shares)
        for row in list(order):
            yield np.asarray(self.table[row]["input_ids"], dtype=np.int32)

    def state(self, step: int) -> dict[str, Any]:
        """Positions of the streamed texts at an optimizer step, for checkpoints; all ranks ask for it together."""
        if self._loader is None:
            return {}
        mine, *others = gathered(self._loader.positions(step * self._loader.per_step))
        return {
            POSITIONS: {
                self.keys[part]: position.joined(other[part] for other in others if part in other).to_plain()
                for part, position in mine.items()
            }
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Begin where a checkpoint says; without positions in it the stream is read up to the step again."""
        self._restored = {key: from_plain(plain) for key, plain in state.get(POSITIONS, {}).items()}
        self._last.clear()
        self._last.update(self._restored)

    def facts(self) -> dict[str, dict[str, Any]]:
        """By streamed text, how much this rank has seen: ``passes`` before this one, ``documents``, ``skipped``.

        In training, or in calibration where nothing was trained on.
        """
        return {
            key: {
                "passes": position.turn,
                "documents": position.documents,
                "skipped": dataclasses.asdict(position.skipped),
            }
            for key, position in {**self._seen_first, **self._last}.items()
        }

    def _observe(self, seen: dict[str, Position], part: int, position: Position) -> None:
        key, before = self.keys[part], seen.get(self.keys[part])
        seen[key] = position
        if position.turn > (before.turn if before else 0):
            self._tell(f"{key}: the corpus has ended, and pass {position.turn + 1} begins in another order")
        lost, known = position.skipped, before.skipped if before else None
        if (lost.rows or lost.files) and (known is None or not (known.rows or known.files)):
            self._tell(f"{key}: what cannot be read is skipped (data.on_bad=skip), first {lost.examples[0]}")

    def _tell(self, line: str) -> None:
        """Warn once, in calibration or in training, on one of the ranks."""
        if ranks().rank == 0 and line not in self._told:
            self._told.add(line)
            warnings.warn(line, stacklevel=3)
