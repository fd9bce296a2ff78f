"""Perplexity at the three stages of a run: dense, sketched before finetuning, and after it.

The first two are measured inside ``fit``, where the one loaded model passes through those stages, and kept in the run's
directory: a resumed run reports them without measuring again.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as ProgressBar
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from usllm.config import EvaluationConfig
from usllm.eval.perplexity import PerplexityResult, evaluate
from usllm.models.identity import weights_digest
from usllm.nn import sketched_layers
from usllm.runs.directory import read_json, write_json
from usllm.runs.machine import choose_autocast
from usllm.runs.statistics import arithmetic, kept_rows, tokens_digest

BASELINE_FILE = "baseline.json"


def measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    streams: dict[str, Tensor],
    config: EvaluationConfig,
    title: str,
    show_progress: bool = True,
) -> list[dict[str, Any]]:
    """Perplexity of ``model`` as it is, on every test set and window, behind a progress bar.

    Args:
        streams: token ids ``[n]`` by test set.
        title: what is being measured, for the progress bar.

    Returns:
        One plain row per test set and window: ``test_set``, ``window``, ``windows``, ``tokens``, ``perplexity``,
        ``seconds``.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with ProgressBar(*columns, console=Console(stderr=True), transient=True, disable=not show_progress) as bar:
        task = bar.add_task(title, total=None)
        results = evaluate(
            model,
            tokenizer,
            streams,
            config.windows,
            max_windows=config.max_windows,
            batch_size=config.batch_size,
            autocast=choose_autocast(config.precision, model.device),
            progress=lambda name, done, total: bar.update(
                task, description=f"{title}, {name}", completed=done, total=total
            ),
        )
    return [_row(result) for result in results]


def merge_stages(**stages: Sequence[dict[str, Any]] | None) -> list[dict[str, Any]]:
    """Join the rows of several measurements of the same test sets; each stage's figure goes under the stage's name."""
    merged: dict[tuple[str, int], dict[str, Any]] = {}
    for stage, rows in stages.items():
        for row in rows or []:
            shared = {key: row[key] for key in ("test_set", "window", "windows", "tokens")}
            merged.setdefault((row["test_set"], row["window"]), shared)[stage] = row["perplexity"]
    return list(merged.values())


class BaselinePerplexity(Callback):
    """Measures the dense model and, once its weights are projected, the sketched one, before the first step.

    It must be the first callback: its ``on_fit_start`` has to see the model before calibration allocates the sketch.

    Args:
        run_dir: the rows are kept there, in ``baseline.json``.
        tokenizer, streams, config: as for :func:`measure`.
        show_progress: whether to draw progress bars.
        reuse: share the dense model's figures with all runs of the same weights, texts and arithmetic.

    Attributes:
        rows: ``{"dense": rows, "before": rows}``, as far as measured.
    """

    def __init__(
        self,
        run_dir: Path,
        tokenizer: PreTrainedTokenizerBase,
        streams: dict[str, Tensor],
        config: EvaluationConfig,
        show_progress: bool = True,
        reuse: bool = False,
    ) -> None:
        self.reuse = reuse
        self.path = run_dir / BASELINE_FILE
        self.tokenizer = tokenizer
        self.streams = streams
        self.config = config
        self.show_progress = show_progress
        self.rows: dict[str, list[dict[str, Any]]] = read_json(self.path) or {}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the dense model, unless it has been, or the layers are sketched already."""
        self.rows = trainer.strategy.broadcast(self.rows)  # the ranks measure together, or none of them does
        fresh = all(layer.plan is None for layer in sketched_layers(cast(nn.Module, pl_module.model)).values())
        if fresh:
            self._measure("dense", "Dense model", trainer, pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the projected model before its first step."""
        if trainer.global_step == 0:
            self._measure("before", "Sketched model", trainer, pl_module)

    def _measure(self, stage: str, title: str, trainer: Trainer, pl_module: LightningModule) -> None:
        if stage in self.rows:
            return
        model = cast(PreTrainedModel, pl_module.model)

        def fresh() -> list[dict[str, Any]]:
            shown = self.show_progress and trainer.is_global_zero
            return measure(model, self.tokenizer, self.streams, self.config, title, shown)

        alone = trainer.world_size == 1 and not isinstance(model, FSDPModule)
        if self.reuse and stage == "dense" and alone:
            self.rows[stage] = kept_rows("perplexity", self._key(model), fresh)
        else:
            self.rows[stage] = fresh()
        if trainer.is_global_zero:
            write_json(self.path, self.rows)

    def _key(self, model: PreTrainedModel) -> dict[str, Any]:
        """Everything that the dense model's figures depend on."""
        return {
            "weights": weights_digest(model),
            "streams": {name: tokens_digest([stream]) for name, stream in self.streams.items()},
            "order": list(self.streams),
            "windows": [self.config.windows, self.config.max_windows, self.config.batch_size],
            "arithmetic": arithmetic(model.device, choose_autocast(self.config.precision, model.device)),
        }


def _row(result: PerplexityResult) -> dict[str, Any]:
    return {
        "test_set": result.name,
        "window": result.window,
        "windows": result.windows,
        "tokens": result.tokens,
        "perplexity": result.perplexity,
        "seconds": result.seconds,
    }
