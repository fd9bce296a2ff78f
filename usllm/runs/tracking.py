"""What experiment trackers get of a run besides its metrics: its results, and a clean end whatever the end is."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from lightning.pytorch.loggers import Logger, WandbLogger

from usllm.callbacks import Preempted
from usllm.loggers import WandbRunLogger, log_scalars, log_table
from usllm.system.stage_names import HEADINGS


@contextlib.contextmanager
def finishing(loggers: Sequence[Logger]) -> Iterator[None]:
    """Close the loggers when the block ends, in whichever way: a next job of this process starts with its own.

    A W&B run whose process was told to make room is marked as preempted, so that a sweep queues it again.
    """
    try:
        yield
    except SystemExit as leaving:
        for logger in loggers:
            if isinstance(logger, WandbRunLogger) and isinstance(leaving, Preempted):
                logger.mark_preempting()
        _finish(loggers, leaving.code if isinstance(leaving.code, int) else 1)
        raise
    except BaseException:
        _finish(loggers, 1)
        raise
    _finish(loggers, 0)


def _finish(loggers: Sequence[Logger], exit_code: int) -> None:
    for logger in loggers:
        if isinstance(logger, WandbRunLogger):
            logger.finish(exit_code)
        elif isinstance(logger, WandbLogger):
            if logger._experiment is not None:
                logger._experiment.finish(exit_code=exit_code)
        else:
            with contextlib.suppress(OSError) if exit_code else contextlib.nullcontext():
                logger.save()


def log_results(loggers: Sequence[Logger], report: dict[str, Any], step: int) -> None:
    """Perplexity by test set and stage, size and health, as numbers and as tables.

    Args:
        report: the content of ``report.json``.
        step: at which they are drawn.
    """
    bits, size, health = report["bits_per_weight"], report["bytes"], report["health"]
    numbers = {
        f"perplexity/{row['test_set']}/{row['window']}/{stage}": row.get(stage)
        for row in report["perplexity"]
        for stage in HEADINGS
        if stage in row
    }
    if bits is not None:
        numbers |= {"sketch/bits_per_weight": bits["achieved"], "sketch/model_bits_per_weight": bits["model"]}
        numbers["sketch/model_bytes"] = size["sketched"]
    if health:
        numbers["health/healthy"] = float(health["healthy"])
    log_scalars(loggers, numbers, step)

    columns = ("test_set", "window", "tokens", *(s for s in HEADINGS if any(s in row for row in report["perplexity"])))
    log_table(
        loggers, "perplexity", columns, [[row.get(name) for name in columns] for row in report["perplexity"]], step
    )
    if health:
        log_table(loggers, "health", ("check", "value", "limit", "ok", "layer or source"), _health_rows(health), step)


def _health_rows(health: dict[str, Any]) -> list[list[Any]]:
    checks = {name: check for name, check in health.items() if isinstance(check, dict)}
    rows = [
        [name, check["value"], check["limit"], check["ok"], check.get("layer") or check.get("source") or ""]
        for name, check in checks.items()
    ]
    # The column "ok" holds truth values only; a warning is a check that failed on the way.
    rows += [
        [f"warning at step {warning['step']}: {warning['check']}", None, None, False, warning["message"]]
        for warning in health["warnings"]
    ]
    return rows
