"""Files that are written whole or not at all."""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from usllm.system.errors import UserError


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write ``content`` so that a reader never sees half a file, also when the process dies."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """As :func:`write_json`, for any text; a disk that runs full leaves the old file and nothing else."""
    with replacing(path) as file:
        file.write(text.encode("utf-8"))


def write_torch(path: Path, content: dict[str, Any]) -> None:
    """As :func:`write_json`, for tensors and plain Python, as ``torch.load(weights_only=True)`` reads them."""
    import torch

    with replacing(path) as file:
        torch.save(content, file)


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A file to fill that takes the place of ``path``, flushed to disk, when the block ends well.

    At every instant ``path`` is either the old file or the whole new one, whatever ends the process.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _drop_leftovers(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _drop_leftovers(path: Path) -> None:
    """Delete what killed processes of this machine have left half written: a checkpoint may be large."""
    for partial in path.parent.glob(f".{glob.escape(path.name)}.*"):
        process = partial.name.rpartition(".")[2]
        if process.isdigit() and not Path(f"/proc/{process}").exists() and Path("/proc/self").exists():
            partial.unlink(missing_ok=True)


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file; ``None`` when there is no such file.

    Raises:
        UserError: The file is damaged.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); delete it to go on") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged (not an object); delete it to go on")
    return content
