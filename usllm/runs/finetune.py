"""The main job: a dense model is sketched, finetuned through its sketch, measured, and resumed where it was killed.

Only composition happens here; what is composed lives in ``models``, ``data``, ``training``, ``callbacks`` and ``eval``.
"""

from __future__ import annotations

import contextlib
import shlex
import time
import warnings
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, cast

from lightning.pytorch import Callback, seed_everything
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from usllm.callbacks import LoggedSteps, Preemption, SketchHealth, SketchReprojection
from usllm.config import TrainConfig, compressor_of
from usllm.config.compression import DEFAULT_METHOD
from usllm.config.trainer_arguments import length_problems
from usllm.config.validation import user_error
from usllm.eval.perplexity import bos_rule, tokenizer_name
from usllm.loggers import CsvRunLogger, axis_step
from usllm.models.loading import load_dense
from usllm.runs.beginning import begin
from usllm.runs.block_by_block import block_by_block
from usllm.runs.conversations import ConversationsApart
from usllm.runs.directory import finished_report, noting_failure, refuse_used
from usllm.runs.ending import early_end, timer_of
from usllm.runs.inputs import budget_line, program, sharing
from usllm.runs.launched import ending_together
from usllm.runs.measure import BaselinePerplexity, intervals, measure, merge_stages, window_losses
from usllm.runs.report import print_outcome, print_report
from usllm.runs.side_by_side import SideBySide
from usllm.runs.sizes import sizes
from usllm.runs.tracking import finishing, log_results
from usllm.runs.trainer import build_nodes, build_trainer, devices_in, refuse_by_lightning, steps_of
from usllm.stages import Preparation
from usllm.system.code_version import code_version
from usllm.system.errors import UserError
from usllm.system.files import write_json
from usllm.system.lock import sole_user
from usllm.system.machine import machine
from usllm.system.renamed_keys import with_todays_keys
from usllm.system.run_files import REPORT_FILE, STAGES_FOLDER, WINDOWS_FILE, checkpoint_folder, found_by_stages
from usllm.training import SketchFinetuner, build_objective, latest_checkpoint, load_checkpoint
from usllm.training.checkpoint_section import checked_section, refuse_to_continue
from usllm.training.differences import agree, run_differences

_FREE_KEYS = ("evaluation.batch_size", "evaluation.allow_shared")
"""What a finished run may be asked for again with another value: it changes no figure."""


def finetune(config: TrainConfig, plain: Mapping[str, Any], command: str, brief: bool = False) -> dict[str, Any]:
    """Run, or continue, or only report, the run that ``config`` describes.

    Args:
        config: checked configuration.
        plain: the same as plain Python, for checkpoints and loggers.
        command: what the user typed, for the report.
        brief: give one line to a run that has ended before, not its tables: it is one of many.

    Returns:
        The content of ``report.json``.

    Raises:
        UserError: something in the input does not work, or the run directory is in use.
    """
    run_dir = Path(config.run_dir)
    if config.resume and (finished := finished_report(run_dir)) is not None:
        refuse_other_configuration(finished, config, plain)
        print_outcome(finished) if brief else print_report(finished)
        return finished
    callbacks: list[Callback] = list(build_nodes("callbacks", config.callbacks).values())
    loggers: list[Logger] = list(build_nodes("logger", config.logger).values())
    with contextlib.ExitStack() as stack:
        for callback in callbacks:
            if isinstance(callback, Preemption):
                stack.enter_context(callback.armed())
        stack.enter_context(sole_user(run_dir))
        if not config.resume:
            refuse_used(run_dir)
        stack.enter_context(finishing(loggers))
        if config.block_by_block:
            return block_by_block(config, plain, command, loggers)
        return _finetune(config, plain, command, callbacks, loggers)


