"""A line stands in a log where a bar cannot be drawn, and nowhere else."""

from __future__ import annotations

import io

import pytest
from rich.console import Console
from rich.progress import Progress

from usllm.system.announce import announce


@pytest.mark.parametrize(("terminal", "disabled", "lines"), [(False, False, 1), (True, False, 0), (False, True, 0)])
def test_what_no_bar_shows_is_said(terminal: bool, disabled: bool, lines: int) -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=terminal, force_jupyter=False)
    announce(Progress(console=console, disable=disabled), "Measuring [all]")
    assert screen.getvalue().count("Measuring [all] …") == lines
