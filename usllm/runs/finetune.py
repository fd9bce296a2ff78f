"""The main job: a dense model is sketched, finetuned through its sketch, measured, and resumed where it was killed.

Only composition happens here; what is composed lives in ``models``, ``data``, ``training``, ``callbacks`` and ``eval``.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import Timer
from rich.console import Console
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from usllm.callbacks import SketchHealth
from usllm.config import TrainConfig, sketch_config
from usllm.data.datamodule import TextDataModule
from usllm.eval.perplexity import bos_rule, check_long_enough, tokenise_test_sets, tokenizer_name
from usllm.models.loading import check_context_length, load_config, load_dense, load_tokenizer
from usllm.nn import CompressionReport, compression_report
from usllm.runs.directory import REPORT_FILE, checkpoint_folder, finished_report, refuse_used, write_json
from usllm.runs.machine import machine
from usllm.runs.measure import BaselinePerplexity, measure, merge_stages
from usllm.runs.report import print_report
from usllm.runs.trainer import build_nodes, build_trainer, devices_in
from usllm.training import SketchFinetuner, build_objective, latest_checkpoint

VALIDATION_SET = "validation"
"""Name of the held-out split among the test sets."""


def finetune(config: TrainConfig, plain: Mapping[str, Any], command: str) -> dict[str, Any]:
    """Run, or continue, or only report, the run that ``config`` describes.

    Args:
        config: checked configuration.
        plain: the same as plain Python, for checkpoints and loggers.
        command: what the user typed, for the report.

    Returns:
        The content of ``report.json``.

    Raises:
        UserError: something in the input does not work, or the run directory is in use.
    """
    started = time.perf_counter()
    run_dir = Path(config.run_dir)
    if config.resume and (finished := finished_report(run_dir)) is not None:
        print_report(finished)
        return finished
    if not config.resume:
        refuse_used(run_dir)

    console = Console(stderr=True)
    model_config = load_config(config.model)
    check_context_length(model_config, config.data.context_length)
    for window in config.evaluation.windows:
        check_context_length(model_config, window, "evaluation.windows")
    tokenizer = load_tokenizer(config.model)
    console.print("Reading and tokenising text …")
    data = build_data(config, tokenizer)
    streams = test_streams(config, tokenizer, data)
    accumulate = int(config.trainer.get("accumulate_grad_batches", 1))
    max_steps = config.trainer.get("max_steps") or data.steps_for(
        config.trainer["epochs"], accumulate, devices_in(config.trainer)
    )

    seed_everything(config.seed, workers=True, verbose=False)
    checkpoint = latest_checkpoint(checkpoint_folder(run_dir)) if config.resume else None
    if checkpoint is not None:
        console.print(f"Continuing from {checkpoint}", markup=False)
    baseline = BaselinePerplexity(run_dir, tokenizer, streams, config.evaluation)
    timer = Timer()
    callbacks = build_nodes("callbacks", config.callbacks)
    loggers = list(build_nodes("logger", config.logger).values())
    trainer = build_trainer(config, max_steps, [baseline], [*callbacks.values(), timer], loggers)
    module = SketchFinetuner(
        load_model=partial(load_dense, config.model),
        sketch=sketch_config(config),
        objective=build_objective(**config.objective),
        optimizer=config.optimizer,
        patterns=config.model.patterns,
        config=plain,
        gradient_checkpointing=config.model.gradient_checkpointing,
    )
    for logger in loggers:
        logger.log_hyperparams(dict(plain))
    trainer.fit(module, datamodule=data, ckpt_path=checkpoint)

    after = measure(module.model, tokenizer, streams, config.evaluation, "Finetuned model")
    compression = compression_report(module.model)
    saved = latest_checkpoint(checkpoint_folder(run_dir))
    report = {
        "finished": True,
        "name": config.name,
        "command": command,
        "perplexity": merge_stages(dense=baseline.rows.get("dense"), before=baseline.rows.get("before"), after=after),
        "bits_per_weight": {
            "asked": float(config.sketch.get("bits_per_weight", 0.5)),
            "achieved": compression.bits_per_weight,
            "model": compression.model_bits_per_weight,
        },
        "bytes": {"sketched": compression.model_bytes, "dense_bf16": _dense_bytes(compression)},
        "steps": trainer.global_step,
        "tokens": trainer.global_step * accumulate * trainer.world_size * config.data.batch_size * config.data.context_length,
        "seconds": {"training": timer.time_elapsed("train"), "total": time.perf_counter() - started},
        "precision": str(trainer.precision),
        "tokenizer": {"name": tokenizer_name(tokenizer), "bos": bos_rule(tokenizer)},
        "checkpoint": str(saved) if saved else "none was written",
        "report": str(run_dir / REPORT_FILE),
        "health": _health(callbacks),
        "compression": compression.to_dict(),
        "next": next_commands(config, command),
        "machine": machine(),
        "config": dict(plain),
    }
    if trainer.is_global_zero:
        write_json(run_dir / REPORT_FILE, report)
        print_report(report)
    return report


def build_data(config: TrainConfig, tokenizer: PreTrainedTokenizerBase) -> TextDataModule:
    """The data module of a run, with its text read and packed."""
    section = config.data
    data = TextDataModule(
        tokenizer,
        section.train,
        section.validation,
        validation_fraction=section.validation_fraction,
        context_length=section.context_length,
        batch_size=section.batch_size,
        num_workers=section.num_workers,
        num_proc=section.num_proc,
        cache_dir=section.cache_dir,
        seed=config.seed,
    )
    data.setup()
    return data


def test_streams(
    config: TrainConfig, tokenizer: PreTrainedTokenizerBase, data: TextDataModule
) -> dict[str, Tensor]:
    """Token streams ``[n]`` of all test sets; the held-out split first, where it is asked for."""
    windows = config.evaluation.windows
    streams = {}
    if config.evaluation.validation_split:
        streams[VALIDATION_SET] = data.validation_tokens()
        for window in windows:
            check_long_enough(streams[VALIDATION_SET], window, VALIDATION_SET)
    return streams | tokenise_test_sets(config.evaluation.test_sets, tokenizer, windows)


def next_commands(config: TrainConfig, command: str) -> list[str]:
    """What to try after this run, as commands that work from the same folder."""
    rate = float(config.sketch.get("bits_per_weight", 0.5))
    words = [word for word in command.split()[1:] if not word.startswith(("sketch.bits_per_weight=", "resume="))]
    return [
        f"{program('usllm-eval')} ckpt={config.run_dir}",
        " ".join([program("usllm-train"), *words, f"sketch.bits_per_weight={rate / 2:g}"]),
    ]


def program(name: str) -> str:
    """How to call an installed command: its name, or its path where the environment is not activated."""
    beside = Path(sys.executable).parent / name
    if shutil.which(name) is not None or not beside.exists():
        return name
    return str(beside.relative_to(Path.cwd())) if beside.is_relative_to(Path.cwd()) else str(beside)


def _dense_bytes(compression: CompressionReport) -> int:
    return 2 * compression.parameters


def _health(callbacks: Mapping[str, Any]) -> dict[str, Any] | None:
    health = next((callback for callback in callbacks.values() if isinstance(callback, SketchHealth)), None)
    return None if health is None else health.report()
