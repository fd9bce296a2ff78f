"""A complete training run of seconds: tiny Llama with dropout, text from a file, all callbacks of the default config.

Runs can be killed at a chosen point, by an exception or by SIGKILL, and can take several processes, which are forked
from one that has everything imported. Everything here is the test's; the product has no hook for it.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import EarlyStopping
from transformers import AutoModelForCausalLM, PreTrainedModel

from usllm.callbacks import ImportanceCalibration, NanGuard, Preemption, RngState, SketchHealth, SketchReprojection
from usllm.data import SourceSpec
from usllm.data.datamodule import TextDataModule
from usllm.models.random_model import byte_tokenizer, random_config
from usllm.sketch import SketchConfig
from usllm.training import (
    OptimizerConfig,
    SketchFinetuner,
    StepCheckpoint,
    build_objective,
    build_strategy,
    latest_checkpoint,
)

TEXT = "few states are shared by many weights and a hash of the address tells which ones share which"


class Killed(Exception):
    """Ends a run the way a kill does: nothing of usllm or Lightning catches it, and nothing is saved."""


@dataclass(frozen=True)
class Settings:
    """What the tests vary.

    ``kill_at`` is ``(hook, n)``: the n-th call of that callback hook never returns. ``terminate_last_rank_at``, which
    :func:`run_on_ranks` reads, is the same: in that call the last rank gets SIGTERM.
    """

    steps: int = 6
    accumulate: int = 2
    checkpoint_every: int = 2
    project_every: int = 1
    reallocate_every: int | None = None
    validate_every: int = 4  # micro batches
    objective: dict[str, Any] = field(default_factory=lambda: {"name": "cross_entropy"})
    sketch: dict[str, Any] = field(default_factory=lambda: {"bits_per_weight": 2.0, "rows": 2, "group_size": 32})
    lr: float = 1e-3
    precision: str = "32-true"
    gradient_checkpointing: bool = False
    dropout: float = 0.2
    tied: bool = True  # embeddings and head
    batch_size: int = 2  # per rank
    ranks: int = 1
    strategy: str = "auto"
    kill_at: tuple[str, int] | None = None
    sigkill: bool = False
    terminate_last_rank_at: tuple[str, int] | None = None


class Recorder(Callback):
    """Writes every micro batch and its loss, and every validation, to a file that a kill cannot take back.

    Ranks above 0 have files of their own, ``<name>.<rank>``.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        if trainer.global_rank:
            self.path = self.path.with_name(f"{self.path.name}.{trainer.global_rank}")

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        loss = outputs["loss"].double().item().hex()
        self._write("train", trainer.fit_loop.total_batch_idx, [loss, batch["input_ids"].sum(1).tolist()])

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        loss = trainer.callback_metrics["val/loss"].double().item().hex()
        self._write("validation", trainer.fit_loop.total_batch_idx, loss)

    def _write(self, kind: str, position: int, value: Any) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps([kind, position, value]) + "\n")


class Kill(Callback):
    """Ends the process, or raises, inside the n-th call of one hook."""

    def __init__(self, hook: str, count: int, sigkill: bool) -> None:
        self.left = count
        self.sigkill = sigkill
        setattr(self, hook, self._strike)

    def _strike(self, *_: Any, **__: Any) -> None:
        self.left -= 1
        if self.left == 0:
            if self.sigkill:
                os.kill(os.getpid(), signal.SIGKILL)
            raise Killed


class Send(Callback):
    """Sends a signal to this process in the n-th call of one hook."""

    def __init__(self, hook: str, count: int, number: signal.Signals = signal.SIGTERM) -> None:
        self.left, self.number = count, number
        setattr(self, hook, self._send)

    def _send(self, *_: Any, **__: Any) -> None:
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), self.number)


