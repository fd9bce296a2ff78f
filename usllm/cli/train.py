"""``usllm-train``: compose the configuration, check it, run.

Only Hydra is imported at the top, so that ``--help`` and shell completion answer at once.
"""

from __future__ import annotations

import shlex

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from usllm.cli.arguments import expand_model, without_wandb_argument
from usllm.cli.command import given_overrides, quiet_environment, quiet_libraries, report_errors
from usllm.cli.start import start, typed
from usllm.runs.directory import register_resolvers
from usllm.system.plugins import import_plugins

PROGRAM = "usllm-train"
Metric = float | list[float] | None

# Launchers hand jobs to other processes, which import this module and then look for the job's directory.
register_resolvers()


@hydra.main(version_base="1.3", config_path="pkg://usllm.conf", config_name="train")
def _train(cfg: DictConfig) -> Metric:
    in_sweep = HydraConfig.get().mode == RunMode.MULTIRUN
    return report_errors(PROGRAM, lambda: _run(cfg, in_sweep), in_sweep, resumes=True)


def _run(cfg: DictConfig, in_sweep: bool) -> Metric:
    """Run or continue what ``cfg`` describes; the metric that a sweep optimises."""
    quiet_environment()
    import_plugins(cfg.plugins)
    from usllm.config import check_train, plain_config

    given = given_overrides()
    asked = any(override.lstrip("+").startswith("resume=") for override in given)
    if in_sweep and not asked:
        cfg.resume = True  # a sweep started again skips the jobs that are finished and goes on with the others
    config = check_train(cfg)
    command = shlex.join([PROGRAM, *(given if in_sweep else typed)])
    if in_sweep:
        from usllm.runs.sweeps import refuse_launching

        refuse_launching(config.trainer)
    if config.study is not None:
        from usllm.experiments import run_study

        quiet_libraries()
        run_study(cfg, config.study, command)
        return None
    from usllm.runs.finetune import finetune
    from usllm.runs.sweeps import optimized_values

    quiet_libraries()
    return optimized_values(finetune(config, plain_config(cfg), command, brief=in_sweep), config.optimized_metric)


def main() -> None:
    """Entry point of ``usllm-train`` and ``python -m usllm.cli.train``."""
    start(PROGRAM, _train, lambda arguments: expand_model(without_wandb_argument(arguments)))


if __name__ == "__main__":
    # The module under its own name: other processes could not import ``__main__``.
    from usllm.cli.train import main as installed_main

    installed_main()
