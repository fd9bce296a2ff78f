"""Configuration of the commands around packed models: checked without the libraries that do the work."""

from __future__ import annotations

import subprocess
import sys


def test_checks_import_no_models_of_transformers() -> None:
    script = "import sys, usllm.config.packed; sys.exit('transformers.modeling_utils' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], timeout=200, check=False).returncode == 0
