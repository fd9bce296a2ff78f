"""``usllm-train``: compose the configuration, check it, run.

Only Hydra is imported at the top, so that ``--help`` and shell completion answer at once.
"""

from __future__ import annotations

import sys

import hydra
from omegaconf import DictConfig

from usllm.cli.command import expand_model, quiet_environment, quiet_libraries, report_errors
from usllm.runs.directory import register_resolvers

PROGRAM = "usllm-train"


@hydra.main(version_base="1.3", config_path="pkg://usllm.conf", config_name="train")
def _train(cfg: DictConfig) -> None:
    def task() -> None:
        quiet_environment()
        from usllm.config import check_train, plain_config

        config = check_train(cfg)
        command = " ".join([PROGRAM, *sys.argv[1:]])
        if config.study is not None:
            from usllm.experiments import run_study

            quiet_libraries()
            run_study(cfg, config.study, command)
            return
        from usllm.runs.finetune import finetune

        quiet_libraries()
        finetune(config, plain_config(cfg), command)

    report_errors(PROGRAM, task)


def main() -> None:
    """Entry point of ``usllm-train`` and ``python -m usllm.cli.train``."""
    register_resolvers()
    sys.argv[1:] = expand_model(sys.argv[1:])
    _train()


if __name__ == "__main__":
    main()
