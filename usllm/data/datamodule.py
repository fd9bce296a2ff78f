"""Training and validation sequences for Lightning."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader

from usllm.data.packing import pack
from usllm.data.sampler import FILLER, DealtSampler, UnrolledSampler
from usllm.data.sources import SourceSpec, read_documents
from usllm.system.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

Batch = dict[str, Tensor]

# The split is the same for every seed, so that the validation loss of two seeds is of the same documents.
_SPLIT_SEED = 0
_NO_TARGET = -100


class PositionedLoader(DataLoader[Any]):
    """A loader whose sampler begins where the run stands, so that there is no state to save or to load.

    The two methods tell Lightning that it can be resumed; states of checkpoints of older versions are ignored.
    """

    def state_dict(self) -> dict[str, Any]:
        """Nothing: the position is a function of the optimizer step."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing to do."""


class TextDataModule(LightningDataModule):
    """Packed sequences from a training source and a validation source.

    A batch is ``{"input_ids": int64 [batch, context_length], "labels": the same tensor}``; there is no padding. The
    trainer needs ``max_steps``, and ``use_distributed_sampler=False`` where it has several devices.

    Args:
        tokenizer: of the model.
        train: source of training and calibration.
        validation: source of validation; without one, ``validation_fraction`` of the training documents is set aside.
        validation_fraction: share of documents, at least one document.
        context_length: tokens per sequence.
        max_sequences: train and calibrate on the first ones only; ``None`` takes all.
        batch_size: sequences per micro batch and device.
        num_workers: processes that load batches; 0 is right unless the disk is slow.
        num_proc: processes that tokenise.
        cache_dir: where packed sequences are kept.
        seed: of the order of training.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        train: SourceSpec,
        validation: SourceSpec | None = None,
        *,
        validation_fraction: float = 0.02,
        context_length: int = 512,
        max_sequences: int | None = None,
        batch_size: int = 4,
        num_workers: int = 0,
        num_proc: int = 2,
        cache_dir: str | Path = "~/.cache/usllm",
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.train_source = train
        self.validation_source = validation
        self.validation_fraction = validation_fraction
        self.context_length = context_length
        self.max_sequences = max_sequences
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.num_proc = num_proc
        self.cache_dir = Path(cache_dir)
        self.seed = seed
        self._train: Dataset | None = None
        self._validation: Dataset | None = None

    def prepare_data(self) -> None:
        """Fill the cache (Lightning calls this in one process)."""
        self.setup()

    def setup(self, stage: str | None = None) -> None:
        """Load the sequences, from the cache when they are in it. Call it early to fail before a model is loaded.

        Raises:
            UserError: a source is missing, empty or too short.
        """
        del stage
        if self._train is not None:
            return
        documents = read_documents(self.train_source, "data.train")
        if self.validation_source is not None:
            held_out = read_documents(self.validation_source, "data.validation")
        else:
            documents, held_out = self._split(documents)
        validation = self._pack(held_out, "data.validation")
        train = self._pack(documents, "data.train")
        if self.max_sequences is not None:
            train = train.select(range(min(self.max_sequences, len(train))))
        self._train, self._validation = train, validation

    @property
    def train_sequences(self) -> Dataset:
        """Column ``input_ids``, one row per sequence."""
        self.setup()
        assert self._train is not None
        return self._train

    @property
    def validation_sequences(self) -> Dataset:
        """Column ``input_ids``, one row per sequence."""
        self.setup()
        assert self._validation is not None
        return self._validation

    def validation_tokens(self) -> Tensor:
        """The validation split as one token stream, int64 ``[n]``, for perplexity."""
        return torch.tensor(self.validation_sequences["input_ids"][:], dtype=torch.long).flatten()

    def train_dataloader(self) -> PositionedLoader:
        """The run's batches from the present optimizer step on.

        A step takes the next ``ranks x accumulated batches x batch size`` sequences of one order, dealt out to the
        ranks in turn, so that it does not matter how the steps before were split.

        Raises:
            UserError: ``trainer.max_steps`` is not set.
        """
        trainer = self.trainer
        if trainer is None or trainer.max_steps < 1:
            raise UserError("trainer.max_steps must be a positive number: the order of training is laid out for it")
        sampler = UnrolledSampler(
            len(self.train_sequences),
            total=trainer.max_steps * trainer.accumulate_grad_batches * self.batch_size,
            seed=self.seed,
            rank=trainer.global_rank,
            world_size=trainer.world_size,
            start=trainer.global_step * trainer.accumulate_grad_batches * self.batch_size,
        )
        return PositionedLoader(
            self.train_sequences,
            batch_size=self.batch_size,
            sampler=sampler,
            num_workers=self.num_workers,
            collate_fn=_collate,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator().manual_seed(self.seed),
        )

    def val_dataloader(self) -> DataLoader[Any]:
        """Each validation sequence once, in order, dealt out to the ranks.

        Where the last turn has none left for a rank, it gets a sequence without targets (labels of -100).
        """
        trainer = self.trainer
        rank, world_size = (0, 1) if trainer is None else (trainer.global_rank, trainer.world_size)
        sequences = _Filled(self.validation_sequences)
        return DataLoader(
            sequences,
            batch_size=self.batch_size,
            sampler=DealtSampler(len(self.validation_sequences), rank, world_size),
            collate_fn=_collate,
            # A loader draws a seed for its workers even when it has none; not from the global generator, please.
            generator=torch.Generator(),
        )

    def calibration_batches(self, sequences: int) -> Iterator[Batch]:
        """The first sequences that training will see, one by one; never held-out text.

        One by one, so that what is measured does not depend on the batch size, nor on how many ranks share it.

        Args:
            sequences: how many; a smaller training split gives all it has, each once.
        """
        count = min(sequences, len(self.train_sequences))
        order = list(UnrolledSampler(len(self.train_sequences), count, self.seed))
        for row in order:
            yield _collate([self.train_sequences[row]])

    def steps_for(self, passes: float, accumulate_grad_batches: int = 1, world_size: int = 1) -> int:
        """Optimizer steps that see the training split ``passes`` times, rounded up, at least one."""
        per_step = self.batch_size * accumulate_grad_batches * world_size
        return max(1, -int(-(passes * len(self.train_sequences)) // per_step))

    def _pack(self, documents: Dataset, key: str) -> Dataset:
        return pack(
            documents,
            self.tokenizer,
            self.context_length,
            key=key,
            cache_dir=self.cache_dir,
            num_proc=self.num_proc,
        )

    def _split(self, documents: Dataset) -> tuple[Dataset, Dataset]:
        """Set whole documents aside, so that no sequence of validation continues one of training."""
        if not 0 < self.validation_fraction < 1:
            raise UserError(
                f"data.validation_fraction={self.validation_fraction} must lie between 0 and 1 where data.validation "
                "is null"
            )
        if len(documents) < 2:
            raise UserError(
                "data.train holds one document, which cannot be split; set data.validation, or a "
                "data.train.separator that occurs in the text"
            )
        count = min(max(1, round(self.validation_fraction * len(documents))), len(documents) - 1)
        parts = documents.train_test_split(test_size=count, seed=_SPLIT_SEED)
        return parts["train"], parts["test"]


class _Filled(torch.utils.data.Dataset[Any]):
    """Sequences, and one without targets for the filler of :class:`DealtSampler`."""

    def __init__(self, sequences: Dataset) -> None:
        self.sequences = sequences

    def __len__(self) -> int:
        return len(self.sequences)

    def __getitem__(self, position: int) -> dict[str, Any]:
        return {"input_ids": self.sequences[position]["input_ids"], "counts": position != FILLER}


def _collate(rows: Sequence[Mapping[str, Any]]) -> Batch:
    """Rows of ``input_ids`` to one batch."""
    input_ids = torch.tensor([row["input_ids"] for row in rows], dtype=torch.long)
    counts = torch.tensor([row.get("counts", True) for row in rows])
    labels = input_ids if bool(counts.all()) else input_ids.where(counts[:, None], _NO_TARGET)
    return {"input_ids": input_ids, "labels": labels}
