"""Files cut into parts that fit through a narrow way, and joined again: ``NAME.part-001-of-005``.

Each part carries its number and how many there are in its name; the first one's neighbour ``NAME.sha256`` tells whether
what was joined is what was cut.
"""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from benchmarks.gpu_parts.results import Refused

MB = 1_000_000
_PART = re.compile(r"(?P<name>.+)\.part-(?P<number>\d{3})-of-(?P<count>\d{3})")
_BLOCK = 1 << 20


def cut(path: Path, most_bytes: int) -> list[Path]:
    """Replace a file that is too large by parts; smaller ones are left as they are.

    Args:
        path: The file.
        most_bytes: Of one part.

    Returns:
        What there is now: the parts, or the file.
    """
    size = path.stat().st_size
    if size <= most_bytes:
        return [path]
    count = -(-size // most_bytes)
    if count > 999:
        raise Refused(f"{path} would be cut into {count} parts, 999 are the most: allow larger ones")
    parts = []
    with open(path, "rb") as source:
        for number in range(1, count + 1):
            parts.append(path.with_name(f"{path.name}.part-{number:03}-of-{count:03}"))
            with open(parts[-1], "wb") as target:
                _copy(source, target, most_bytes)
    path.with_name(f"{path.name}.sha256").write_text(f"{_digest(path)}\n", encoding="utf-8")
    path.unlink()
    return parts


def cut_all(folder: Path, most_bytes: int) -> list[Path]:
    """Cut what is too large in a folder; all files that are there then."""
    return [part for path in sorted(folder.iterdir()) if path.is_file() for part in cut(path, most_bytes)]


def joined_file(path: Path, scratch: Path) -> Path:
    """A file, joined in ``scratch`` if only its parts are there.

    Raises:
        Refused: A part is missing, or the parts are not those of one file.
    """
    if path.exists():
        return path
    return _join(path, scratch / path.name)


def joined_folder(folder: Path, scratch: Path) -> Path:
    """A folder whose files are whole: itself, or a copy in ``scratch`` with its parts joined.

    Raises:
        Refused: See :func:`joined_file`.
    """
    names = {match["name"] for _, match in _parts_in(folder)}
    if not names:
        return folder
    target = scratch / folder.name
    target.mkdir(parents=True, exist_ok=True)
    for path in sorted(folder.iterdir()):
        if path.is_file() and not _PART.fullmatch(path.name) and path.suffix != ".sha256":
            shutil.copy(path, target / path.name)
    for name in sorted(names):
        _join(folder / name, target / name)
    return target


def _join(path: Path, target: Path) -> Path:
    found = {
        int(match["number"]): (part, int(match["count"]))
        for part, match in _parts_in(path.parent)
        if match["name"] == path.name
    }
    if not found:
        raise Refused(f"{path} is not there, and no parts of it are: make it with benchmarks/gpu_inputs.py make")
    count = max(counted for _, counted in found.values())
    missing = [number for number in range(1, count + 1) if number not in found or found[number][1] != count]
    if missing:
        raise Refused(
            f"{path}: part {missing[0]} of {count} is missing: copy {path.name}.part-{missing[0]:03}-of-{count:03}"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(target, "wb") as file:
        for number in range(1, count + 1):
            with open(found[number][0], "rb") as part:
                shutil.copyfileobj(part, file, _BLOCK)
    told = path.with_name(f"{path.name}.sha256")
    if told.exists() and told.read_text(encoding="utf-8").strip() != _digest(target):
        target.unlink()
        raise Refused(f"{path}: its parts are not those of one file, or damaged: copy all of them again")
    return target


def _parts_in(folder: Path) -> Iterator[tuple[Path, re.Match[str]]]:
    for path in folder.iterdir() if folder.is_dir() else ():
        match = _PART.fullmatch(path.name)
        if match:
            yield path, match


def _copy(source: object, target: object, count: int) -> None:
    while count > 0:
        block = source.read(min(count, _BLOCK))  # type: ignore[attr-defined]
        if not block:
            return
        target.write(block)  # type: ignore[attr-defined]
        count -= len(block)


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()
