"""The files of a streamed corpus, local or behind any address that fsspec knows (``hf://``, ``s3://`` …)."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from io import BufferedReader, RawIOBase
from pathlib import Path
from typing import IO, Any

from usllm.data.sources.files import DAMAGED, existing, is_remote, of_system, unpacked
from usllm.data.sources.kinds import kind_by_name, with_kind
from usllm.data.sources.spec import SourceSpec
from usllm.system.errors import RunError, UserError, first_line
from usllm.system.network import leave_unreachable_hub, network_or_user_error

STREAMED_KINDS = ("text", "jsonl", "parquet")
_BLOCK = 1 << 20
_LOOKED_AT = (
    3  # files whose first bytes must be of the kind that their names say; the others are seen when their turn comes
)


@dataclass(frozen=True)
class Shard:
    """One file of a corpus.

    Attributes:
        place: path or address.
        kind: ``text``, ``jsonl`` or ``parquet``.
        size: bytes; 0 where nobody says.
    """

    place: str
    kind: str
    size: int


def find_shards(spec: SourceSpec, key: str) -> list[Shard]:
    """All files of a source, those of a pattern in the order of their names.

    Args:
        spec: the source.
        key: what it is called in the configuration, for messages.

    Raises:
        UserError: there is none, they are of several kinds, or of one that is not streamed.
        RunError: the server cannot be reached.
    """
    try:
        if spec.kind == "hub":
            return _of_data_set(spec)
        remote = [path for path in spec.paths if is_remote(path)]
        if remote and len(remote) < len(spec.paths):
            raise UserError(
                f"{remote[0]} and {_first_local(spec)}: give local files or addresses, not both in one source"
            )
        if remote:
            return _of_addresses(spec)
        files = existing(spec.paths)
        kind = with_kind(replace(spec, path=[str(path) for path in files[:_LOOKED_AT]]), key).kind
        shards = [Shard(str(path), kind, path.stat().st_size) for path in files]
        _refuse_other_kinds(shards, key)
        return shards
    except UserError as error:
        message = str(error)
        raise type(error)(message if message.startswith(key) else f"{key}: {message}") from error.__cause__


def shards_identity(shards: Sequence[Shard], settings: str) -> dict[str, Any]:
    """What a resumed run compares: names and sizes of the files, and what their order and tokens depend on besides.

    Args:
        shards: of the corpus.
        settings: the same text for the same order of the same tokens.

    Returns:
        Plain Python: ``shards`` and ``bytes`` (numbers), ``text`` and ``tokens`` (SHA-256).
    """
    names = hashlib.sha256("".join(f"{_last(shard.place)}\n{shard.size}\n" for shard in shards).encode())
    return {
        "shards": len(shards),
        "bytes": sum(shard.size for shard in shards),
        "text": names.hexdigest(),
        "tokens": hashlib.sha256(settings.encode()).hexdigest(),
    }


class _Server(RawIOBase):
    """A file behind an address: what fails there is a ``RunError``, so any other error is of what the file holds."""

    def __init__(self, place: str) -> None:
        import fsspec

        self.place = place
        with self._answering():
            self._file: Any = fsspec.open(place, "rb").open()

    @contextmanager
    def _answering(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # each protocol has errors of its own
            raise RunError(f"{self.place} cannot be read ({first_line(error)})") from error

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def read(self, size: int | None = -1) -> bytes:
        with self._answering():
            return bytes(self._file.read(-1 if size is None else size))

    def readinto(self, buffer: Any) -> int:
        found = self.read(len(buffer))
        buffer[: len(found)] = found
        return len(found)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        with self._answering():
            return int(self._file.seek(offset, whence))

    def tell(self) -> int:
        return int(self._file.tell())

    def close(self) -> None:
        if not self.closed and hasattr(self, "_file"):
            self._file.close()
        super().close()


@contextmanager
def opened_bytes(place: str) -> Iterator[IO[bytes]]:
    """Open a file of a corpus, unpacked on the fly.

    Raises:
        UserError: it is damaged.
        RunError: an address does not answer, or a local file is gone.
    """
    if not is_remote(place):
        try:
            with unpacked(Path(place)) as file:
                yield file
        except UserError as error:
            if of_system(error.__cause__):
                raise RunError(str(error)) from error.__cause__
            raise
        return
    from fsspec.compression import compr
    from fsspec.core import get_compression

    try:
        packed = get_compression(place, "infer")
    except ValueError as error:
        raise RunError(f"{place} cannot be read ({first_line(error)})") from error
    with _Server(place) as raw:
        file = BufferedReader(raw, _BLOCK)
        try:
            yield file if packed is None else compr[packed](file, mode="rb")
        except (*DAMAGED, OSError) as error:
            raise UserError(f"{place} cannot be read ({first_line(error)})") from error


def _of_addresses(spec: SourceSpec) -> list[Shard]:
    import fsspec

    found: list[Shard] = []
    for path in spec.paths:
        try:
            system, inner = fsspec.core.url_to_fs(path)
            matches = system.glob(inner, detail=True)
        except Exception as error:  # each protocol has errors of its own
            raise network_or_user_error(f"{path} cannot be listed ({first_line(error)})", error) from error
        files = {name: facts for name, facts in matches.items() if facts.get("type") == "file"}
        if not files:
            raise UserError(f"there is no file {path}")
        for name in sorted(files):
            place = system.unstrip_protocol(name)
            found.append(Shard(place, _kind(place, spec.kind), int(files[name].get("size") or 0)))
    _refuse_other_kinds(found, "")
    return found


def _of_data_set(spec: SourceSpec) -> list[Shard]:
    """The files that ``datasets`` would read for a split; the order, the rows and what is wrong with them are ours."""
    import datasets

    what = f"{spec.name}{f' ({spec.config})' if spec.config else ''}, split {spec.split!r}"
    leave_unreachable_hub()
    try:
        builder = datasets.load_dataset_builder(str(spec.name), spec.config)
        files = dict(builder.config.data_files or {})
    except Exception as error:  # hub, HTTP and builder errors have no common base class
        raise network_or_user_error(
            f"the data set {what} cannot be found on the Hugging Face hub ({first_line(error)}). Without a network, "
            "use files: data=parquet, data=jsonl or data=text",
            error,
        ) from error
    if spec.split not in files:
        raise UserError(f"{what}: there is no such split, but {', '.join(map(str, files)) or 'no files at all'}")
    shards = []
    for place in map(str, files[spec.split]):
        size = os.path.getsize(place) if os.path.isfile(place) else 0
        shards.append(Shard(place, _kind(place, "auto"), size))
    _refuse_other_kinds(shards, "")
    return shards


def _kind(place: str, given: str) -> str:
    named = kind_by_name(Path(_last(place)))
    if given == "auto" and named is None:
        raise UserError(
            f"{place}: its name does not say what it is; streamed are {', '.join(STREAMED_KINDS)}: give the kind, or "
            "set streaming=false"
        )
    return str(named if given == "auto" else given)


def _refuse_other_kinds(shards: Sequence[Shard], key: str) -> None:
    first = shards[0]
    for shard in shards:
        named = kind_by_name(Path(_last(shard.place)))
        if shard.kind != first.kind or (named not in (None, shard.kind) and "parquet" in (named, shard.kind)):
            raise UserError(
                f"{key or 'path'} names files of several kinds ({first.place}, {shard.place}); give one a source"
            )


def _first_local(spec: SourceSpec) -> str:
    return next(path for path in spec.paths if not is_remote(path))


def _last(place: str) -> str:
    return place.rstrip("/").rpartition("/")[2].rpartition(os.sep)[2]
