"""A run that never holds its model: weights are read block by block, and what becomes of them is written and forgotten.

Calibration, reconstruction and measurement are those of any run, one block after another, with streams of hidden states
in files; nothing is trained end to end. It ends with a packed folder in the run's directory.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import seed_everything
from lightning.pytorch.loggers import Logger
from lightning.pytorch.plugins.precision import MixedPrecision, Precision
from rich.console import Console

from usllm.config import TrainConfig
from usllm.eval.perplexity import bos_rule, tokenizer_name
from usllm.models.loading import load_generation_config, place_of
from usllm.models.stored_weights import open_weights
from usllm.packed.card import model_card
from usllm.packed.export import ModelFiles, export
from usllm.packed.inspection import Inspection
from usllm.packed.source import PackingSource
from usllm.runs.beginning import Beginning, begin
from usllm.runs.block_measure import measure_blocks
from usllm.runs.cards import card_facts
from usllm.runs.conversations import ConversationsApart
from usllm.runs.directory import noting_failure
from usllm.runs.inputs import program, sharing
from usllm.runs.measure import intervals, merge_stages, window_losses
from usllm.runs.report import print_report
from usllm.runs.sizes import sizes_of
from usllm.runs.time_spent import seconds_in_blocks
from usllm.runs.tracking import log_results
from usllm.stages import Calibrate, Reconstruct, Work
from usllm.stages.block_statistics import prepare_
from usllm.stages.finished_blocks import FinishedBlocks
from usllm.stages.stored_blocks import StoredBlocks
from usllm.stages.streams import StreamFiles
from usllm.system.code_version import code_version
from usllm.system.errors import UserError
from usllm.system.files import write_json
from usllm.system.machine import choose_autocast, choose_precision, machine
from usllm.system.results import arithmetic, kept_rows, tokens_digest
from usllm.system.run_files import (
    PACKED_FOLDER,
    REPORT_FILE,
    STAGES_FOLDER,
    WINDOWS_FILE,
    checkpoint_folder,
    found_by_stages,
)

SHARD_BYTES = 1_000_000_000
"""Of a weight file of the packed folder: one of them is in memory while it is written."""


def block_by_block(
    config: TrainConfig, plain: Mapping[str, Any], command: str, loggers: Sequence[Logger]
) -> dict[str, Any]:
    """Run, or continue, what ``config`` describes, in a directory that is its own.

    Args:
        config: Checked configuration.
        plain: The same as plain Python.
        command: What the user typed, for the report.
        loggers: Get the results.

    Returns:
        The content of ``report.json``.

    Raises:
        UserError: Something in the input does not work.
        RunError: A weight or a perplexity is not finite, or the disk takes no more.
    """
    started, run_dir = time.perf_counter(), Path(config.run_dir)
    continued = (run_dir / STAGES_FOLDER).is_dir()
    console = Console(stderr=True)
    if any(checkpoint_folder(run_dir).glob("*.ckpt")):
        raise UserError(
            f"{run_dir} holds checkpoints of a run that held its model: leave block_by_block=true out, or take another "
            "name="
        )
    begun = begin(config, plain, console)
    config = begun.config
    seed_everything(config.seed, workers=True, verbose=False)
    for logger in loggers:
        logger.log_hyperparams(dict(begun.plain))
    with noting_failure(run_dir):
        console.print("Looking through the weights …")
        work, source = _opened(begun)
        ConversationsApart(begun.data).observe_blocks(source)
        calibrate = next(stage for stage in begun.stages if isinstance(stage, Calibrate))
        reconstruct = next(stage for stage in begun.stages if isinstance(stage, Reconstruct))
        rows = {"dense": _dense_rows(begun, work, source)}
        prepare_(work, source, calibrate, reconstruct)
        reconstruct.run(work)
        source.without_window()
        states = reconstruct.states(work, reconstruct.text(work))
        finished = FinishedBlocks(source, states, reconstruct.windows(source.count), work.compressor)
        measured = partial(measure_blocks, source, finished.block, begun.tokenizer, begun.streams, config.evaluation)
        rows["finetuned"] = measured("Finished model", work.shows_progress)
        console.print("Packing …")
        packed = _pack(begun, finished, merge_stages(**rows), command)
    losses, stages = window_losses(**rows), found_by_stages(run_dir)
    window_start = config.evaluation.window_start
    report = {
        "finished": True,
        "name": config.name,
        "command": command,
        **sharing(begun.shared, begun.data.compared),
        "perplexity": merge_stages(**rows),
        "intervals": intervals(losses),
        **sizes_of(finished.report(), finished.plans(), config),
        "steps": 0,
        "max_steps": 0,
        "ended_early": None,
        "tokens": 0,
        "streams": begun.data.stream_facts(),
        "seconds": {
            "training": seconds_in_blocks(stages.get(reconstruct.name, ())),
            "total": time.perf_counter() - started,
            "continued": continued,
        },
        "precision": choose_precision(str(config.trainer.get("precision", "auto")), _accelerator(config)),
        "devices": {"processes": 1, "kind": source.device.type, "strategy": None},
        "tokenizer": {"name": tokenizer_name(begun.tokenizer), "bos": bos_rule(begun.tokenizer, window_start)},
        "checkpoint": "none: no model was held",
        "packed": str(packed.path),
        "report": str(run_dir / REPORT_FILE),
        "coverage": {**begun.covered.to_dict(), "line": begun.covered.line()},
        "health": {},
        "samples": [],
        "stages": stages,
        "next": _next_commands(packed.path),
        "machine": machine(),
        "code": code_version(),
        "config": dict(begun.plain),
    }
    log_results(loggers, report, 0)
    write_json(run_dir / WINDOWS_FILE, losses)
    write_json(run_dir / REPORT_FILE, report)
    print_report(report)
    return report


def _opened(begun: Beginning) -> tuple[Work, StoredBlocks]:
    """The work of a model without weights, and its blocks."""
    config, run_dir = begun.config, Path(begun.config.run_dir)
    device = _device(_accelerator(config))
    mixed = choose_precision(str(config.trainer.get("precision", "auto")), _accelerator(config)) == "bf16-mixed"
    plugin = MixedPrecision("bf16-mixed", device.type) if mixed else Precision()
    weights = open_weights(config.model)
    digest = weights.checked_digest()
    context, room = plugin.forward_context, StreamFiles(run_dir / STAGES_FOLDER)
    source = StoredBlocks(weights, begun.model_config, config.model.patterns, device, context, room)

    def load_dense() -> Any:
        raise RuntimeError("block_by_block=true: a stage asked for the whole dense model")

    work = Work(
        model=source.model,
        compressor=begun.compressor,
        load_dense=load_dense,
        batches=begun.data.calibration_batches,
        device=device,
        context=context,
        folder=run_dir / STAGES_FOLDER,
        text=begun.data.identity,
        seed=config.seed,
        shows_progress=(config.callbacks or {}).get("progress") is not None,
        blocks=source,
        weights=digest,
    )
    return work, source


def _device(accelerator: str) -> torch.device:
    """The one device of the run.

    Raises:
        UserError: There is none of that kind.
    """
    usable = torch.cuda.is_available()
    if accelerator in ("gpu", "cuda") and not usable:
        raise UserError(f"trainer.accelerator={accelerator}: this machine has no usable GPU; pass trainer=cpu")
    return torch.device("cuda" if usable and accelerator != "cpu" else "cpu")


def _accelerator(config: TrainConfig) -> str:
    return str(config.trainer.get("accelerator", "auto"))


def _dense_rows(begun: Beginning, work: Work, source: StoredBlocks) -> list[dict[str, Any]]:
    """Perplexities of the dense model, shared by all runs of it where that is asked for."""
    evaluation = begun.config.evaluation

    def fresh() -> list[dict[str, Any]]:
        return measure_blocks(
            source, source.dense, begun.tokenizer, begun.streams, evaluation, "Dense model", work.shows_progress
        )

    if not begun.config.reuse_statistics:
        return fresh()
    key = {
        "weights": work.weights,
        "streams": {name: tokens_digest([stream]) for name, stream in begun.streams.items()},
        "windows": [evaluation.windows, evaluation.max_windows, evaluation.batch_size],
        "window_start": evaluation.window_start,
        "arithmetic": arithmetic(source.device, choose_autocast(evaluation.precision, source.device)),
    }
    return kept_rows("perplexity_block_by_block", key, fresh)


def _pack(begun: Beginning, finished: FinishedBlocks, rows: list[dict[str, Any]], command: str) -> Inspection:
    """Write the packed folder, shard by shard."""
    config, out = begun.config, Path(begun.config.run_dir) / PACKED_FOLDER
    rule = config.evaluation.window_start
    facts = card_facts(out, place_of(config.model), [command], begun.compressor, rows, begun.tokenizer, rule)
    files = ModelFiles(begun.model_config, begun.tokenizer, load_generation_config(config.model))
    return export(
        PackingSource(finished, finished.plans(), begun.compressor),
        files,
        out,
        max_shard_size=SHARD_BYTES,
        overwrite=True,  # what a run that was killed while it was reporting has left
        card=lambda folder, inspection: model_card(facts, inspection),
    )


def _next_commands(packed: Path) -> list[str]:
    """What to try after this run, as commands that work from the same folder."""
    words = (["usllm-inspect"], ["usllm-eval", "data=[<file>]"], ["usllm-generate", "prompt=…"])
    return [shlex.join([program(name), f"model={packed}", *more]) for name, *more in words]
