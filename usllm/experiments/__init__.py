"""Studies: experiments of several runs or of none, each ending in a table; ``study.name`` chooses one."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from omegaconf import DictConfig

from usllm.system.errors import UserError

STUDIES = ("collision_rate", "importance_threshold", "layer_error", "quality", "ste_convergence")


def run_study(cfg: DictConfig, study: dict[str, Any], command: str) -> dict[str, Any]:
    """Run the study that ``study["name"]`` names.

    Raises:
        UserError: There is none of that name, or its input has a problem.
    """
    if study.get("name") not in STUDIES:
        raise UserError(f"study.name={study.get('name')}: unknown; choose one of {', '.join(STUDIES)}")
    result: dict[str, Any] = import_module(f"usllm.experiments.{study['name']}").run(cfg, study, command)
    return result
