"""Opening local files, packed or not."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from usllm.system.errors import UserError


def existing(paths: tuple[str, ...]) -> list[Path]:
    """The paths with ``~`` expanded.

    Raises:
        UserError: one of them is not a file.
    """
    found = [Path(path).expanduser() for path in paths]
    missing = [str(path) for path in found if not path.is_file()]
    if missing:
        raise UserError(f"there is no file {', '.join(missing)} (relative paths start at {Path.cwd()})")
    return found


@contextmanager
def opened(path: Path) -> Iterator[IO[str]]:
    """Open a text file as UTF-8 with universal newlines; ``.xz``, ``.gz`` and ``.bz2`` are unpacked on the fly.

    Raises:
        UserError: the content is not UTF-8, or a packed file is damaged.
    """
    import lzma
    import zlib

    import fsspec

    try:
        with fsspec.open(str(path), "rt", compression="infer", encoding="utf-8") as file:
            yield file
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error})") from error
    except (lzma.LZMAError, zlib.error, EOFError, OSError) as error:
        raise UserError(f"{path} cannot be read ({error})") from error
