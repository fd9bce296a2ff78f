"""Opening local text files, packed or not: the one place where bytes become text.

UTF-8 with or without a byte order mark, and the line ends of every system, give the same text. What is no such text
(UTF-16, binary data) is refused by name.
"""

from __future__ import annotations

import codecs
import glob
import gzip
import lzma
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from io import TextIOWrapper
from pathlib import Path
from typing import IO

from usllm.system.errors import UserError
from usllm.system.files import expanded

HEAD_BYTES = 1 << 16
"""How much of a file is looked at to learn what it is."""
DAMAGED = (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile)
"""What unpacking raises where a file is cut or damaged; of bz2 an ``OSError`` without a number (:func:`of_system`)."""
COMPRESSIONS = {".gz": "gzip", ".bz2": "bz2", ".xz": "xz", ".lzma": "lzma"}
"""Suffixes that are unpacked on the fly."""
_MAGIC = {
    b"\x1f\x8b": ".gz",
    b"BZh": ".bz2",
    b"\xfd7zXZ\x00": ".xz",
    b"\x28\xb5\x2f\xfd": ".zst",
    b"PK\x03\x04": ".zip",
    b"7z\xbc\xaf": ".7z",
    b"\x04\x22\x4d\x18": ".lz4",
}
# The marks of UTF-32 first: that of its little-endian form begins with the one of UTF-16.
_OTHER_MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


def is_remote(path: str) -> bool:
    """Whether it is an address, such as ``hf://datasets/…``, not a path."""
    return "://" in path


def matching(path: str) -> list[Path]:
    """The file of that name, with ``~`` expanded; else those that the pattern (``*``, ``?``, ``[…]``, ``**``) fits,
    by name; none where there is none."""
    place = expanded(path)
    if place.is_file():
        return [place]
    return sorted(found for found in map(Path, glob.glob(str(place), recursive=True)) if found.is_file())


def existing(paths: tuple[str, ...]) -> list[Path]:
    """The files of all paths and patterns, in the order given.

    Raises:
        UserError: one of them is not a file, and fits none.
    """
    found = {path: matching(path) for path in paths}
    missing = [str(expanded(path)) for path in paths if not found[path]]
    if missing:
        raise UserError(f"there is no file {', '.join(missing)} (relative paths start at {Path.cwd()})")
    return [file for path in paths for file in found[path]]


def compression_of(path: Path) -> str | None:
    """How a file is packed, by its name and its first bytes alike: a name of fsspec's, or ``None``.

    Raises:
        UserError: the two disagree, or it is packed in a way that is not unpacked here.
    """
    suffix = path.suffix.lower()
    with path.open("rb") as file:
        start = file.read(8)
    packed = next((kind for magic, kind in _MAGIC.items() if start.startswith(magic)), None)
    known = ", ".join(COMPRESSIONS)
    if packed is not None and packed not in COMPRESSIONS:
        raise UserError(f"{path} is packed as {packed}: unpack it first ({known} are unpacked on the fly)")
    if suffix == ".lzma":  # it has no first bytes of its own
        return COMPRESSIONS[suffix]
    if packed is not None and packed != suffix:
        raise UserError(f"{path} holds data packed as {packed}: give it a name that ends in {packed}")
    if packed is None and suffix in COMPRESSIONS and start:
        raise UserError(f"{path} cannot be read (it is not packed as {suffix}): give it a name without {suffix}")
    return COMPRESSIONS.get(suffix)


def head(path: Path) -> bytes:
    """The first ``HEAD_BYTES`` bytes of a file, unpacked.

    Raises:
        UserError: it is damaged, or as :func:`compression_of`.
    """
    with unpacked(path) as file:
        return file.read(HEAD_BYTES)


@contextmanager
def opened(path: Path) -> Iterator[IO[str]]:
    """Open a text file: UTF-8, without a byte order mark, every line end read as ``\\n``; unpacked on the fly.

    Raises:
        UserError: the content is not UTF-8, holds NUL among its first bytes, or a packed file is damaged.
    """
    refuse_other_encodings(path, head(path))
    try:
        with unpacked(path) as file, TextIOWrapper(file, encoding="utf-8-sig") as text:
            yield text
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not UTF-8 text ({error}); convert it, for example with `iconv -f LATIN1 -t UTF-8`"
        ) from error


@contextmanager
def unpacked(path: Path) -> Iterator[IO[bytes]]:
    """Open a file as bytes, unpacked on the fly.

    Raises:
        UserError: it cannot be opened, is damaged, or as :func:`compression_of`.
    """
    import fsspec

    try:
        with fsspec.open(str(path), "rb", compression=compression_of(path)) as file:
            yield file
    except (*DAMAGED, OSError) as error:
        raise UserError(f"{path} cannot be read ({error})") from error


def of_system(error: BaseException | None) -> bool:
    """Whether a file could not be reached, and nothing is known of what it holds."""
    return isinstance(error, OSError) and error.errno is not None


def refuse_other_encodings(path: Path, start: bytes) -> None:
    """Refuse what is no UTF-8 text, as far as its first bytes tell.

    Raises:
        UserError: names the file, and how to convert it.
    """
    for mark, name in _OTHER_MARKS.items():
        if start.startswith(mark):
            raise UserError(f"{path} is {name} text; convert it, for example with `iconv -f {name} -t UTF-8`")
    if b"\x00" in start:
        raise UserError(
            f"{path} holds NUL characters, as binary files and UTF-16 without a byte order mark do; give UTF-8 text "
            "(`iconv -f UTF-16LE -t UTF-8` converts)"
        )
