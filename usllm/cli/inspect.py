"""``usllm-inspect``: check a packed model and say where every byte goes.

Only Hydra is imported at the top, so that ``--help`` and shell completion answer at once.
"""

from __future__ import annotations

import sys

import hydra
from omegaconf import DictConfig

from usllm.cli.command import folder_of_model, quiet_environment, quiet_libraries, quote_values, report_errors
from usllm.cli.unknown_keys import nearest_keys_named

PROGRAM = "usllm-inspect"


@hydra.main(version_base="1.3", config_path="pkg://usllm.conf", config_name="inspect")
def _inspect(cfg: DictConfig) -> None:
    def task() -> None:
        quiet_environment()
        from usllm.config.packed import check_inspect

        config = check_inspect(cfg)
        from usllm.runs.inspect import inspect_model

        quiet_libraries()
        inspect_model(config)

    report_errors(PROGRAM, task)


def main() -> None:
    """Entry point of ``usllm-inspect`` and ``python -m usllm.cli.inspect``."""
    sys.argv[1:] = quote_values(folder_of_model(sys.argv[1:]), ("folder", "json"))
    with nearest_keys_named(PROGRAM):
        _inspect()


if __name__ == "__main__":
    main()
