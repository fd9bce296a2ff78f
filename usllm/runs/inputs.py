"""What commands make of their configuration before they compute: texts as tokens, and the name of another command."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from usllm.config import DataConfig, EvaluationConfig
from usllm.data.datamodule import TextDataModule
from usllm.eval.perplexity import check_long_enough, tokenise_test_sets

VALIDATION_SET = "validation"
"""Name of the held-out split among the test sets."""


def build_data(section: DataConfig, tokenizer: PreTrainedTokenizerBase, seed: int) -> TextDataModule:
    """The data module of a run, with its text read and packed.

    Raises:
        UserError: a source is missing, empty or too short.
    """
    data = TextDataModule(
        tokenizer,
        section.train,
        section.validation,
        validation_fraction=section.validation_fraction,
        context_length=section.context_length,
        max_sequences=section.max_sequences,
        batch_size=section.batch_size,
        num_workers=section.num_workers,
        num_proc=section.num_proc,
        cache_dir=section.cache_dir,
        seed=seed,
    )
    data.setup()
    return data


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


def program(name: str) -> str:
    """How to call an installed command: its name, or its path where the environment is not activated."""
    beside = Path(sys.executable).parent / name
    if shutil.which(name) is not None or not beside.exists():
        return name
    return str(beside.relative_to(Path.cwd())) if beside.is_relative_to(Path.cwd()) else str(beside)
