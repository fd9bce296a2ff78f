"""A folder that is published whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from usllm.errors import UserError

_PARTIAL = ".partial"


@contextmanager
def new_folder(out: Path, overwrite: bool) -> Iterator[Path]:
    """A folder to fill that gets the name ``out`` when all went well; a killed process leaves nothing of that name.

    Raises:
        UserError: ``out`` exists and is not to be overwritten, or cannot be written.
    """
    out = out.expanduser().absolute()
    if out.exists() and not overwrite:
        raise UserError(f"out={out} exists already: pass overwrite=true to replace it, or another folder")
    partial = out.parent / f".{out.name}.{os.getpid()}{_PARTIAL}"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(out)
        partial.mkdir()
        yield partial
        for file in partial.rglob("*"):
            if file.is_file():
                with file.open("rb") as opened:
                    os.fsync(opened.fileno())
                file.chmod(partial.stat().st_mode & 0o666)  # safetensors makes its files private
        old = partial.with_suffix(".old")
        if out.exists():
            os.rename(out, old)
        os.rename(partial, out)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise UserError(f"out={out} cannot be written ({error}): free space, or choose another folder") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _remove_abandoned(out: Path) -> None:
    """Delete what killed exports of the same name left behind."""
    for leftover in out.parent.glob(f".{out.name}.*{_PARTIAL}"):
        process = leftover.name.split(".")[-2]
        if process.isdigit() and not Path(f"/proc/{process}").exists():
            shutil.rmtree(leftover, ignore_errors=True)
