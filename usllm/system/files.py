"""Files that are written whole or not at all."""

from __future__ import annotations

import errno
import glob
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from usllm.system.errors import NO_SPACE, UserError

if TYPE_CHECKING:
    from torch import Tensor


def expanded(path: str | Path) -> Path:
    """``path`` with ``~`` as the home folder; as it is where there is no such user: then there is no such place."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def unusable(path: Path) -> str | None:
    """Why a file cannot be written at ``path``, as far as that can be seen before; ``None`` where it can.

    Folders that are missing would be made.
    """
    try:
        if path.is_dir():
            return "is a folder, not a file"
        parent = next(folder for folder in path.absolute().parents if folder.exists())
    except (OSError, ValueError) as error:  # a name that no system allows
        return str(error)
    if not parent.is_dir():
        return f"{parent} is a file"
    return None if os.access(parent, os.W_OK | os.X_OK) else f"{parent} cannot be written to"


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write ``content`` so that a reader never sees half a file, also when the process dies."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """As :func:`write_json`, for any text; a disk that runs full leaves the old file and nothing else."""
    with replacing(path) as file:
        file.write(text.encode("utf-8"))


def write_torch(path: Path, content: dict[str, Any]) -> None:
    """As :func:`write_json`, for tensors and plain Python, as ``torch.load(weights_only=True)`` reads them.

    Raises:
        OSError: it cannot be written; the error names it.
    """
    import torch

    with replacing(path) as file:
        writer: Any = _Writer(file)
        try:
            torch.save(content, writer)
        except RuntimeError as error:  # by which torch says that, and not why, a write has failed
            raise writer.error or error from None


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """As :func:`write_json`, for named tensors as safetensors.

    Raises:
        OSError: it cannot be written; the error names it.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with partial_file(path) as partial:
        try:
            save_file(dict(tensors), partial, None if metadata is None else dict(metadata))
        except SafetensorError as error:  # the only kind that it has, with the system's message in it
            number = int(found[1]) if (found := re.search(r"os error (\d+)", str(error))) else errno.EIO
            raise OSError(number, os.strerror(number), str(path)) from error


def write_together(contents: Mapping[Path, bytes]) -> None:
    """Several files: where one cannot be written, all of them stay as they were.

    A process that is killed may leave some of them new and some old, each of them whole.

    Raises:
        OSError: one of them cannot be written; the error names it.
    """
    with ExitStack() as stack:
        for path, content in contents.items():
            partial = stack.enter_context(partial_file(path))
            with naming(path):
                partial.write_bytes(content)
                _flush(partial)


def settle_folder(folder: Path, mode: int) -> None:
    """Flush the files of a folder that is about to get its name, and let those read them who may read the folder.

    Args:
        mode: of the folder; libraries make some of their files private.
    """
    for file in folder.rglob("*"):
        if file.is_file():
            _flush(file)
            file.chmod(mode & 0o666)


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A file to fill that takes the place of ``path``, flushed to disk, when the block ends well.

    At every instant ``path`` is either the old file or the whole new one, whatever ends the process.

    Raises:
        OSError: it cannot be written; the error names it.
    """
    with partial_file(path) as partial, naming(path), open(partial, "wb") as file:
        yield file


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Errors of a full disk, which say of themselves nothing but that, name ``path``."""
    try:
        yield
    except OSError as error:
        if error.errno not in NO_SPACE or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


@contextmanager
def partial_file(path: Path) -> Iterator[Path]:
    """Where to write what is to take the place of ``path``, once it is flushed to disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _drop_leftovers(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield partial
        _flush(partial)
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


class _Writer:
    """A file that remembers why a write has failed."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self.file.flush()


def _flush(path: Path) -> None:
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def _drop_leftovers(path: Path) -> None:
    """Delete what killed processes of this machine have left half written: a checkpoint may be large."""
    for partial in path.parent.glob(f".{glob.escape(path.name)}.*"):
        process = partial.name.rpartition(".")[2]
        if process.isdigit() and not Path(f"/proc/{process}").exists() and Path("/proc/self").exists():
            partial.unlink(missing_ok=True)


def read_json(path: Path, ours: bool = True) -> dict[str, Any] | None:
    """The object in a JSON file; ``None`` when there is no such file.

    Args:
        path: Of the file.
        ours: Whether we have written it, so that it can be deleted when it is damaged; otherwise it is the user's.

    Raises:
        UserError: The file is damaged, or is no such file.
    """
    way_out = "is damaged ({}); delete it to go on" if ours else "is not a JSON object ({}); give another file"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise UserError(f"{path} {way_out.format(error)}") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error})") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} {way_out.format('it holds something else')}")
    return content
