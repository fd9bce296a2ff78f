"""``usllm-inspect``: check a packed model and say where every byte goes.

Only Hydra is imported at the top, so that ``--help`` and shell completion answer at once.
"""

from __future__ import annotations

import hydra
from omegaconf import DictConfig

from usllm.cli.arguments import folder_of_model, quote_values
from usllm.cli.command import quiet_environment, quiet_libraries, report_errors
from usllm.cli.start import start
from usllm.system.plugins import import_plugins

PROGRAM = "usllm-inspect"


@hydra.main(version_base="1.3", config_path="pkg://usllm.conf", config_name="inspect")
def _inspect(cfg: DictConfig) -> None:
    def task() -> None:
        quiet_environment()
        import_plugins(cfg.plugins)
        from usllm.config.packed import check_inspect

        config = check_inspect(cfg)
        from usllm.runs.inspect import inspect_model

        quiet_libraries()
        inspect_model(config)

    report_errors(PROGRAM, task)


def main() -> None:
    """Entry point of ``usllm-inspect`` and ``python -m usllm.cli.inspect``."""
    start(PROGRAM, _inspect, lambda arguments: quote_values(folder_of_model(arguments), ("folder", "json")))


if __name__ == "__main__":
    main()
