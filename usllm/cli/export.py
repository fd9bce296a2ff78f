"""``usllm-export``: pack a run, or a dense model, into a folder that transformers loads.

Only Hydra is imported at the top, so that ``--help`` and shell completion answer at once.
"""

from __future__ import annotations

import sys

import hydra
from omegaconf import DictConfig

from usllm.cli.command import expand_model, quiet_environment, quiet_libraries, report_errors

PROGRAM = "usllm-export"


@hydra.main(version_base="1.3", config_path="pkg://usllm.conf", config_name="export")
def _export(cfg: DictConfig) -> None:
    def task() -> None:
        quiet_environment()
        from usllm.config.packed import check_export

        config = check_export(cfg)
        from usllm.runs.export import export_model

        quiet_libraries()
        export_model(config, " ".join([PROGRAM, *sys.argv[1:]]))

    report_errors(PROGRAM, task)


def main() -> None:
    """Entry point of ``usllm-export`` and ``python -m usllm.cli.export``."""
    sys.argv[1:] = expand_model(sys.argv[1:])
    _export()


if __name__ == "__main__":
    main()
