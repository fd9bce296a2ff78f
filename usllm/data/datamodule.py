"""Training and validation sequences for Lightning."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from lightning import LightningDataModule
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader

from usllm.data.batches import Batch, FilledSequences, collate
from usllm.data.chat.packing import pack_conversations
from usllm.data.chat.template import ChatTemplate
from usllm.data.held_out import split_documents
from usllm.data.identity import identity_differences, text_identity, texts
from usllm.data.overlap import SharedDocuments, count_shared, kept_hashes
from usllm.data.packing import pack
from usllm.data.sampler import DealtSampler
from usllm.data.sources import MESSAGES, MixedSource, SourceSpec, documents_table, read_documents
from usllm.data.sources.messages import ASSISTANT
from usllm.data.streaming.loader import Share, StreamedPart, StreamLoader
from usllm.data.streaming.order import RAISE, digest
from usllm.data.streaming.source import corpus_identity, first_hashes, open_corpus, streamed_part
from usllm.data.training_text import PositionedLoader, TrainingText
from usllm.data.windows import AUTO, EACH, NONE, resolved_rule
from usllm.system.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

TRAIN, VALIDATION, MIXTURE = "data.train", "data.validation", "data.mixture"  # in the configuration


class TextDataModule(LightningDataModule):
    """Packed sequences from a training source and a validation source.

    A batch is ``{"input_ids": int64 [batch, context_length], "labels": the same tensor}``, without padding; of
    conversations labels are masked, and ``position_ids`` keep them apart (:mod:`usllm.data.chat`). The trainer needs
    ``max_steps``, and ``use_distributed_sampler=False`` where it has several devices.

    Args:
        tokenizer: of the model.
        train: source of training and calibration.
        validation: source of validation; without one, documents of training are set aside.
        validation_fraction: share of them, at least one.
        mixture: other sources of training by name, each with its share of the sequences.
        context_length: tokens per sequence.
        max_sequences: train and calibrate on the first ones only; ``None`` takes all.
        batch_size: sequences per micro batch and device.
        num_workers: processes that load batches, and tokenise streams; 0 is right for packed text.
        num_proc: processes that tokenise.
        shuffle_buffer: documents of a streamed source that are shuffled together.
        validation_documents: the first ones of a streamed training source, set aside where there is no other.
        on_bad: ``raise``, or ``skip`` for files and rows of a stream that cannot be read.
        loss_on: of conversations: ``assistant``, or ``all``.
        largest_token: that the model has an embedding for; streams with another are refused. ``None``: all.
        cache_dir: where packed sequences are kept.
        seed: of the order of training.
        window_start: ``each`` (the beginning-of-text token starts each sequence) or ``none``.

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
        shuffle_buffer: int = 4096,
        validation_documents: int = 500,
        on_bad: str = RAISE,
        loss_on: str = ASSISTANT,
        largest_token: int | None = None,
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
        self.shuffle_buffer = shuffle_buffer
        self.validation_documents = validation_documents
        self.on_bad = on_bad
        self.loss_on = loss_on
        self.largest_token = largest_token
        self.identity: dict[str, dict[str, Any]] = {}
        self.compared: dict[str, int | None] = {}
        self._text: TrainingText | None = None
        self._validation: Any = None

    def prepare_data(self) -> None:
        """Fill the cache."""
        self.setup()

    def setup(self, stage: str | None = None) -> None:
        """Load the sequences, from the cache when they are in it. Call it early to fail before a model is loaded.

        Raises:
            UserError: a source is missing, empty or too short.
        """
        if self._text is not None:
            return
        sources = {TRAIN: self.train_source, **{f"{MIXTURE}.{name}": each for name, each in self.mixture.items()}}
        documents = {key: read_documents(source, key) for key, source in sources.items() if not source.streaming}
        order: dict[str, Any] = {"seed": self.seed, "shuffle_buffer": self.shuffle_buffer, "on_bad": self.on_bad}
        corpora = {key: open_corpus(source, key, **order) for key, source in sources.items() if source.streaming}
        if self.validation_source is not None:
            held_out = read_documents(self.validation_source, VALIDATION)
        elif TRAIN in corpora:
            held_out = documents_table(corpora[TRAIN].first_documents(self.validation_documents), TRAIN)
        else:
            documents[TRAIN], held_out = split_documents(documents[TRAIN], self.validation_fraction)
        validation = self._pack(held_out, VALIDATION)
        self.identity[VALIDATION] = text_identity(held_out, validation)
        digests = frozenset(map(digest, texts(held_out))) if corpora else frozenset()
        parts: dict[str, Dataset | StreamedPart] = {}
        seen, most = [], self.largest_token
        for key in sources:
            if key in corpora:
                corpus = replace(corpora[key], held_out=digests)
                parts[key] = part = streamed_part(corpus, self.tokenizer, self.context_length, self.window_start, most)
                self.identity[key], (hashes, self.compared[key]) = corpus_identity(part), first_hashes(part)
            else:
                parts[key], hashes = self._packed(documents[key], key)
            seen.append(hashes)
        self._seen = np.unique(np.concatenate(seen)) if len(seen) > 1 else seen[0]
        self._validation_shared = count_shared("validation", texts(held_out), self._seen)
        self._text, self._validation = TrainingText(parts, self.shares, self.seed), validation

    def _packed(self, documents: Dataset, key: str) -> tuple[Dataset, NDArray[np.uint64]]:
        """Sequences, and the hashes of paragraphs."""
        sequences = self._pack(documents, key)
        if key == TRAIN and self.max_sequences is not None:
            sequences = sequences.select(range(min(self.max_sequences, len(sequences))))
        self.identity[key] = text_identity(documents, sequences)
        return sequences, kept_hashes(documents, self.identity[key]["text"], self.cache_dir)

    def state_dict(self) -> dict[str, Any]:
        """What the texts are, and positions of streams, for checkpoints; all ranks ask for it together."""
        positions = self._training.state(0 if self.trainer is None else self.trainer.global_step)
        return {**self.identity, **positions}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Compare the texts with those of the checkpoint; one of an older version says nothing about them.

        Raises:
            UserError: names each text that has changed.
        """
        text = self._training
        if differences := identity_differences(state_dict, self.identity):
            raise UserError(
                f"the text has changed since the checkpoint was made: {'; '.join(differences)}. Restore it, or start "
                "a new run under another name="
            )
        text.restore(state_dict)

    @property
    def _training(self) -> TrainingText:
        self.setup()
        assert self._text is not None
        return self._text

    def shared_with(self, test_set: str, documents: Dataset | None) -> SharedDocuments:
        """How many documents of a test set are in the text of training and calibration, of streams in its beginning.

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

    def tables(self) -> dict[str, Dataset]:
        """Packed sequences (column ``input_ids``) by the key of their text."""
        return {**self._training.packed, VALIDATION: self._validation}

    def stream_facts(self) -> dict[str, dict[str, Any]]:
        """By key, how much of each streamed source has been seen (:meth:`TrainingText.facts`)."""
        return self._training.facts()

    @property
    def train_sequences(self) -> Dataset:
        """Column ``input_ids``, one row per sequence, those of the training source first; refused of streams."""
        if streamed := self._training.streamed:
            raise UserError(f"{streamed[0]}.streaming=true: there is no table of its sequences")
        return self._training.table

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

    def train_dataloader(self) -> PositionedLoader | StreamLoader:
        """The run's batches from the present optimizer step on.

        A step takes the next ``ranks x accumulated batches x batch size`` sequences of one order, dealt out to the
        ranks in turn, so that it does not matter how the steps before were split.

        Raises:
            UserError: ``trainer.max_steps`` is not set.
        """
        trainer = self.trainer
        if trainer is None or trainer.max_steps < 0:
            raise UserError("trainer.max_steps must be 0 or more: the order of training is laid out for it")
        step = trainer.accumulate_grad_batches * self.batch_size
        place = trainer.global_step * step, trainer.max_steps * step
        share = Share(tuple(self.shares), trainer.global_rank, trainer.world_size, *place)
        return self._training.loader(share, step, self.batch_size, self.num_workers)

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
        for row in self._training.first_sequences(sequences):
            yield collate([row])

    def steps_for(self, passes: float, accumulate_grad_batches: int = 1, world_size: int = 1) -> int:
        """Optimizer steps that see the training source ``passes`` times, rounded up, at least one.

        Raises:
            UserError: it is streamed, so that nobody knows its length.
        """
        per_step = self.batch_size * accumulate_grad_batches * world_size
        if self.train_source.streaming:
            raise UserError(f"trainer.epochs={passes}: nobody knows the length of a streamed data.train; set tokens")
        return max(1, -int(-(passes * self._training.sizes[0] / self.shares[0]) // per_step))

    def _pack(self, documents: Dataset, key: str) -> Dataset:
        options: Any = {name: getattr(self, name) for name in ("cache_dir", "num_proc", "window_start")}
        if MESSAGES in documents.column_names:
            held_out = key == VALIDATION and self.validation_source is None
            template = ChatTemplate(self.tokenizer, self.loss_on, TRAIN if held_out else key)
            return pack_conversations(documents, template, self.context_length, key=key, **options)
        return pack(documents, self.tokenizer, self.context_length, key=key, **options)