def _finetune(
    config: TrainConfig,
    plain: Mapping[str, Any],
    command: str,
    callbacks: list[Callback],
    loggers: list[Logger],
) -> dict[str, Any]:
    """The run itself, in a directory that is its own."""
    started = time.perf_counter()
    run_dir = Path(config.run_dir)
    has_stages = (run_dir / STAGES_FOLDER).is_dir()
    checkpoint = latest_checkpoint(checkpoint_folder(run_dir)) if config.resume else None
    if checkpoint is not None:
        refuse_to_continue(checked_section(load_checkpoint(checkpoint)), f"resume=true: {checkpoint}")
    timer = timer_of(callbacks, config.trainer.get("max_time"))
    first_rank = getattr(rank_zero_only, "rank", 0) == 0
    console = Console(stderr=True, quiet=not first_rank)
    refuse_by_lightning(config)
    max_steps = steps_of(config)
    if problems := length_problems(config.trainer, config.optimizer.warmup_steps, max_steps or 0):
        raise user_error(problems)
    begun = begin(config, plain, console)
    config, plain, tokenizer, data = begun.config, begun.plain, begun.tokenizer, begun.data
    accumulate = int(config.trainer.get("accumulate_grad_batches", 1))
    if max_steps is None:
        max_steps = data.steps_for(config.trainer["epochs"], accumulate, devices_in(config.trainer))
        if problems := length_problems(config.trainer, config.optimizer.warmup_steps, max_steps):
            raise user_error(problems)

    if max_steps:
        console.print(budget_line(max_steps, config, accumulate), markup=False, soft_wrap=True, highlight=False)
    seed_everything(config.seed, workers=True, verbose=False)
    if checkpoint is not None:
        console.print(f"Continuing from {checkpoint}", markup=False)
    elif config.resume and not has_stages:
        console.print(
            f"{run_dir} holds no checkpoint and no stage to go on from: a new run begins", markup=False, soft_wrap=True
        )
    baseline = BaselinePerplexity(
        run_dir,
        tokenizer,
        begun.streams,
        config.evaluation,
        reuse=config.reuse_statistics,
        resumed=checkpoint is not None,
    )
    samples = SideBySide(run_dir, tokenizer, callbacks, config.evaluation.precision)
    observers = [baseline.observe, samples.observe, ConversationsApart(data).observe]
    if not begun.stages:  # the model stays dense: there is no sketch to follow or to watch
        callbacks = [each for each in callbacks if not isinstance(each, (SketchReprojection, SketchHealth))]
    if not loggers:  # Lightning refuses this one where it has nowhere to write
        callbacks = [callback for callback in callbacks if not isinstance(callback, LearningRateMonitor)]
    trainer = build_trainer(config, max_steps, [baseline, LoggedSteps(), *callbacks], loggers)
    module = SketchFinetuner(
        load_model=partial(load_dense, config.model),
        sketch=begun.compressor,
        objective=build_objective(**config.objective),
        optimizer=config.optimizer,
        patterns=config.model.patterns,
        config=plain,
        gradient_checkpointing=config.model.gradient_checkpointing,
        preparation=Preparation(begun.stages, run_dir / STAGES_FOLDER, observers),
    )
    for logger in loggers:
        if isinstance(logger, CsvRunLogger):
            logger.continue_from(0 if checkpoint is None else load_checkpoint(checkpoint)["global_step"])
        logger.log_hyperparams(dict(plain))
    if max_steps == 0:
        warnings.filterwarnings("ignore", "Total length of .* across ranks is zero")
    with noting_failure(run_dir), ending_together(trainer):
        trainer.ckpt_path = checkpoint  # known before the model is configured, whose plans it holds
        trainer.fit(module, datamodule=data)
        model = cast(PreTrainedModel, module.model)
        if not isinstance(model, FSDPModule):  # whose shards stay where they are
            cast(nn.Module, model).to(trainer.strategy.root_device)  # Lightning has put it back on the CPU
        shown, device = trainer.is_global_zero, trainer.strategy.root_device
        after = measure(model, tokenizer, begun.streams, config.evaluation, "Finetuned model", shown, device)
        written = samples.rows(model)
    saved = latest_checkpoint(checkpoint_folder(run_dir))
    health = next((callback.health for callback in callbacks if isinstance(callback, SketchHealth)), {})
    per_step = accumulate * trainer.world_size * config.data.batch_size * config.data.context_length
    losses = window_losses(**baseline.rows, finetuned=after)
    report = {
        "finished": True,
        "name": config.name,
        "command": command,
        **sharing(begun.shared, data.compared),
        "perplexity": merge_stages(**baseline.rows, finetuned=after),
        "intervals": intervals(losses),
        **sizes(model, config),
        "steps": trainer.global_step,
        "max_steps": max_steps,
        "ended_early": early_end(trainer, max_steps, callbacks),
        "tokens": trainer.global_step * per_step,
        "streams": data.stream_facts(),
        "seconds": {
            "training": timer.time_elapsed(),  # goes on from checkpoint to checkpoint
            "total": time.perf_counter() - started,
            "continued": checkpoint is not None or has_stages,  # then this call's is not all of it
        },
        "precision": str(trainer.precision),
        "devices": {
            "processes": trainer.world_size,
            "kind": device.type,
            "strategy": type(trainer.strategy).__name__,
        },
        "tokenizer": {"name": tokenizer_name(tokenizer), "bos": bos_rule(tokenizer, config.evaluation.window_start)},
        "checkpoint": str(saved) if saved else "none was written",
        "report": str(run_dir / REPORT_FILE),
        "coverage": {**begun.covered.to_dict(), "line": begun.covered.line()},
        "health": health,
        "samples": written,
        "stages": found_by_stages(run_dir),
        "next": next_commands(config, command),
        "machine": machine(),
        "code": code_version(),
        "config": dict(plain),
    }
    if trainer.is_global_zero:
        log_results(loggers, report, axis_step(trainer))
        write_json(run_dir / WINDOWS_FILE, losses)
        write_json(run_dir / REPORT_FILE, report)
        print_report(report)
    return report


