"""Reads the runs of a Weights & Biases project into the same records as :mod:`usllm.reports.directory`.

What W&B keeps as numbers is read: configuration, perplexities, sizes, losses. Layers are only in the run's own folder.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from usllm.reports.curve_figures import TRAINING, VALIDATION
from usllm.reports.curves import Curve, add_points, curves_of
from usllm.reports.labels import with_short_names
from usllm.reports.runs import FAILED, FINISHED, INTERRUPTED, RUNNING, Run, record
from usllm.system.errors import UserError

STEP = "trainer/global_step"  # what Lightning's logger draws over
_STATES = {"finished": FINISHED, "running": RUNNING, "failed": FAILED}


def read_project(address: str, api: Any | None = None) -> list[Run]:
    """All runs of ``usllm-train`` in a project.

    Args:
        address: ``entity/project``, or ``project`` of the default entity.
        api: In place of a ``wandb.Api()``.

    Raises:
        UserError: W&B cannot be reached, or refuses, or the project holds no run of ``usllm-train``.
    """
    import wandb

    if not address or address.count("/") > 1:
        raise UserError(f"runs=wandb:{address}: give wandb:<entity>/<project>")
    try:
        found = [_run(run) for run in (api or wandb.Api()).runs(address) if _is_ours(run)]
    except (wandb.errors.Error, OSError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"runs=wandb:{address}: cannot be read ({reason}). Check the name, the network and `wandb login`, "
            "or give the folder that the runs were written to"
        ) from error
    if not found:
        raise UserError(f"runs=wandb:{address}: the project holds no run of usllm-train")
    return with_short_names(found)


def _is_ours(run: Any) -> bool:
    return {"sketch", "model", "trainer"} <= set(run.config)


def _run(run: Any) -> Run:
    config, summary = dict(run.config), dict(run.summary)
    status = _STATES.get(run.state, INTERRUPTED)
    bits = _bits(summary, config)
    report = {
        # Without bits the run was dense, or logged by a version that did not send them: the configuration tells.
        "finished": status == FINISHED and bits is not None,
        "perplexity": _perplexity(summary, config),
        "bits_per_weight": bits,
        "bytes": {"sketched": summary.get("sketch/model_bytes")},
        "seconds": {"training": summary.get("_runtime")},
    }
    healthy = summary.get("health/healthy")
    return record(
        # Two runs may have one name, and a name may hold a slash: the id keeps them apart, as a folder does.
        f"{str(run.name).replace('/', '_')} ({run.id})",
        str(run.url),
        status,
        report,
        config,
        curves=_curves(run),
        warnings=["health checks failed; see the run's page"] if healthy == 0 else [],
    )


def _perplexity(summary: Mapping[str, Any], config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows of a report, from numbers named ``perplexity/<test set>/<window>/<stage>``."""
    evaluation = config.get("evaluation")
    window_start = evaluation.get("window_start", "none") if isinstance(evaluation, Mapping) else "none"
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for key, value in summary.items():
        kind, _, rest = key.partition("/")
        parts = rest.rsplit("/", 2)
        if kind == "perplexity" and len(parts) == 3 and parts[1].isdigit():
            name, window, stage = parts
            row = {"test_set": name, "window": int(window), "window_start": window_start}
            rows.setdefault((name, window), row)[stage] = value
    return list(rows.values())


def _bits(summary: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any] | None:
    achieved = summary.get("sketch/bits_per_weight")
    if achieved is None:
        return None
    asked = config["sketch"].get("bits_per_weight")
    return {"asked": asked, "achieved": achieved, "model": summary.get("sketch/model_bits_per_weight")}


def _curves(run: Any) -> dict[str, Curve]:
    points: dict[str, dict[int, float]] = {}
    for metric in (TRAINING, VALIDATION):  # one by one: rows that lack one of several keys are not given at all
        for row in run.scan_history(keys=[metric, STEP]):
            add_points(points, {metric: row.get(metric)}, row.get(STEP))
    return curves_of(points)
