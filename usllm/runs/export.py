"""From a run, or a dense model, to a packed folder with its card."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from usllm.compress import allocate_, swap_linears_
from usllm.compress.ceilings import shortfall
from usllm.compress.coverage import coverage
from usllm.config import DataConfig, EvaluationConfig, compressor_of, evaluation_of_run, section_of
from usllm.config.packed import ExportConfig, size_in_bytes
from usllm.data.windows import resolved_rule
from usllm.loggers import WandbRunLogger, log_export, logs_exports, reopened
from usllm.models import ModelSpec
from usllm.models.loading import check_context_length, load_config, load_dense, load_generation_config, load_tokenizer
from usllm.models.skeleton import skeleton
from usllm.packed.card import model_card
from usllm.packed.export import ModelFiles, RestStorage, export, left_whole
from usllm.packed.inspection import Inspection
from usllm.packed.loading import load
from usllm.packed.source import PackingSource, from_checkpoint, from_model
from usllm.runs.cards import card_facts
from usllm.runs.inputs import build_data, program, shared_documents, sharing, token_streams
from usllm.runs.measure import measure, merge_stages
from usllm.runs.report import human_bytes, print_coverage, print_facts, print_warnings
from usllm.runs.saved_run import find_checkpoint, stored_config
from usllm.system.errors import RunError
from usllm.system.files import read_json
from usllm.system.machine import choose_autocast
from usllm.system.run_files import CHECKPOINT_FOLDER, REPORT_FILE
from usllm.system.stage_names import HEADINGS, with_todays_names
from usllm.training import load_checkpoint
from usllm.training.checkpoint_section import CHECKPOINT_KEY


@dataclasses.dataclass(frozen=True)
class _Origin:
    """What is packed and where it came from.

    Attributes:
        source: Plans and tensors.
        spec: The dense model.
        data: The text that it was trained or calibrated on.
        seed: Of the text's split.
        evaluation: What the folder is measured on, where it is: that of its run, with what was typed changed.
        report: Of the finished run; empty without one.
        tracker: W&B run of the finished run, where that asks for its exports to be logged.
    """

    source: PackingSource
    spec: ModelSpec
    data: DataConfig
    seed: int
    evaluation: EvaluationConfig
    report: Mapping[str, Any]
    tracker: WandbRunLogger | None = None


def export_model(config: ExportConfig, command: str, given: Sequence[str] = ()) -> Inspection:
    """Pack, write, read back, and print what it takes.

    Args:
        config: Checked configuration.
        command: What the user typed, for the card.
        given: Overrides among that: a run is measured as it was, but for what they name.

    Raises:
        UserError: Something in the input does not work; nothing is left under the name of ``out``.
    """
    progress = Console(stderr=True)
    progress.print("Reading the checkpoint …" if config.ckpt is not None else "Reading and calibrating the model …")
    origin = _from_run(config, given, progress) if config.ckpt is not None else _from_dense(config)
    progress.print(f"Packing {len(origin.source.plans)} layers …")
    tokenizer = load_tokenizer(origin.spec)
    model_config = load_config(origin.spec)
    print_coverage(coverage(skeleton(model_config), origin.spec.patterns, origin.source.plans.keys()), progress)
    asked = origin.evaluation.window_start
    rule = resolved_rule(asked, model_config.model_type, tokenizer, "evaluation.window_start")
    files = ModelFiles(model_config, tokenizer, load_generation_config(origin.spec))

    def card(folder: Path, inspection: Inspection) -> str:
        rows = list(origin.report.get("perplexity", []))
        if config.measure:
            rows = merge_stages(**_stages(rows), packed=_measured(origin, folder))
        commands = [*([origin.report["command"]] if origin.report else []), command]
        base = str(origin.spec.file or origin.spec.name)
        facts = card_facts(config.out, base, commands, origin.source.compressor, rows, tokenizer, rule)
        return model_card(dataclasses.replace(facts, measured_as=facts.measured_as + _measured_on(config)), inspection)

    rest = RestStorage(config.rest.dtype, config.rest.embeddings, config.rest.linears)
    print_warnings(left_whole(origin.source, files.config, rest), Console(stderr=True))
    inspection = export(
        origin.source,
        files,
        config.out,
        rest=rest,
        max_shard_size=size_in_bytes(config.max_shard_size),
        overwrite=config.overwrite,
        card=card,
    )
    tracker = origin.tracker
    artifact = log_export(tracker, inspection.path, inspection.totals()) if tracker else None
    _print_export(inspection, artifact, origin.source)
    return inspection


def _from_run(config: ExportConfig, given: Sequence[str], progress: Console) -> _Origin:
    checkpoint = find_checkpoint(str(config.ckpt))
    saved = load_checkpoint(checkpoint)
    run = stored_config(saved, checkpoint)
    section = saved[CHECKPOINT_KEY]
    folder = checkpoint.parent.parent if checkpoint.parent.name == CHECKPOINT_FOLDER else checkpoint.parent
    report = read_json(folder / REPORT_FILE) or {}
    source = from_checkpoint(saved, section)
    _refuse_nonfinite(source, checkpoint)
    return _Origin(
        source=source,
        spec=section_of(ModelSpec, run["model"], "model"),
        data=section_of(DataConfig, run["data"], "data"),
        seed=run["seed"],
        # A test set that is not measured need not be at hand.
        evaluation=evaluation_of_run(run, config.evaluation, given)
        if config.measure
        else section_of(EvaluationConfig, run["evaluation"], "evaluation"),
        # The figures are those of the newest checkpoint, not of an earlier one beside it.
        report=report if Path(str(report.get("checkpoint"))).name == checkpoint.name else {},
        tracker=_tracker(run, report, folder, progress),
    )


def _tracker(
    run: Mapping[str, Any], report: Mapping[str, Any], folder: Path, progress: Console
) -> WandbRunLogger | None:
    config = report.get("config") or run
    if not logs_exports(config):
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


def _from_dense(config: ExportConfig) -> _Origin:
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
    return _Origin(from_model(model), config.model, config.data, config.seed, config.evaluation, {})


def _measured(origin: _Origin, folder: Path) -> list[dict[str, Any]]:
    tokenizer = load_tokenizer(origin.spec)
    evaluation, model_config = origin.evaluation, load_config(origin.spec)
    data = build_data(origin.data, tokenizer, origin.seed, model_config) if evaluation.validation_split else None
    streams = token_streams(evaluation, tokenizer, data)
    if data is not None:
        print_warnings(sharing(shared_documents(evaluation, data))["warnings"], Console(stderr=True))
    model = load(folder, dtype=torch.float32)
    return measure(model, tokenizer, streams, evaluation, "Packed model")


def _measured_on(config: ExportConfig) -> str:
    if config.measure:
        return "The last column is this folder's own figure."
    return (
        "Measured before packing: the sketched layers are the same bit for bit, what is not sketched was rounded to "
        "the types above."
    )


def _stages(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Merged rows taken apart again, by stage."""
    todays = [with_todays_names(row) for row in rows]
    return {stage: [{**row, "perplexity": row[stage]} for row in todays if stage in row] for stage in HEADINGS}