def refuse_other_configuration(finished: Mapping[str, Any], config: TrainConfig, plain: Mapping[str, Any]) -> None:
    """A finished run answers for the configuration that it was made with, and for no other.

    Raises:
        UserError: names every key that differs and decides the outcome.
    """
    theirs = with_todays_keys(finished.get("config") or {})
    if "sketch" not in theirs:
        return  # written by hand, or by a version that kept no configuration
    differences = run_differences(theirs, plain)
    for group in ("sketch", "allocation", "evaluation"):
        old, new = theirs.get(group) or {}, plain[group]
        if group == "sketch":
            old, new = {"method": DEFAULT_METHOD, **old}, {"method": DEFAULT_METHOD, **new}
        differences += [
            f"{group}.{key}: {old.get(key)} in the finished run, {new.get(key)} in this one"
            for key in sorted(old.keys() | new.keys())
            if not agree(f"{group}.{key}", old.get(key), new.get(key)) and f"{group}.{key}" not in _FREE_KEYS
        ]
    if differences:
        raise UserError(
            f"{config.run_dir} holds a finished run of another configuration: {'; '.join(differences)}. Restore these "
            "values, or take another name=; usllm-eval measures a finished run on other texts and windows"
        )


def next_commands(config: TrainConfig, command: str) -> list[str]:
    """What to try after this run, as commands that work from the same folder."""
    commands = [shlex.join([program("usllm-eval"), f"ckpt={config.run_dir}"])]
    rate = compressor_of(config.sketch, config.allocation).options.bits_per_weight
    if rate is not None:
        changed = ("sketch.bits_per_weight=", "resume=")
        words = [word for word in shlex.split(command)[1:] if not word.startswith(changed)]
        commands.append(shlex.join([program("usllm-train"), *words, f"sketch.bits_per_weight={rate / 2:g}"]))
    return commands
