"""What is installed: every package, every configuration, and nothing heavy where it is not wanted."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
HEAVY = ("lightning", "hydra", "transformers", "datasets", "wandb", "torchdata", "numba", "triton")


def folders_with_sources() -> set[str]:
    names = {
        ".".join(path.parent.relative_to(start).parts)
        for top, start in (("usllm", ROOT), ("conf", ROOT), ("kernels", ROOT / "kernels"))
        for pattern in ("*.py", "*.yaml")
        for path in (ROOT / top).rglob(pattern)
        if "local" not in path.parts
    }
    return {f"usllm.{name}" if name.split(".")[0] == "conf" else name for name in names}


def test_every_folder_is_listed_as_a_package() -> None:
    listed = PROJECT["tool"]["setuptools"]["packages"]
    assert sorted(listed) == listed
    missing = folders_with_sources() - set(listed)
    assert not missing, "list them in pyproject.toml, or they are missing from the wheel"


def test_every_listed_package_has_an_init() -> None:
    # setuptools' editable install and Hydra's pkg:// both overlook folders without one
    for name in PROJECT["tool"]["setuptools"]["packages"]:
        parts = name.split(".")
        top = ROOT / "kernels" if parts[0] == "usllm_kernels" else ROOT
        folder = top.joinpath(*(parts[1:] if parts[1:2] == ["conf"] else parts))
        assert (folder / "__init__.py").is_file(), name


def test_the_folder_of_the_kernels_is_no_package() -> None:
    # it would hide the package `kernels`, which transformers imports
    assert not (ROOT / "kernels" / "__init__.py").exists()


@pytest.mark.parametrize("module", ["usllm", "usllm.sketch", "usllm.nn", "usllm.calibration", "usllm_kernels"])
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
    for name in ("usllm", "conf", "kernels", "pyproject.toml", "README.md", "LICENSE"):
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
