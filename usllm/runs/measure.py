"""Perplexity at the three stages of a run: dense, sketched before finetuning, and after it.

The first two are measured inside ``fit``, where the one loaded model passes through those stages, and kept in the run's
directory: a resumed run reports them without measuring again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as ProgressBar
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from usllm.config import EvaluationConfig
from usllm.data.windows import NONE
from usllm.eval.bootstrap import interval
from usllm.eval.perplexity import evaluate
from usllm.eval.windows import PerplexityResult
from usllm.models.identity import weights_digest
from usllm.system.announce import announce
from usllm.system.files import read_json, write_json
from usllm.system.machine import choose_autocast
from usllm.system.ranks import failing_together
from usllm.system.results import arithmetic, kept_rows, tokens_digest
from usllm.system.stage_names import DENSE, HEADINGS, RECONSTRUCTED, SKETCHED, with_todays_names

BASELINE_FILE = "baseline.json"
_MEASURED_ON = "measured_on"  # beside the stages in that file


def measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    streams: dict[str, Tensor],
    config: EvaluationConfig,
    title: str,
    show_progress: bool = True,
    device: torch.device | None = None,
) -> list[dict[str, Any]]:
    """Perplexity of ``model`` as it is, on every test set and window, behind a progress bar.

    Args:
        streams: token ids ``[n]`` by test set.
        title: what is being measured, for the progress bar.
        show_progress: whether to draw it.
        device: where the model computes; ``None``: where its first parameter is.

    Returns:
        One plain row per test set and window: ``test_set``, ``window``, ``windows``, ``tokens``, ``window_start``,
        ``perplexity``, ``seconds``.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with ProgressBar(*columns, console=Console(stderr=True), transient=True, disable=not show_progress) as bar:
        task = bar.add_task(title, total=None)
        announce(bar, f"{title}: measuring")
        results = evaluate(
            model,
            tokenizer,
            streams,
            config.windows,
            max_windows=config.max_windows,
            batch_size=config.batch_size,
            autocast=choose_autocast(config.precision, device or model.device),
            device=device,
            window_start=config.window_start,
            progress=lambda name, done, total: bar.update(
                task, description=f"{title}, {name}", completed=done, total=total
            ),
        )
    return [row_of(result) for result in results]


def merge_stages(**stages: Sequence[dict[str, Any]] | None) -> list[dict[str, Any]]:
    """Join the rows of several measurements of the same windows; each stage's figure goes under the stage's name.

    Figures over other windows, or of another text under the same name, stay in rows of their own.
    """
    merged: dict[tuple[Any, ...], dict[str, Any]] = {}
    for stage, rows in stages.items():
        for row in rows or []:
            shared = {key: row[key] for key in ("test_set", "window", "windows", "tokens")}
            shared["window_start"] = row.get("window_start", NONE)  # rows of older versions do not say it
            merged.setdefault(tuple(shared.values()), shared)[stage] = row["perplexity"]
    return list(merged.values())


def window_losses(**stages: Sequence[dict[str, Any]] | None) -> dict[str, dict[str, list[float]]]:
    """Mean loss of each measured window, in nats, by test set with window and by stage."""
    found: dict[str, dict[str, list[float]]] = {}
    for stage, rows in stages.items():
        for row in rows or []:
            if losses := row.get("window_losses"):  # not in files of older versions
                found.setdefault(_place(row["test_set"], row["window"]), {})[stage] = losses
    return found


def intervals(losses: dict[str, dict[str, list[float]]]) -> dict[str, dict[str, dict[str, list[float]]]]:
    """95 % intervals by bootstrap over windows, by test set with window and by stage.

    Args:
        losses: From :func:`window_losses`.

    Returns:
        ``perplexity``: its two bounds; ``over_dense``: the ratio to the dense model, and the bounds of that.
    """
    found: dict[str, dict[str, dict[str, list[float]]]] = {}
    for place, by_stage in losses.items():
        dense = by_stage.get(DENSE)
        for stage, values in by_stage.items():
            entry = {"perplexity": list(interval(values))}
            if dense is not None and stage != DENSE and len(dense) == len(values):
                ratio = math.exp(min(math.fsum(values) / len(values) - math.fsum(dense) / len(dense), 700))
                entry["over_dense"] = [ratio, *interval(values, dense)]
            found.setdefault(place, {})[stage] = entry
    return found


