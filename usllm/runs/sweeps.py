"""What one run needs to know of the sweep it is a part of."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

from usllm.config.rules import PERPLEXITY
from usllm.system.errors import UserError
from usllm.system.stage_names import FINETUNED, with_todays_names


def optimized_values(report: Mapping[str, Any], names: str | Sequence[str]) -> float | list[float]:
    """The figures of a finished run that a sweeper minimises or maximises.

    Args:
        report: the content of ``report.json``.
        names: one metric, or a list for a sweep over several: ``perplexity`` is that of the first test set.

    Raises:
        UserError: the run did not measure it; names what it measured.
    """
    if isinstance(names, str):
        return _value(report, names)
    return [_value(report, name) for name in names]


def _value(report: Mapping[str, Any], name: str) -> float:
    rows = {
        f"{PERPLEXITY}/{row['test_set']}/{row['window']}": with_todays_names(row)[FINETUNED]
        for row in report["perplexity"]
    }
    found = {**rows, PERPLEXITY: next(iter(rows.values()), None)}
    if report["bits_per_weight"] is not None:
        found |= {"bits_per_weight": report["bits_per_weight"]["achieved"], "model_bytes": report["bytes"]["sketched"]}
    value = found.get(name)
    if value is None:
        raise UserError(f"optimized_metric={name}: this run measured {', '.join(found)}")
    return math.inf if math.isnan(value) else float(value)  # a sweeper takes the worst, but not what is no number


def refuse_launching(trainer: Mapping[str, Any]) -> None:
    """Refuse a job of a multirun that would start the other ranks by running its command, the whole sweep, again.

    Raises:
        UserError: says what to use instead.
    """
    if starts_ranks(trainer):
        raise UserError(
            f"trainer.devices={trainer.get('devices')} with trainer.strategy={trainer.get('strategy', 'auto')} in a "
            "multirun: every rank would run the whole sweep again. Let something else start the ranks: hydra/launcher="
            "slurm with hydra.launcher.tasks_per_node=<devices>, one run at a time with torchrun, or `wandb agent` "
            "(see conf/sweep), which starts each trial as a command of its own"
        )


def starts_ranks(trainer: Mapping[str, Any]) -> bool:
    """Whether Lightning itself would start the processes of several ranks, by running this command again."""
    from lightning.fabric.plugins.environments import LSFEnvironment, SLURMEnvironment, TorchElasticEnvironment

    from usllm.runs.trainer import devices_in

    strategy = str(trainer.get("strategy", "auto"))
    if devices_in(dict(trainer)) == 1 or any(word in strategy for word in ("spawn", "fork", "notebook")):
        return False
    outer = (LSFEnvironment, SLURMEnvironment, TorchElasticEnvironment)  # those that Lightning recognises by itself
    return "LOCAL_RANK" not in os.environ and not any(environment.detect() for environment in outer)
