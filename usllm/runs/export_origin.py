"""What is exported and where it came from: a run, a dense model that is compressed now, or a packed model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from usllm.compress import Compressor, allocate_, swap_linears_
from usllm.config import DataConfig, EvaluationConfig, compressor_of, evaluation_of_run, section_of
from usllm.config.packed import ExportConfig
from usllm.loggers import WandbRunLogger, logs_exports, reopened
from usllm.models import ModelSpec
from usllm.models.loading import check_context_length, load_config, load_dense, load_tokenizer
from usllm.packed.folder import open_folder
from usllm.packed.source import PackingSource, from_checkpoint, from_model
from usllm.runs.inputs import build_data
from usllm.runs.saved_run import find_checkpoint, stored_config
from usllm.system.errors import PackedFormatError, RunError, UserError
from usllm.system.files import read_json
from usllm.system.machine import choose_autocast
from usllm.system.run_files import CHECKPOINT_FOLDER, REPORT_FILE
from usllm.training import load_checkpoint
from usllm.training.checkpoint_section import CHECKPOINT_KEY


@dataclasses.dataclass(frozen=True)
class Origin:
    """What is packed and where it came from.

    Attributes:
        source: Plans and tensors; ``None`` where it is packed already.
        compressor: Method and configuration.
        options: How the compressed layers came about, as recorded.
        spec: The dense model, or the packed one.
        data: The text that it was trained or calibrated on.
        seed: Of the text's split.
        evaluation: What the folder is measured on, where it is: that of its run, with what was typed changed.
        report: Of the finished run; empty without one.
        packed: The packed folder that is read, where it is one.
        tracker: W&B run of the finished run, where that asks for its exports to be logged.
    """

    source: PackingSource | None
    compressor: Compressor
    options: Mapping[str, Any]
    spec: ModelSpec
    data: DataConfig
    seed: int
    evaluation: EvaluationConfig
    report: Mapping[str, Any]
    packed: Path | None = None
    tracker: WandbRunLogger | None = None


def from_run(config: ExportConfig, given: Sequence[str], progress: Console) -> Origin:
    """The model of a run's checkpoint.

    Raises:
        UserError: There is none, or it holds nothing compressed.
        RunError: A number that is packed is not finite.
    """
    checkpoint = find_checkpoint(str(config.ckpt))
    saved = load_checkpoint(checkpoint)
    run = stored_config(saved, checkpoint)
    section = saved[CHECKPOINT_KEY]
    folder = checkpoint.parent.parent if checkpoint.parent.name == CHECKPOINT_FOLDER else checkpoint.parent
    report = read_json(folder / REPORT_FILE) or {}
    source = from_checkpoint(saved, section)
    _refuse_nonfinite(source, checkpoint)
    return Origin(
        source=source,
        compressor=source.compressor,
        options=dataclasses.asdict(source.compressor.options),
        spec=section_of(ModelSpec, run["model"], "model"),
        data=section_of(DataConfig, run["data"], "data"),
        seed=run["seed"],
        # A test set that is not measured need not be at hand.
        evaluation=evaluation_of_run(run, config.evaluation, given)
        if config.measure
        else section_of(EvaluationConfig, run["evaluation"], "evaluation"),
        # The figures are those of the newest checkpoint, not of an earlier one beside it.
        report=report if Path(str(report.get("checkpoint"))).name == checkpoint.name else {},
        tracker=_tracker(run, report, folder, config.form, progress),
    )


def _tracker(
    run: Mapping[str, Any], report: Mapping[str, Any], folder: Path, form: str, progress: Console
) -> WandbRunLogger | None:
    config = report.get("config") or run
    if not logs_exports(config):
        return None
    if form != "packed":
        progress.print("logger.wandb.log_export: not logged to W&B, which gets packed models only")
        return None
    if report.get("finished"):
        return reopened(config, folder)
    # Two processes cannot write one run of W&B.
    progress.print("logger.wandb.log_export: not logged to W&B, the run has not ended")
    return None


def _refuse_nonfinite(source: PackingSource, checkpoint: Path) -> None:
    """Raise a RunError where a number that is packed is not finite; latent weights are not packed, and not read."""
    latent = {f"{name}.weight" for name in source.plans}
    for name, tensor in source.tensors.items():
        if name not in latent and tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise RunError(f"ckpt={checkpoint}: {name} has values that are not finite; take an earlier checkpoint")


def from_dense(config: ExportConfig) -> Origin:
    """A dense model, calibrated and compressed now, without training.

    Raises:
        UserError: The model or its text does not work.
    """
    from usllm.calibration.measure import measure_importance

    compressor = compressor_of(config.sketch, config.allocation)
    model_config = load_config(config.model)
    check_context_length(model_config, config.data.context_length)
    data = build_data(config.data, load_tokenizer(config.model), config.seed, model_config)
    model = load_dense(config.model).eval()
    swap_linears_(model, config.model.patterns)
    autocast = choose_autocast("auto", model.device)
    sequences = config.calibration_sequences
    importance = measure_importance(
        model,
        data.calibration_batches(sequences),
        sequences,
        device=model.device,
        context=nullcontext() if autocast is None else torch.autocast("cpu", autocast),
        progress=True,
    )
    allocate_(model, compressor, importance)
    options = dataclasses.asdict(compressor.options)
    source = from_model(model)
    return Origin(source, compressor, options, config.model, config.data, config.seed, config.evaluation, {})


def from_packed(config: ExportConfig, folder: Path) -> Origin:
    """A packed model, of which nothing but its headers is read yet.

    Args:
        config: Checked configuration.
        folder: Of the packed model.

    Raises:
        UserError: It is damaged; the tensor or file is named.
    """
    try:
        packed = open_folder(folder).packed
    except PackedFormatError as error:
        raise UserError(f"model={config.model.name}: {error}") from error
    options, spec = packed.options or {}, config.model
    evaluation = dataclasses.replace(config.evaluation, validation_split=False)  # nobody knows its text
    return Origin(None, packed.compressor, options, spec, config.data, config.seed, evaluation, {}, packed=folder)