class BaselinePerplexity(Callback):
    """Measures the dense model and, once its weights are projected, the sketched one, before the first step.

    The dense model is measured when the stages of :class:`usllm.stages.Preparation` begin, which tell :meth:`observe`.

    Args:
        run_dir: the rows are kept there, in ``baseline.json``.
        tokenizer, streams, config: as for :func:`measure`.
        show_progress: whether to draw progress bars.
        reuse: share the dense model's figures with all runs of the same weights, texts and arithmetic.
        resumed: whether the run continues from a checkpoint. Otherwise the file is another run's, which was killed
            before its first checkpoint, and is measured anew.

    Attributes:
        rows: By name of the point (:mod:`usllm.system.stage_names`), as far as measured.
    """

    def __init__(
        self,
        run_dir: Path,
        tokenizer: PreTrainedTokenizerBase,
        streams: dict[str, Tensor],
        config: EvaluationConfig,
        show_progress: bool = True,
        reuse: bool = False,
        resumed: bool = False,
    ) -> None:
        self.reuse = reuse
        self.path = run_dir / BASELINE_FILE
        self.tokenizer = tokenizer
        self.streams = streams
        self.config = config
        self.show_progress = show_progress
        self.resumed = resumed
        self.rows = self._kept() if resumed else {}
        self._trainer: Trainer | None = None
        self._trained = False  # whether stages go on after the model is compressed

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Meet the trainer; the ranks measure together, or none of them does."""
        self._trainer = trainer
        self.resumed, self.rows = trainer.strategy.broadcast((self.resumed, self.rows))

    def observe(self, stage: str, model: nn.Module) -> None:
        """Measure a fresh run's model when stages begin, and again before they train what they have compressed."""
        assert self._trainer is not None, "stages run inside fit, after setup"
        if not self.resumed:
            self._measure(stage, self._trainer, model)
            self._trained = stage == SKETCHED

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the projected model before its first step."""
        if not self.resumed:
            self._measure(RECONSTRUCTED if self._trained else SKETCHED, trainer, cast(nn.Module, pl_module.model))

    def _measure(self, stage: str, trainer: Trainer, measured: nn.Module) -> None:
        title = f"{HEADINGS[stage].capitalize()} model"
        model = cast(PreTrainedModel, measured)

        def fresh() -> list[dict[str, Any]]:
            shown = self.show_progress and trainer.is_global_zero
            device = trainer.strategy.root_device
            return measure(model, self.tokenizer, self.streams, self.config, title, shown, device)

        alone = trainer.world_size == 1 and not isinstance(model, FSDPModule)
        if self.reuse and stage == DENSE and alone:
            self.rows[stage] = kept_rows("perplexity_by_window", self._key(model), fresh)
        else:
            self.rows[stage] = fresh()
        with failing_together():
            if trainer.is_global_zero:
                write_json(self.path, {**self.rows, _MEASURED_ON: self._measured_on()})

    def _kept(self) -> dict[str, list[dict[str, Any]]]:
        """The rows in the file that belong to the present evaluation, which may have been changed since."""
        stages = read_json(self.path)
        if stages is None:
            return {}
        stages = with_todays_names(stages)
        theirs, ours = stages.pop(_MEASURED_ON, {}), self._measured_on()
        # Files of older versions do not say what stood at the start of a window: nothing did.
        same = {place for place in ours if ours[place] == {"window_start": NONE, **theirs.get(place, {})}}
        if other := [place for place in ours if place not in same]:
            rank_zero_warn(
                f"{self.path} was not measured on what evaluation asks for now ({', '.join(other)}): no perplexity "
                "before training is reported there"
            )
        return {
            stage: [row for row in rows if _place(row["test_set"], row["window"]) in same]
            for stage, rows in stages.items()
        }

    def _measured_on(self) -> dict[str, dict[str, Any]]:
        """What a figure of each test set and window depends on besides the model, in JSON types."""
        return {
            _place(name, window): {
                "tokens": tokens_digest([stream]),
                "windows": min(len(stream) // window, self.config.max_windows or len(stream)),
                "precision": self.config.precision,
                "window_start": self.config.window_start,
            }
            for name, stream in self.streams.items()
            for window in self.config.windows
        }

    def _key(self, model: PreTrainedModel) -> dict[str, Any]:
        """Everything that the dense model's figures depend on."""
        return {
            "weights": weights_digest(model),
            "streams": {name: tokens_digest([stream]) for name, stream in self.streams.items()},
            "order": list(self.streams),
            "windows": [self.config.windows, self.config.max_windows, self.config.batch_size],
            "window_start": self.config.window_start,
            "arithmetic": arithmetic(model.device, choose_autocast(self.config.precision, model.device)),
        }


def _place(test_set: str, window: int) -> str:
    return f"{test_set}/{window}"


def row_of(result: PerplexityResult) -> dict[str, Any]:
    """A result as reports keep it, plain Python."""
    return {
        "test_set": result.name,
        "window": result.window,
        "windows": result.windows,
        "tokens": result.tokens,
        "window_start": result.window_start,
        "perplexity": result.perplexity,
        "window_losses": [round(loss, 6) for loss in result.window_losses],
        "seconds": result.seconds,
    }
