"""What commands make of their configuration before they compute: texts as tokens, and the name of another command."""

from __future__ import annotations

import dataclasses
import math
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from usllm.config import DataConfig, EvaluationConfig, TrainConfig
from usllm.data.datamodule import TextDataModule
from usllm.data.overlap import SharedDocuments
from usllm.data.sources import read_documents
from usllm.data.windows import resolved_rule
from usllm.eval.perplexity import tokenise_test_sets
from usllm.eval.windows import check_long_enough
from usllm.models.loading import check_vocabulary
from usllm.runs.trainer import devices_in
from usllm.system.errors import UserError

VALIDATION_SET = "validation"
"""Name of the held-out split among the test sets."""


def build_data(
    section: DataConfig, tokenizer: PreTrainedTokenizerBase, seed: int, model: PretrainedConfig
) -> TextDataModule:
    """The data module of a run, with its text read and packed.

    Args:
        section: the group ``data``.
        tokenizer: of the model.
        seed: of the order of training.
        model: configuration of the model, whose family says what stands at the start of a window.

    Raises:
        UserError: a source is missing, empty or too short.
    """
    size = getattr(model.get_text_config(), "vocab_size", None)
    too_large = max(tokenizer.get_vocab().values()) >= (size or math.inf)
    data = TextDataModule(
        tokenizer,
        section.train,
        section.validation,
        mixture=section.mixture,
        validation_fraction=section.validation_fraction,
        context_length=section.context_length,
        max_sequences=section.max_sequences,
        batch_size=section.batch_size,
        num_workers=section.num_workers,
        num_proc=section.num_proc,
        cache_dir=section.cache_dir,
        seed=seed,
        window_start=resolved_rule(section.window_start, model.model_type, tokenizer, "data.window_start"),
        shuffle_buffer=section.shuffle_buffer,
        validation_documents=section.validation_documents,
        on_bad=section.on_bad,
        loss_on=section.loss_on,
        largest_token=size - 1 if size and too_large else None,
    )
    data.setup()
    if too_large:
        for key, sequences in data.tables().items():
            check_vocabulary(model, max(max(row) for row in sequences["input_ids"]), key)
    return data


def refuse_batch_beyond_text(section: DataConfig, data: TextDataModule) -> None:
    """Refuse to train on batches that hold more sequences than the text; nobody counts those of a stream.

    Raises:
        UserError: Names the batch and the text's sequences.
    """
    if any(source.streaming for source in (section.train, *section.mixture.values())):
        return
    if section.batch_size > (held := len(data.train_sequences)):
        raise UserError(f"data.batch_size={section.batch_size}: the text has {held:,} sequences; give at most that")


def with_window_starts(
    config: TrainConfig, plain: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, model: PretrainedConfig
) -> tuple[TrainConfig, dict[str, Any]]:
    """A run's configuration, typed and plain, with what the model's family needs in place of ``window_start=auto``.

    Raises:
        UserError: the rule that was asked for needs a token that the tokenizer does not have.
    """
    rules = {
        group: resolved_rule(getattr(config, group).window_start, model.model_type, tokenizer, f"{group}.window_start")
        for group in ("data", "evaluation")
    }
    typed = {group: dataclasses.replace(getattr(config, group), window_start=rule) for group, rule in rules.items()}
    written = {group: {**plain[group], "window_start": rule} for group, rule in rules.items()}
    return dataclasses.replace(config, **typed), {**plain, **written}


def token_streams(
    evaluation: EvaluationConfig, tokenizer: PreTrainedTokenizerBase, data: TextDataModule | None
) -> dict[str, Tensor]:
    """Token streams ``[n]`` of all test sets; the held-out split of ``data`` first, where it is asked for.

    Raises:
        UserError: a text is missing or shorter than a window.
    """
    streams = {}
    if evaluation.validation_split and data is not None:
        streams[VALIDATION_SET] = data.validation_tokens()
        for window in evaluation.windows:
            check_long_enough(streams[VALIDATION_SET], window, VALIDATION_SET)
    return streams | tokenise_test_sets(evaluation.test_sets, tokenizer, evaluation.windows)


def shared_documents(evaluation: EvaluationConfig, data: TextDataModule) -> list[SharedDocuments]:
    """How many documents of each test set, the held-out split first, are in the text of training and calibration.

    Raises:
        UserError: a text is missing.
    """
    found = [data.shared_with(VALIDATION_SET, None)] if evaluation.validation_split else []
    for name, source in evaluation.test_sets.items():
        found.append(data.shared_with(name, read_documents(source, f"evaluation.test_sets.{name}")))
    return found


def sharing(found: Sequence[SharedDocuments], compared: Mapping[str, int | None] | None = None) -> dict[str, Any]:
    """What a report says about shared documents: the numbers in ``shared_documents`` and lines in ``warnings``.

    Args:
        found: by test set.
        compared: of streamed texts, by key, how many of their documents test sets were compared with; ``None``: all.
    """
    partly = [
        f"{key} is streamed: test sets were compared with its first {count:,} documents, not with what followed"
        for key, count in (compared or {}).items()
        if found and count is not None
    ]
    return {
        "shared_documents": [dataclasses.asdict(one) for one in found],
        "warnings": [*(one.warning for one in found if one.warning is not None), *partly],
    }


def budget_line(max_steps: int, config: TrainConfig, accumulate: int) -> str:
    """What the length of a run comes to in tokens."""
    data, ranks = config.data, devices_in(config.trainer)
    sequences = data.batch_size * accumulate * ranks
    total = max_steps * sequences * data.context_length
    words = f"{max_steps:,} steps x {sequences:,} sequences x {data.context_length:,} tokens = {total:,} tokens"
    if (budget := config.trainer.get("tokens")) is not None:
        words += f" for a budget of {budget:,}"
    streamed = any(source.streaming for source in (data.train, *data.mixture.values()))
    return f"Training on {words}, {'read as they come' if streamed else 'from packed text'}"


def program(name: str) -> str:
    """How to call an installed command: its name, or its path where the environment is not activated."""
    beside = Path(sys.executable).parent / name
    if shutil.which(name) is not None or not beside.exists():
        return name
    return str(beside.relative_to(Path.cwd())) if beside.is_relative_to(Path.cwd()) else str(beside)
