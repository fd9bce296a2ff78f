"""``usllm-eval``: perplexity of a checkpoint or of a dense model on named test sets.

Only Hydra is imported at the top, so that ``--help`` and shell completion answer at once.
"""

from __future__ import annotations

import sys

import hydra
from omegaconf import DictConfig

from usllm.cli.command import expand_model, quiet_libraries, report_errors
from usllm.runs.directory import register_resolvers

PROGRAM = "usllm-eval"


@hydra.main(version_base="1.3", config_path="pkg://usllm.conf", config_name="eval")
def _eval(cfg: DictConfig) -> None:
    def task() -> None:
        quiet_libraries()
        from usllm.config import check_eval

        config = check_eval(cfg)
        from usllm.runs.evaluate import evaluate

        evaluate(config, command=" ".join([PROGRAM, *sys.argv[1:]]))

    report_errors(PROGRAM, task)


def main() -> None:
    """Entry point of ``usllm-eval`` and ``python -m usllm.cli.eval``."""
    register_resolvers()
    sys.argv[1:] = expand_model(sys.argv[1:])
    _eval()


if __name__ == "__main__":
    main()
