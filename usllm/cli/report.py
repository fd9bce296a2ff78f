"""``usllm-report``: figures, a page and a table of finished and unfinished runs.

Only Hydra is imported at the top, so that ``--help`` and shell completion answer at once.
"""

from __future__ import annotations

import shlex

import hydra
from omegaconf import DictConfig

from usllm.cli.arguments import quote_values
from usllm.cli.command import quiet_environment, report_errors
from usllm.cli.start import start, typed
from usllm.runs.directory import register_resolvers
from usllm.system.plugins import import_plugins

PROGRAM = "usllm-report"
_PATHS = ("runs", "out", "reference.evaluation")


@hydra.main(version_base="1.3", config_path="pkg://usllm.conf", config_name="report")
def _report(cfg: DictConfig) -> None:
    def task() -> None:
        quiet_environment()
        import_plugins(cfg.plugins)
        from usllm.reports.settings import check_report, read_runs, references
        from usllm.reports.writing import ReportWriter

        settings = check_report(cfg)
        runs = read_runs(settings.runs)
        writer = ReportWriter(settings.out)
        page = writer.write(
            runs,
            title=settings.title,
            command=shlex.join([PROGRAM, *typed]),
            references=references(settings.reference, runs),
        )
        print(f"{len(runs)} run{'s' if len(runs) != 1 else ''}, {len(writer.written)} files in {settings.out}")
        print(page)

    report_errors(PROGRAM, task)


def quote_paths(arguments: list[str]) -> list[str]:
    """Let ``runs=`` and ``out=`` take a path as it is, though it holds ``=``, spaces or commas.

    A list (``[a,b]``) and what is quoted already are left to Hydra.
    """
    left = tuple(f"{key}={sign}" for key in _PATHS for sign in ("[", "'", '"', "?"))
    return [argument if argument.startswith(left) else quote_values([argument], _PATHS)[0] for argument in arguments]


def main() -> None:
    """Entry point of ``usllm-report`` and ``python -m usllm.cli.report``."""
    register_resolvers()
    start(PROGRAM, _report, quote_paths)


if __name__ == "__main__":
    main()
