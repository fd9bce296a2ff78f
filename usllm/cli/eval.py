"""``usllm-eval``: perplexity of a checkpoint or of a dense model on named test sets.

Only Hydra is imported at the top, so that ``--help`` and shell completion answer at once.
"""

from __future__ import annotations

import shlex

import hydra
from omegaconf import DictConfig

from usllm.cli.arguments import expand_model, expand_test_sets, quote_values
from usllm.cli.command import given_overrides, quiet_environment, quiet_libraries, report_errors
from usllm.cli.start import start, typed
from usllm.runs.directory import register_resolvers
from usllm.system.plugins import import_plugins

PROGRAM = "usllm-eval"


@hydra.main(version_base="1.3", config_path="pkg://usllm.conf", config_name="eval")
def _eval(cfg: DictConfig) -> None:
    def task() -> None:
        quiet_environment()
        import_plugins(cfg.plugins)
        from usllm.config import check_eval

        given = given_overrides()
        config = check_eval(cfg, given)
        from usllm.runs.evaluate import evaluate

        quiet_libraries()
        evaluate(config, shlex.join([PROGRAM, *typed]), given)

    report_errors(PROGRAM, task)


def main() -> None:
    """Entry point of ``usllm-eval`` and ``python -m usllm.cli.eval``."""
    register_resolvers()
    start(PROGRAM, _eval, lambda arguments: quote_values(expand_test_sets(expand_model(arguments)), ("ckpt",)))


if __name__ == "__main__":
    main()