def load_model(dropout: float = 0.2, tied: bool = True) -> PreTrainedModel:
    """Tiny Llama; the same weights every time, and the global generators are left alone."""
    config = random_config("llama")
    config.attention_dropout = dropout
    config.tie_word_embeddings = tied
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def build(folder: Path, settings: Settings, *extra: Callback) -> tuple[Trainer, SketchFinetuner, TextDataModule]:
    """Trainer, module and data of one run in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    text = folder.parent / "text.txt"
    if not text.exists():
        text.write_text("\n\n".join(TEXT[i % 29 :] + TEXT[: i % 13] for i in range(40)))
    kill = [] if settings.kill_at is None else [Kill(*settings.kill_at, settings.sigkill)]
    trainer = Trainer(
        accelerator="cpu",
        devices=settings.ranks,
        strategy=build_strategy(settings.strategy),
        use_distributed_sampler=False,
        max_steps=settings.steps,
        max_epochs=-1,
        accumulate_grad_batches=settings.accumulate,
        val_check_interval=settings.validate_every,
        num_sanity_val_steps=0,
        limit_val_batches=2,
        gradient_clip_val=1.0,
        precision=settings.precision,
        log_every_n_steps=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=[
            ImportanceCalibration(sequences=4),
            SketchReprojection(settings.project_every, settings.reallocate_every, calibration_sequences=4),
            SketchHealth(warmup_steps=2, perplexity_max=1e6),
            RngState(),
            NanGuard(),
            EarlyStopping(monitor="val/loss", patience=100),
            StepCheckpoint(str(folder / "checkpoints"), settings.checkpoint_every),
            Recorder(folder / "record.jsonl"),
            *kill,
            *extra,
        ],
    )
    data = TextDataModule(
        byte_tokenizer(),
        SourceSpec(kind="text", path=str(text)),
        validation_fraction=0.2,
        context_length=32,
        batch_size=settings.batch_size,
        cache_dir=folder.parent / "cache",
        seed=3,
    )
    accumulation = {"accumulate_grad_batches": settings.accumulate}
    module = SketchFinetuner(
        load_model=partial(load_model, settings.dropout, settings.tied),
        sketch=SketchConfig(**settings.sketch),
        objective=build_objective(**settings.objective),
        optimizer=OptimizerConfig(lr=settings.lr, schedule="cosine", warmup_steps=2),
        config={"name": "tiny", "data": {"batch_size": settings.batch_size}, "trainer": accumulation},
        gradient_checkpointing=settings.gradient_checkpointing,
    )
    return trainer, module, data


def run(folder: Path, settings: Settings, *extra: Callback) -> tuple[Trainer, SketchFinetuner]:
    """Train in ``folder``, continuing from its newest checkpoint where there is one."""
    torch.set_num_threads(1)
    seed_everything(7, verbose=False)
    trainer, module, data = build(folder, settings, *extra)
    trainer.ckpt_path = latest_checkpoint(folder / "checkpoints")
    trainer.fit(module, datamodule=data)
    return trainer, module


def run_on_ranks(folder: Path, settings: Settings) -> list[int | None]:
    """As :func:`run`, in ``settings.ranks`` processes that talk through gloo; their exit codes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    ranks = [
        context.Process(target=_rank, args=(folder, settings, rank, port), daemon=True)
        for rank in range(settings.ranks)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    return [process.exitcode for process in ranks]


def _rank(folder: Path, settings: Settings, rank: int, port: int) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), LOCAL_RANK=str(rank), NODE_RANK="0")
    callback = Preemption()
    with callback.armed():
        terminated = settings.terminate_last_rank_at is not None and rank == settings.ranks - 1
        run(folder, settings, callback, *([Send(*settings.terminate_last_rank_at)] if terminated else []))  # type: ignore[misc]
    torch.distributed.destroy_process_group()


def resumed(settings: Settings) -> Settings:
    """The same settings without the kill."""
    return replace(settings, kill_at=None, sigkill=False)


def record(folder: Path, name: str = "record.jsonl") -> dict[tuple[str, int], Any]:
    """What was recorded, by kind and micro batch. A micro batch that ran twice must have been the same both times."""
    found: dict[tuple[str, int], Any] = {}
    for line in (folder / name).read_text().splitlines():
        kind, position, value = json.loads(line)
        assert found.setdefault((kind, position), value) == value, f"{kind} at micro batch {position} ran differently"
    return found


def differences(a: Any, b: Any, path: str = "") -> list[str]:
    """Paths at which two nested structures of tensors and plain values are not equal bit for bit."""
    if isinstance(a, torch.Tensor):
        same = isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
        return [] if same else [path]
    if isinstance(a, dict):
        if not isinstance(b, dict) or a.keys() != b.keys():
            return [f"{path} (keys)"]
        return [found for key in a for found in differences(a[key], b[key], f"{path}/{key}")]
    if isinstance(a, list | tuple):
        if len(a) != len(b):
            return [f"{path} (length)"]
        return [found for i, (x, y) in enumerate(zip(a, b, strict=True)) for found in differences(x, y, f"{path}/{i}")]
    return [] if a == b else [path]


def final_checkpoint(folder: Path) -> dict[str, Any]:
    """The newest checkpoint, without the paths that it holds."""
    path = latest_checkpoint(folder / "checkpoints")
    assert path is not None
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["callbacks"] = {k: v for k, v in checkpoint["callbacks"].items() if "StepCheckpoint" not in k}
    return checkpoint
