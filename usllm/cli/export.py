"""``usllm-export``: pack a run, or a dense model, into a folder that transformers loads.

Only Hydra is imported at the top, so that ``--help`` and shell completion answer at once.
"""

from __future__ import annotations

import shlex

import hydra
from omegaconf import DictConfig

from usllm.cli.arguments import expand_model, quote_values
from usllm.cli.command import given_overrides, quiet_environment, quiet_libraries, report_errors
from usllm.cli.start import start, typed
from usllm.system.plugins import import_plugins

PROGRAM = "usllm-export"


@hydra.main(version_base="1.3", config_path="pkg://usllm.conf", config_name="export")
def _export(cfg: DictConfig) -> None:
    def task() -> None:
        quiet_environment()
        import_plugins(cfg.plugins)
        from usllm.config.packed import check_export

        given = [override.lstrip("+~") for override in given_overrides()]
        config = check_export(cfg, given)
        from usllm.runs.export import export_model

        quiet_libraries()
        export_model(config, shlex.join([PROGRAM, *typed]), given)

    report_errors(PROGRAM, task)


def main() -> None:
    """Entry point of ``usllm-export`` and ``python -m usllm.cli.export``."""
    start(PROGRAM, _export, lambda arguments: quote_values(expand_model(arguments), ("ckpt", "out")))


if __name__ == "__main__":
    main()
