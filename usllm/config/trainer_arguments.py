"""Every argument of ``lightning.Trainer``: passed on, with the values that have an effect, or refused with a way out.

A run is one Lightning epoch of ``max_steps`` optimizer steps: the sampler unrolls all passes over the text. What
Lightning counts in epochs, or what would cut the run short, has no meaning here or another place in the configuration.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Rule = Callable[[Any], bool]
TOO_LONG = 2**31
"""Of steps and other counts."""


@dataclass(frozen=True)
class Argument:
    """What becomes of one argument.

    Attributes:
        accepts: whether a value has an effect; ``None``: the argument is refused, but for null, which gives none.
        way_out: what to pass instead, or what the value must be.
    """

    accepts: Rule | None
    way_out: str


def argument_problems(trainer: Mapping[str, Any]) -> list[str]:
    """One line for each argument that is unknown, refused, or has a value without an effect.

    Args:
        trainer: the group ``trainer``: arguments of ``lightning.Trainer``, ``epochs`` and ``tokens``.
    """
    found = []
    for key, value in trainer.items():
        argument = ARGUMENTS.get(key)
        if argument is None:
            found.append(f"trainer.{key}={value}: not an argument of lightning.Trainer that usllm knows")
        elif argument.accepts is None and value is None and argument.way_out != _ELSEWHERE:
            continue
        elif argument.accepts is None or not argument.accepts(value):
            found.append(f"trainer.{key}={value}: {argument.way_out}")
    clipped = trainer.get("gradient_clip_val")
    if trainer.get("gradient_clip_algorithm") is not None and not clipped:
        found.append(
            f"trainer.gradient_clip_algorithm={trainer['gradient_clip_algorithm']}: nothing is clipped with "
            f"trainer.gradient_clip_val={clipped}; give a value above 0, or leave it out"
        )
    return found


def length_problems(trainer: Mapping[str, Any], warmup_steps: int, max_steps: int) -> list[str]:
    """One line for each value that does not fit into the length of the run.

    Args:
        trainer: the group ``trainer``.
        warmup_steps: of the optimizer.
        max_steps: optimizer steps of the run, 0 for none.
    """
    if max_steps == 0:  # nothing is trained: the model stays as its stages leave it
        return []
    found = []
    accumulate = trainer.get("accumulate_grad_batches", 1)
    batches = max_steps * accumulate if isinstance(accumulate, int) else None
    interval: Any = trainer.get("val_check_interval")
    least: Any = trainer.get("min_steps")
    if warmup_steps > max_steps:
        found.append(
            f"optimizer.warmup_steps={warmup_steps}: longer than the run's {max_steps} steps (trainer.max_steps, "
            "trainer.tokens, or trainer.epochs over the text): make it shorter, 0 for none"
        )
    if max_steps >= TOO_LONG:
        return [
            f"trainer.max_steps={max_steps:.3g}, or trainer.tokens, or trainer.epochs over the text: must be below "
            f"{TOO_LONG} steps"
        ]
    if batches is not None and _whole(interval) and interval > batches and trainer.get("limit_val_batches", 1.0) != 0:
        found.append(
            f"trainer.val_check_interval={interval}: the run has {batches} micro batches, so it would never validate; "
            "give at most that, a share such as 0.25, or trainer.limit_val_batches=0 for no validation"
        )
    if _whole(least) and least > max_steps:
        found.append(f"trainer.min_steps={least}: the run has {max_steps} steps; give at most that")
    return found


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _count(least: int) -> Rule:
    return lambda value: _whole(value) and least <= value < TOO_LONG


def _share_or_count(value: Any) -> bool:
    """0 to 1 as a share, or a whole number of batches."""
    if _whole(value):
        return bool(0 <= value < TOO_LONG)
    return isinstance(value, float) and 0 <= value <= 1


def _interval(value: Any) -> bool:
    """A share above 0 up to 1, at least one micro batch, or a length of time."""
    if _whole(value):
        return bool(value >= 1)
    if isinstance(value, float):
        return 0 < value <= 1
    return _duration(value)


def _clip(value: Any) -> bool:
    return (_whole(value) or isinstance(value, float)) and math.isfinite(value) and value >= 0


def _duration(value: Any) -> bool:
    from lightning.pytorch.callbacks import Timer
    from lightning.pytorch.utilities.exceptions import MisconfigurationException

    try:
        limit = Timer(duration=value)._duration
    except (MisconfigurationException, ValueError, TypeError, AttributeError):
        return False
    return limit is not None and limit > 0


def _or_none(rule: Rule) -> Rule:
    return lambda value: value is None or rule(value)


def _one_of(*choices: object) -> Rule:
    return lambda value: any(value is choice or (type(value) is type(choice) and value == choice) for choice in choices)


_ELSEWHERE = "set by usllm; use the groups callbacks and logger, run_dir and trainer.epochs"
_ONE_EPOCH = "a run is one Lightning epoch, so it would have no effect; leave it out"
_BOOLEAN = Argument(_one_of(True, False), "must be true or false")
_BOOLEAN_OR_NULL = Argument(_or_none(_one_of(True, False)), "must be true, false or null")
_CHECKED_BEFORE = Argument(lambda _: True, "")
_BY_LIGHTNING = Argument(lambda _: True, "")

ARGUMENTS: Mapping[str, Argument] = {
    # The length of the run; its three ways are compared, and ranges checked, in the rules of the whole configuration.
    "max_steps": _CHECKED_BEFORE,
    "epochs": _CHECKED_BEFORE,  # ours: passes over the packed text
    "tokens": _CHECKED_BEFORE,  # ours: a budget
    "accumulate_grad_batches": _CHECKED_BEFORE,
    "max_time": Argument(_or_none(_duration), "must be days:hours:minutes:seconds above 0, such as 00:12:00:00"),
    "min_steps": Argument(_or_none(_count(1)), "must be a whole number of at least 1, or null"),
    "max_epochs": Argument(None, _ELSEWHERE),
    "min_epochs": Argument(None, "a run is one Lightning epoch; use trainer.min_steps"),
    "limit_train_batches": Argument(
        None,
        "would end the run early; use trainer.max_steps for its length, data.max_sequences for less text",
    ),
    "overfit_batches": Argument(None, "use data.max_sequences=<number of sequences> to train on few of them"),
    "fast_dev_run": Argument(None, "would end the run early and unsaved; use trainer=fast_dev_run"),
    "barebones": Argument(
        None, "trains without checkpoints, logs and validation; remove callbacks and loggers instead"
    ),
    # Where it runs: Lightning knows the machine, and refuses what it lacks.
    "accelerator": _BY_LIGHTNING,
    "devices": _BY_LIGHTNING,
    "num_nodes": Argument(_count(1), "must be a whole number of at least 1"),
    "strategy": _BY_LIGHTNING,
    "precision": _CHECKED_BEFORE,
    "plugins": Argument(None, "takes objects, which a configuration cannot hold; leave it out"),
    "sync_batchnorm": Argument(None, "language models have no batch norm, so it would have no effect; leave it out"),
    "use_distributed_sampler": Argument(None, "usllm shares the sequences out among ranks itself; leave it out"),
    # Gradients.
    "gradient_clip_val": Argument(_or_none(_clip), "must be a number of at least 0; null or 0 clips nothing"),
    "gradient_clip_algorithm": Argument(_or_none(_one_of("norm", "value")), "must be norm or value"),
    # Validation.
    "val_check_interval": Argument(
        _or_none(_interval),
        "must be a share of the run above 0 and up to 1.0, a whole number of micro batches, or "
        "days:hours:minutes:seconds",
    ),
    "limit_val_batches": Argument(
        _or_none(_share_or_count), "must be a share from 0.0 to 1.0, or a whole number of batches; 0 for no validation"
    ),
    "num_sanity_val_steps": Argument(_or_none(_count(-1)), "must be a whole number of batches, or -1 for all"),
    "check_val_every_n_epoch": Argument(_one_of(1), "a run is one Lightning epoch; use trainer.val_check_interval"),
    "reload_dataloaders_every_n_epochs": Argument(None, _ONE_EPOCH),
    "limit_test_batches": Argument(None, "there is no test loop; use evaluation.max_windows"),
    "limit_predict_batches": Argument(None, "there is no prediction loop; leave it out"),
    "inference_mode": _BOOLEAN,
    # What is shown and kept.
    "logger": Argument(None, _ELSEWHERE),
    "callbacks": Argument(None, _ELSEWHERE),
    "default_root_dir": Argument(None, _ELSEWHERE),
    "enable_checkpointing": Argument(
        _or_none(_one_of(True)), "use ~callbacks.checkpoint to save nothing; leave it out"
    ),
    "enable_progress_bar": _BOOLEAN_OR_NULL,
    "enable_model_summary": _BOOLEAN_OR_NULL,
    "log_every_n_steps": Argument(_or_none(_count(1)), "must be a whole number of at least 1"),
    "enable_autolog_hparams": Argument(None, "usllm logs the configuration itself; remove loggers with logger=none"),
    "model_registry": Argument(None, "belongs to a cloud service that usllm does not use; leave it out"),
    # Arithmetic and debugging.
    "deterministic": Argument(_or_none(_one_of(True, False, "warn")), "must be true, false or warn"),
    "benchmark": _BOOLEAN_OR_NULL,
    "detect_anomaly": _BOOLEAN,
    "profiler": Argument(
        _or_none(_one_of("simple", "advanced", "pytorch")), "must be simple, advanced, pytorch or null"
    ),
}
"""By name of the argument."""
