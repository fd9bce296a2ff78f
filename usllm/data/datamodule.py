"""Training and validation sequences for Lightning."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader

from usllm.data.batches import Batch, FilledSequences, collate
from usllm.data.identity import identity_differences, text_identity, texts
from usllm.data.overlap import SharedDocuments, count_shared, kept_hashes
from usllm.data.packing import pack
from usllm.data.sampler import DealtSampler, UnrolledSampler
from usllm.data.sources import MixedSource, SourceSpec, read_documents
from usllm.data.windows import AUTO, EACH, NONE, resolved_rule
from usllm.system.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

# The split is the same for every seed, so that the validation loss of two seeds is of the same documents.
_SPLIT_SEED = 0
TRAIN, VALIDATION, MIXTURE = "data.train", "data.validation", "data.mixture"  # in the configuration


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
        mixture: other sources of training and calibration by name, each with its share of the sequences.
        context_length: tokens per sequence.
        max_sequences: train and calibrate on the first ones only; ``None`` takes all.
        batch_size: sequences per micro batch and device.
        num_workers: processes that load batches; 0 is right unless the disk is slow.
        num_proc: processes that tokenise.
        cache_dir: where packed sequences are kept.
        seed: of the order of training.
        window_start: ``each`` puts the beginning-of-text token at the start of each sequence, ``none`` does not
            (:mod:`usllm.data.windows`, which also knows what a family needs).

    Raises:
        UserError: ``window_start`` is neither, or needs a token that the tokenizer does not have.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        train: SourceSpec,
        validation: SourceSpec | None = None,
        *,
        mixture: Mapping[str, MixedSource] | None = None,
        validation_fraction: float = 0.02,
        context_length: int = 512,
        max_sequences: int | None = None,
        batch_size: int = 4,
        num_workers: int = 0,
        num_proc: int = 2,
        cache_dir: str | Path = "~/.cache/usllm",
        seed: int = 0,
        window_start: str = NONE,
    ) -> None:
        super().__init__()
        if window_start == AUTO:
            raise UserError("window_start=auto: needs the model's family; see usllm.data.windows.resolved_rule")
        self.window_start = resolved_rule(window_start, "", tokenizer, "data.window_start")
        self.tokenizer = tokenizer
        self.train_source = train
        self.validation_source = validation
        self.mixture = dict(mixture or {})
        self.validation_fraction = validation_fraction
        self.context_length = context_length
        self.max_sequences = max_sequences
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.num_proc = num_proc
        self.cache_dir = Path(cache_dir)
        self.seed = seed
        self.identity: dict[str, dict[str, Any]] = {}
        self._sizes: list[int] = []
        self._train: Any = None
        self._validation: Any = None

    def prepare_data(self) -> None:
        """Fill the cache (Lightning calls this in one process)."""
        self.setup()

    def setup(self, stage: str | None = None) -> None:
        """Load the sequences, from the cache when they are in it. Call it early to fail before a model is loaded.

        Raises:
            UserError: a source is missing, empty or too short.
        """
        from datasets import concatenate_datasets

        del stage
        if self._train is not None:
            return
        documents = read_documents(self.train_source, TRAIN)
        if self.validation_source is not None:
            held_out = read_documents(self.validation_source, VALIDATION)
        else:
            documents, held_out = self._split(documents)
        validation = self._pack(held_out, VALIDATION)
        train = self._pack(documents, TRAIN)
        if self.max_sequences is not None:
            train = train.select(range(min(self.max_sequences, len(train))))
        self.identity = {TRAIN: text_identity(documents, train), VALIDATION: text_identity(held_out, validation)}
        parts, seen = [train], [self._hashes(documents, TRAIN)]
        for name, source in self.mixture.items():
            key = f"{MIXTURE}.{name}"
            documents = read_documents(source, key)
            parts.append(self._pack(documents, key))
            self.identity[key] = text_identity(documents, parts[-1])
            seen.append(self._hashes(documents, key))
        self._sizes = [len(part) for part in parts]
        train = concatenate_datasets(parts) if len(parts) > 1 else train
        self._seen = np.unique(np.concatenate(seen)) if len(seen) > 1 else seen[0]
        self._validation_shared = count_shared("validation", texts(held_out), self._seen)
        self._train, self._validation = train, validation

    def state_dict(self) -> dict[str, Any]:
        """What the texts are, for checkpoints: a resumed run is refused where they have changed."""
        self.setup()
        return self.identity

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Compare the texts with those of the checkpoint; one of an older version says nothing about them.

        Raises:
            UserError: names each text that has changed.
        """
        self.setup()
        if differences := identity_differences(state_dict, self.identity):
            raise UserError(
                f"the text has changed since the checkpoint was made: {'; '.join(differences)}. Restore it, or start "
                "a new run under another name="
            )

    def shared_with(self, test_set: str, documents: Dataset | None) -> SharedDocuments:
        """How many documents of a test set are in the text of training and calibration.

        Args:
            test_set: its name.
            documents: column ``text``; ``None`` for the validation split.
        """
        self.setup()
        if documents is None:
            return self._validation_shared
        return count_shared(test_set, texts(documents), self._seen)

    @property
    def shares(self) -> list[float]:
        """Of the sequences, of the training source and of the others in their order; they add up to 1."""
        others = [source.share for source in self.mixture.values()]
        return [1.0 - sum(others), *others]

    @property
    def train_sequences(self) -> Dataset:
        """Column ``input_ids``, one row per sequence; those of the training source come first."""
        self.setup()
        return self._train

    @property
    def validation_sequences(self) -> Dataset:
        """Column ``input_ids``, one row per sequence."""
        self.setup()
        return self._validation

    def validation_tokens(self) -> Tensor:
        """The text of the validation split as one token stream, int64 ``[n]``, for perplexity.

        Without the tokens that ``window_start`` put there: they are put where the windows of a measurement begin.
        """
        sequences = torch.tensor(self.validation_sequences["input_ids"][:], dtype=torch.long)
        return sequences[:, int(self.window_start == EACH) :].flatten()

    def train_dataloader(self) -> PositionedLoader:
        """The run's batches from the present optimizer step on.

        A step takes the next ``ranks x accumulated batches x batch size`` sequences of one order, dealt out to the
        ranks in turn, so that it does not matter how the steps before were split.

        Raises:
            UserError: ``trainer.max_steps`` is not set.
        """
        trainer = self.trainer
        if trainer is None or trainer.max_steps < 0:
            raise UserError("trainer.max_steps must be 0 or more: the order of training is laid out for it")
        self.setup()
        sampler = UnrolledSampler(
            self._sizes,
            total=trainer.max_steps * trainer.accumulate_grad_batches * self.batch_size,
            seed=self.seed,
            rank=trainer.global_rank,
            world_size=trainer.world_size,
            start=trainer.global_step * trainer.accumulate_grad_batches * self.batch_size,
            shares=self.shares,
        )
        return PositionedLoader(
            self._train,
            batch_size=self.batch_size,
            sampler=sampler,
            num_workers=self.num_workers,
            collate_fn=collate,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator().manual_seed(self.seed),
        )

    def val_dataloader(self) -> DataLoader[Any]:
        """Each validation sequence once, in order, dealt out to the ranks.

        Where the last turn has none left for a rank, it gets a sequence without targets (labels of -100).
        """
        trainer = self.trainer
        rank, world_size = (0, 1) if trainer is None else (trainer.global_rank, trainer.world_size)
        return DataLoader(
            FilledSequences(self.validation_sequences),
            batch_size=self.batch_size,
            sampler=DealtSampler(len(self.validation_sequences), rank, world_size),
            collate_fn=collate,
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
        order = list(UnrolledSampler(self._sizes, count, self.seed, shares=self.shares))
        for row in order:
            yield collate([self.train_sequences[row]])

    def steps_for(self, passes: float, accumulate_grad_batches: int = 1, world_size: int = 1) -> int:
        """Optimizer steps that see the training source ``passes`` times, rounded up, at least one."""
        per_step = self.batch_size * accumulate_grad_batches * world_size
        self.setup()
        return max(1, -int(-(passes * self._sizes[0] / self.shares[0]) // per_step))

    def _pack(self, documents: Dataset, key: str) -> Dataset:
        return pack(
            documents,
            self.tokenizer,
            self.context_length,
            key=key,
            cache_dir=self.cache_dir,
            num_proc=self.num_proc,
            window_start=self.window_start,
        )

    def _hashes(self, documents: Dataset, key: str) -> Any:
        return kept_hashes(documents, self.identity[key]["text"], self.cache_dir)

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
