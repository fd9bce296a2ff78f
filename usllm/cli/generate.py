"""``usllm-generate``: continue a text with a packed model or the sketched model of a checkpoint.

Only Hydra is imported at the top, so that ``--help`` and shell completion answer at once.
"""

from __future__ import annotations

import hydra
from omegaconf import DictConfig

from usllm.cli.arguments import folder_of_model, quote_values
from usllm.cli.command import quiet_environment, quiet_libraries, report_errors
from usllm.cli.start import start
from usllm.system.plugins import import_plugins

PROGRAM = "usllm-generate"


@hydra.main(version_base="1.3", config_path="pkg://usllm.conf", config_name="generate")
def _generate(cfg: DictConfig) -> None:
    def task() -> None:
        quiet_environment()
        import_plugins(cfg.plugins)
        from usllm.config.packed import check_generate

        config = check_generate(cfg)
        from usllm.runs.generate import generate

        quiet_libraries()
        generate(config)

    report_errors(PROGRAM, task)


def main() -> None:
    """Entry point of ``usllm-generate`` and ``python -m usllm.cli.generate``."""
    start(PROGRAM, _generate, lambda arguments: quote_values(folder_of_model(arguments), ("prompt", "folder", "ckpt")))


if __name__ == "__main__":
    main()
