"""Sanity checks of a sketch, while it trains and as a closing report."""

from __future__ import annotations

import math
import warnings
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from usllm.callbacks.running_loss import RunningLoss, read_losses
from usllm.compress import CompressionReport, LayerPlan, LayerReport, compressed_layers, compression_report
from usllm.training.module import SketchFinetuner, sketch_finetuner
from usllm.training.objectives import CrossEntropy

RISE = 2.0
"""Factor in perplexity over the run's own best from which an explosion is called a divergence."""


class SketchHealth(Callback):
    """Warns, once per kind, when a sketched model shows one of the failures of `docs/method.md` §2.

    - *occupancy*: the share of states with at least one member, in the worst layer.
    - *allocation_variation*: the spread of bits per weight across layers (coefficient of variation), where all layers
      were to have the same.
    - *perplexity*: above ``perplexity_max`` after ``warmup_steps``, from validation, and from the running mean of the
      training loss where the objective is cross-entropy. The diagnosis names the likely cause.
    - *loss_stability*: the mean relative change of the loss from one step to the next, over that of a floating-point
      run with the same data order, where its losses are given.

    Args:
        stop: end training (after the step, with its checkpoint and report) at the first warning about perplexity or
            loss stability; otherwise only warn.
        occupancy_min: lowest acceptable occupancy; the limits and where they come from: `docs/method.md` §2.
        allocation_variation_max: highest acceptable variation.
        perplexity_max: highest acceptable perplexity after warm-up.
        warmup_steps: optimizer steps during which neither perplexity nor stability is judged.
        instability_max: highest acceptable ratio of relative loss changes.
        reference_losses: CSV with columns ``step`` and ``train/loss`` (``metrics.csv`` of a dense run).

    Attributes:
        health: the report, plain Python: per check ``value``, ``limit``, ``ok`` and where known ``layer``; the
            ``warnings`` with their steps; and ``healthy``. Empty until training ended.
    """

    def __init__(
        self,
        stop: bool = False,
        occupancy_min: float = 0.98,
        allocation_variation_max: float = 0.2,
        perplexity_max: float = 1000.0,
        warmup_steps: int = 100,
        instability_max: float = 2.0,
        reference_losses: str | None = None,
    ) -> None:
        self.stop = stop
        self.occupancy_min = occupancy_min
        self.allocation_variation_max = allocation_variation_max
        self.perplexity_max = perplexity_max
        self.warmup_steps = warmup_steps
        self.instability_max = instability_max
        self.reference = {} if reference_losses is None else read_losses(reference_losses)
        self.health: dict[str, Any] = {}
        self._warnings: list[dict[str, Any]] = []
        self._loss = RunningLoss()
        self._matched_loss = RunningLoss()  # at the steps that the reference has, so that both see the same changes
        self._reference_loss = RunningLoss()
        self._validation_perplexity: float | None = None
        self._seen_step = 0
        self._plans: list[LayerPlan | None] = []

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs in order to give the same report."""
        return {
            "warnings": list(self._warnings),
            "loss": self._loss.state(),
            "matched_loss": self._matched_loss.state(),
            "reference_loss": self._reference_loss.state(),
            "validation_perplexity": self._validation_perplexity,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue the statistics of the run that was killed."""
        self._warnings = list(state_dict["warnings"])
        self._loss = RunningLoss(*state_dict["loss"])
        self._matched_loss = RunningLoss(*state_dict["matched_loss"])
        self._reference_loss = RunningLoss(*state_dict["reference_loss"])
        self._validation_perplexity = state_dict["validation_perplexity"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at the fresh allocation."""
        module = sketch_finetuner(pl_module)
        self._seen_step = trainer.global_step
        self._check_structure(trainer, module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Follow the loss, and the allocation when it is a new one."""
        if trainer.global_step == self._seen_step:
            return
        self._seen_step = step = trainer.global_step
        module = sketch_finetuner(pl_module)
        # All ranks must come to the same conclusions: they stop together, and gather sharded weights for the diagnosis.
        loss = float(trainer.strategy.reduce(module.step_loss.last.clone(), reduce_op="mean"))
        self._loss.update(loss, step)
        if step in self.reference:
            self._matched_loss.update(loss, step)
            self._reference_loss.update(self.reference[step], step)
        if step > self.warmup_steps:
            if isinstance(module.objective, CrossEntropy):
                self._check_perplexity(trainer, module, _exp(self._loss.mean), "training loss")
            self._check_stability(trainer)
        if any(a is not b for a, b in zip(self._plans, _plans(module), strict=True)):
            self._check_structure(trainer, module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at the validation perplexity."""
        value = trainer.callback_metrics.get("val/ppl")
        if trainer.sanity_checking or value is None:
            return
        self._validation_perplexity = float(value)
        if trainer.global_step > self.warmup_steps:
            self._check_perplexity(trainer, sketch_finetuner(pl_module), float(value), "validation")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the report."""
        self._report(sketch_finetuner(pl_module))

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the report of a run that was resumed behind its last step, where training does not start again."""
        if not self.health:
            self._report(sketch_finetuner(pl_module))

    def _check_structure(self, trainer: Trainer, module: SketchFinetuner) -> None:
        self._plans = _plans(module)
        report = compression_report(module.network)
        worst = least_occupied(report)
        if worst is not None and worst.value("occupancy") < self.occupancy_min:
            spread = getattr(module.compressor.options, "hash", None)
            self._warn(
                "occupancy",
                trainer,
                f"{1 - worst.value('occupancy'):.1%} of the states of {worst.name} have no member (limit "
                f"{1 - self.occupancy_min:.1%}). Likely cause: sketch.hash={spread} "
                + (
                    "leaves buckets empty by chance; sketch.hash=balanced leaves none"
                    if spread != "balanced"
                    else "is balanced, so this layer's plan has more states than weights: lower sketch.bits_per_weight"
                ),
            )
        if _even(module) and report.allocation_variation > self.allocation_variation_max:
            self._warn(
                "allocation_variation",
                trainer,
                f"bits per weight vary by {report.allocation_variation:.0%} across layers (limit "
                f"{self.allocation_variation_max:.0%}) though allocation.layer_budget=equal. Likely cause: layers that "
                "are too small for the rate, or cannot store as much as it; usllm-inspect shows each layer's",
            )

    def _check_perplexity(self, trainer: Trainer, module: SketchFinetuner, value: float, source: str) -> None:
        if value <= self.perplexity_max or self._warned("perplexity"):
            return
        allocation = getattr(module.compressor.options, "allocation", None)
        cause = explosion_cause(self._loss, compression_report(module.network), allocation)
        self._warn(
            "perplexity", trainer, f"perplexity {value:.0f} ({source}), limit {self.perplexity_max:.0f}. {cause}"
        )
        trainer.should_stop |= self.stop

    def _check_stability(self, trainer: Trainer) -> None:
        ratio = self._instability()
        if ratio is None or ratio <= self.instability_max or self._warned("loss_stability"):
            return
        self._warn(
            "loss_stability",
            trainer,
            f"the loss changes {ratio:.1f} times as much from step to step as in the floating-point run (limit "
            f"{self.instability_max:.1f}). Likely cause: many states change owner at each step; lower optimizer.lr or "
            "raise callbacks.sketch_reprojection.every_n_steps",
        )
        trainer.should_stop |= self.stop

    def _instability(self) -> float | None:
        reference = self._reference_loss.change
        return self._matched_loss.change / reference if self._reference_loss.steps > 1 and reference > 0 else None

    def _warned(self, check: str) -> bool:
        return any(warning["check"] == check for warning in self._warnings)

    def _warn(self, check: str, trainer: Trainer, message: str) -> None:
        if self._warned(check):
            return
        self._warnings.append({"check": check, "step": trainer.global_step, "message": message})
        if trainer.is_global_zero:
            warnings.warn(f"sketch health at step {trainer.global_step}: {message}", stacklevel=2)

    def _report(self, module: SketchFinetuner) -> None:
        report = compression_report(module.network)
        worst = least_occupied(report)
        occupancy = None if worst is None else worst.value("occupancy")
        perplexity, source = self._validation_perplexity, "validation"
        if perplexity is None and isinstance(module.objective, CrossEntropy) and self._loss.steps:
            perplexity, source = _exp(self._loss.mean), "training loss"
        checks = {
            "occupancy": {
                "value": occupancy,
                "limit": self.occupancy_min,
                "ok": None if occupancy is None else occupancy >= self.occupancy_min,
                "layer": None if worst is None else worst.name,
            },
            "allocation_variation": _at_most(
                report.allocation_variation, self.allocation_variation_max if _even(module) else None
            ),
            "perplexity": {**_at_most(perplexity, self.perplexity_max), "source": source},
            "loss_stability": _at_most(self._instability(), self.instability_max),
        }
        healthy = all(check["ok"] is not False for check in checks.values())
        self.health = {**checks, "warnings": list(self._warnings), "healthy": healthy}


def _even(module: SketchFinetuner) -> bool:
    """Whether all layers were to have the same rate."""
    return bool(module.compressor.options.layer_budget == "equal")


def explosion_cause(loss: RunningLoss, report: CompressionReport, allocation: str | None) -> str:
    """The likely cause of a perplexity explosion, in one or two sentences."""
    errors = {layer.name: layer.relative_error for layer in report.layers if layer.relative_error is not None}
    name = max(errors, key=errors.__getitem__, default="")
    error = errors.get(name, 0.0)
    layer = f"The layer with the largest projection error is {name} ({error:.2f})" if name else ""
    if loss.steps and loss.mean - loss.best > math.log(RISE):
        return (
            f"Likely cause: divergence, the loss rose from {loss.best:.2f} at step {loss.best_step} to {loss.mean:.2f}"
            f"; lower optimizer.lr or set trainer.gradient_clip_val. {layer}"
        )
    if allocation == "uniform":
        return (
            "Likely cause: allocation.name=uniform gives the few channels that carry most of the activation energy no "
            f"more states than the others; use proportional or waterfill. {layer}"
        )
    if error >= 1:
        return (
            f"Likely cause: a broken initialisation, {name} is further from its weights than zero would be "
            f"(relative error {error:.2f}); check the calibration text and sketch.state_bits"
        )
    load = next((each.value("load_mean") for each in report.layers if each.name == name), None)
    if load is None:
        return "Likely cause: too few bits; raise sketch.bits_per_weight, or train longer"
    return (
        f"Likely cause: too many collisions, {load:.1f} weights share a state on average in {name}; raise "
        f"sketch.bits_per_weight, lower sketch.rows, or train longer. {layer}"
    )


def least_occupied(report: CompressionReport) -> LayerReport | None:
    """The layer with the lowest occupancy; ``None`` for methods that have none."""
    counted = [layer for layer in report.layers if "occupancy" in layer.facts]
    return min(counted, key=lambda layer: layer.value("occupancy"), default=None)


def _plans(module: SketchFinetuner) -> list[LayerPlan | None]:
    return [layer.plan for layer in compressed_layers(module.network).values()]


def _at_most(value: float | None, limit: float | None) -> dict[str, Any]:
    return {"value": value, "limit": limit, "ok": None if value is None or limit is None else value <= limit}


def _exp(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf
