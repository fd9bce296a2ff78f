"""The Triton kernels in Triton's interpreter, in a process of its own: the choice is made when they are imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from usllm_kernels.dispatch import installed, interpreted


@pytest.mark.first
@pytest.mark.timeout(900)  # minutes of one core, which several processes may share
@pytest.mark.skipif(not installed("triton"), reason="triton is not installed")
@pytest.mark.skipif(torch.cuda.is_available(), reason="a card is at hand: the other tests run the kernels on it")
@pytest.mark.skipif(interpreted(), reason="this is the process")
@pytest.mark.parametrize("which", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_contract_of_the_triton_kernels(which: str) -> None:
    folder = Path(__file__).parent
    command = [
        sys.executable,
        "-m",
        "pytest",
        str(folder),
        "-m",
        f"cuda and {which}",
        "-q",
        "-p",
        "no:xdist",
        "-p",
        "no:cacheprovider",
    ]
    done = subprocess.run(
        command, env={**os.environ, "TRITON_INTERPRET": "1"}, cwd=folder.parent.parent, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-6000:]
    assert " passed" in done.stdout
