"""The synthetic sweep and its report, made once."""

from __future__ import annotations

from datetime import datetime, timezone
from pathlib import Path

import pytest
from synthetic import write_sweep

from usllm.reports.directory import read_folder
from usllm.reports.runs import Run
from usllm.reports.writing import ReportWriter


@pytest.fixture(scope="session")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a sweep: six finished runs, an interrupted, a failed and a dense one."""
    return write_sweep(tmp_path_factory.mktemp("runs") / "sweep")


@pytest.fixture(scope="session")
def runs(sweep: Path) -> list[Run]:
    """The runs of the sweep."""
    return read_folder(sweep)


@pytest.fixture(scope="session")
def written(runs: list[Run], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the sweep's report."""
    folder = tmp_path_factory.mktemp("report")
    made = datetime(2026, 1, 2, 3, 4, tzinfo=timezone.utc)
    ReportWriter(folder).write(runs, title="A sweep", command="usllm-report runs=sweep", made=made)
    return folder
