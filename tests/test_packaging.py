"""What is installed: every package, every configuration, and nothing heavy where it is not wanted."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
HEAVY = ("lightning", "hydra", "transformers", "datasets", "wandb", "torchdata", "numba", "triton")


def test_every_folder_with_sources_is_a_package() -> None:
    # setuptools' discovery, its editable install and Hydra's pkg:// all overlook folders without an __init__.py
    starts = (ROOT / "usllm", ROOT / "conf", ROOT / "kernels" / "usllm_kernels")
    sources = (path for start in starts for pattern in ("*.py", "*.yaml") for path in start.rglob(pattern))
    folders = {path.parent for path in sources if "local" not in path.parts}
    assert not [folder for folder in sorted(folders) if not (folder / "__init__.py").is_file()]


def test_the_folder_of_the_kernels_is_no_package() -> None:
    # it would hide the package `kernels`, which transformers imports
    assert not (ROOT / "kernels" / "__init__.py").exists()


@pytest.mark.parametrize("module", ["usllm", "usllm.sketch", "usllm.compress", "usllm.calibration", "usllm_kernels"])
def test_module_imports_with_torch_alone(module: str) -> None:
    code = f"import sys, {module}; print(*sorted({set(HEAVY)!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.split() == []


def test_commands_answer_help_without_torch() -> None:
    code = "import sys, usllm.cli.train, usllm.cli.eval; print('torch' in sys.modules, 'lightning' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.split() == ["False", "False"]


def test_wheel_contains_every_configuration_and_kernel(tmp_path: Path) -> None:
    build = (
        "import os, sys; from setuptools import build_meta; "
        "print(build_meta.build_wheel(sys.argv[1], {'--build-option': ['build', '--build-base', sys.argv[2]]}))"
    )
    source = tmp_path / "source"
    source.mkdir()
    for name in ("usllm", "conf", "kernels", "pyproject.toml", "setup.py", "README.md", "LICENSE"):
        (source / name).symlink_to(ROOT / name)
    subprocess.run(
        [sys.executable, "-c", build, str(tmp_path), str(tmp_path / "build")],
        check=True,
        capture_output=True,
        cwd=source,
    )
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        packed = set(wheel.namelist())
    ours = {
        f"usllm/{path.relative_to(ROOT).as_posix()}"
        for path in (ROOT / "conf").rglob("*.yaml")
        if "local" not in path.parts
    }
    kernels = ROOT / "kernels"
    ours |= {path.relative_to(kernels).as_posix() for path in kernels.rglob("*.py")}
    for pattern in ("*.md", "*.j2", "*.css", "*.js"):
        ours |= {path.relative_to(ROOT).as_posix() for path in (ROOT / "usllm").rglob(pattern)}
    assert ours - packed == set()
