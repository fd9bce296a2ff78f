"""A folder that is published whole or not at all."""

from __future__ import annotations

import itertools
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError, safe_open

from usllm.packed.folder import is_packed
from usllm.system.errors import UserError
from usllm.system.files import expanded, settle_folder

DECODED_MARK = {"usllm": "decoded"}
"""In the header of each weight file: by it a folder is known as one that was written here and may be replaced."""
_PARTIAL, _OLD = ".partial", ".old"
_numbers = itertools.count()


class Kind(NamedTuple):
    """What stands in a folder that may be replaced: in words, and how it is known."""

    name: str
    holds: Callable[[Path], bool]


def is_decoded(path: Path) -> bool:
    """Whether a folder says of itself that it holds a model decoded here; nothing is checked."""
    try:
        files = sorted(path.glob("*.safetensors"))
        with safe_open(files[0], framework="pt") as file:
            return (file.metadata() or {}).items() >= DECODED_MARK.items()
    except (OSError, SafetensorError, IndexError):
        return False


PACKED_FOLDER = Kind("a packed model", is_packed)
DENSE_FOLDER = Kind("a dense model written by usllm-export", is_decoded)


def check_out(out: Path, overwrite: bool, kind: Kind = PACKED_FOLDER) -> None:
    """Refuse a place that may not become a folder of this kind, before any work.

    Only an empty folder or one of the same kind is ever replaced: ``overwrite`` is no way to lose a run, a home
    directory, or the dense model that somebody trained.

    Raises:
        UserError: It exists and may not be replaced, or its parent cannot be written to.
    """
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise UserError(f"out={out} is a file or a link, not a folder: choose another name")
    if out.is_dir() and any(out.iterdir()):
        if not kind.holds(out):
            raise UserError(f"out={out} exists and is not {kind.name}: it is never replaced, choose another folder")
        if not overwrite:
            raise UserError(f"out={out} exists already: pass overwrite=true to replace it, or another folder")
    parent = next(folder for folder in out.absolute().parents if folder.exists())
    if not os.access(parent, os.W_OK | os.X_OK) or not parent.is_dir():
        raise UserError(f"out={out}: {parent} cannot be written to; choose another folder")


@contextmanager
def new_folder(out: Path, overwrite: bool, kind: Kind = PACKED_FOLDER) -> Iterator[Path]:
    """A folder to fill that gets the name ``out`` when all went well; a killed process leaves nothing of that name.

    Raises:
        UserError: See :func:`check_out`; also when ``out`` came into being meanwhile and is not to be overwritten.
    """
    out = expanded(out).absolute()
    _clean_up(out)
    check_out(out, overwrite, kind)
    partial = out.parent / f"{_prefix(out)}{os.getpid()}-{next(_numbers)}{_PARTIAL}"
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        partial.mkdir()
        yield partial
        settle_folder(partial, partial.stat().st_mode)
        check_out(out, overwrite, kind)
        _replace(out, partial)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _replace(out: Path, partial: Path) -> None:
    old = partial.with_suffix(_OLD)
    if not out.exists():
        os.rename(partial, out)
        return
    os.rename(out, old)
    try:
        os.rename(partial, out)
    except OSError:
        os.rename(old, out)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _prefix(out: Path) -> str:
    """Of the hidden neighbours of ``out`` that this host makes: process numbers mean nothing on another one."""
    return f".{out.name}.{socket.gethostname().replace('.', '-')}."


def _clean_up(out: Path) -> None:
    """After killed exports of the same name: give back what was about to be replaced, delete what was half written."""
    for leftover in sorted(out.parent.glob(f"{_prefix(out)}*")):
        process = leftover.name.split(".")[-2].partition("-")[0]
        if not process.isdigit() or _is_alive(int(process)):
            continue
        if leftover.suffix == _OLD and not out.exists():
            os.rename(leftover, out)
        elif leftover.suffix in (_OLD, _PARTIAL):
            shutil.rmtree(leftover, ignore_errors=True)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
