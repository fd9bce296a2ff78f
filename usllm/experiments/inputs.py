"""What studies start from: their settings, the text, the dense model and the passes over its calibration sequences."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from usllm.calibration.measure import ENERGY, measure_statistics
from usllm.calibration.stored import stored_statistics
from usllm.compress import Statistics, swap_linears_
from usllm.config import TrainConfig
from usllm.config.structure import merge_typed
from usllm.config.validation import user_error
from usllm.data.datamodule import TextDataModule
from usllm.models.loading import check_context_length, load_config, load_dense, load_tokenizer
from usllm.runs.inputs import build_data
from usllm.system.errors import UserError
from usllm.system.machine import choose_precision

T = TypeVar("T")


def study_settings(cls: type[T], study: Mapping[str, Any]) -> T:
    """The section ``study`` as the dataclass of its study.

    Raises:
        UserError: With all problems, unknown keys among them, each with key, value and way out.
    """
    problems: list[str] = []
    settings = merge_typed(cls, study, problems, "study.")
    if settings is None or problems:
        raise user_error(problems)
    return settings


def check_sequences(sequences: int) -> None:
    """The rule of every study's ``sequences``.

    Raises:
        UserError: It is below 1.
    """
    if sequences < 1:
        raise UserError(f"study.sequences={sequences}: must be at least 1")


def text_of(config: TrainConfig) -> tuple[PreTrainedTokenizerBase, TextDataModule]:
    """Tokenizer and packed text, before any weight is read.

    Raises:
        UserError: The model or the text is missing, or the context is longer than the model's.
    """
    model = load_config(config.model)
    check_context_length(model, config.data.context_length)
    tokenizer = load_tokenizer(config.model)
    return tokenizer, build_data(config.data, tokenizer, config.seed, model)


def model_of(config: TrainConfig) -> PreTrainedModel:
    """The dense model with its layers swapped but not planned, on the device of ``config.trainer``.

    Raises:
        UserError: It cannot be loaded, or no layer matches.
    """
    model = load_dense(config.model)
    swap_linears_(model, config.model.patterns)
    cast(nn.Module, model).to(_device(config))  # transformers' own `to` is typed for keywords only
    return model.eval()


def importance_of(
    config: TrainConfig, model: PreTrainedModel, data: TextDataModule, sequences: int
) -> dict[str, Tensor]:
    """E[a²] of all compressed layers over the first ``sequences`` training sequences, fp32 [in] each."""
    needs = frozenset({ENERGY})

    def measure() -> dict[str, Statistics]:
        batches = data.calibration_batches(sequences)
        context = partial(precision_context, config)
        return measure_statistics(model, batches, sequences, needs, device=model.device, context=context, progress=True)

    if config.reuse_statistics:
        batches = data.calibration_batches(sequences)
        found = stored_statistics(model, batches, needs, model.device, _autocast(config), measure)
    else:
        found = measure()
    return {name: statistics.energy for name, statistics in found.items() if statistics.energy is not None}


def precision_context(config: TrainConfig) -> AbstractContextManager[Any]:
    """The precision that a run of this configuration calibrates in."""
    dtype = _autocast(config)
    return nullcontext() if dtype is None else torch.autocast(_device(config).type, dtype)


def _autocast(config: TrainConfig) -> torch.dtype | None:
    device = _device(config).type
    precision = choose_precision(str(config.trainer.get("precision", "auto")), "gpu" if device == "cuda" else device)
    return torch.bfloat16 if precision == "bf16-mixed" else None


def _device(config: TrainConfig) -> torch.device:
    accelerator = str(config.trainer.get("accelerator", "auto"))
    if accelerator in ("gpu", "cuda") and not torch.cuda.is_available():
        raise UserError(f"trainer.accelerator={accelerator}: this machine has no usable GPU; use trainer=cpu")
    return torch.device("cuda" if accelerator != "cpu" and torch.cuda.is_available() else "cpu")