def _print_export(inspection: Inspection, artifact: str | None, source: PackingSource) -> None:
    totals, rate = inspection.totals(), source.compressor.options.bits_per_weight
    got = f"{totals['bits_per_weight']:.4f} bits per weight" + (f" of {rate:g} asked" if rate is not None else "")
    reason = shortfall(source.plans, source.compressor)
    console = Console()
    facts = [
        ("packed model", str(inspection.path)),
        ("sketched", f"{human_bytes(totals['sketched_bytes'])}, {got}"),
        *([("", f"less than asked: {reason}")] if reason else []),
        ("", f"{totals['bits_per_weight_with_entries']:.4f} with the JSON entries of tensors, which are not in it"),
        ("everything else", human_bytes(totals["rest_bytes"])),
        ("weight files", f"{totals['weight_bytes']:,} bytes, {totals['model_bits_per_weight']:.4f} bits per parameter"),
        ("folder", f"{totals['disk_bytes']:,} bytes"),
        *([("W&B artifact", artifact)] if artifact is not None else []),
    ]
    print_facts(facts, console)
    console.print("\nNext, try")
    for line in (
        shlex.join([program("usllm-inspect"), f"model={inspection.path}"]),
        shlex.join([program("usllm-generate"), f"model={inspection.path}"]) + ' prompt="…"',
    ):
        console.print(f"  {line}", style="bold", markup=False, soft_wrap=True, highlight=False)
