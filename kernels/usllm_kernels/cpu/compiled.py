"""Compilation of the loops of this folder, and the cache of their machine code.

Numba takes cached code for current while the file of its function is unchanged. These functions are compiled into each
other across files, so the cache is keyed by a digest of all of them instead.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import lru_cache
from pathlib import Path
from typing import Any

from numba import cfunc, njit
from numba import config as _config

from usllm.sketch import quantize, scale
from usllm.system.cache import alone_with, cache_root
from usllm_kernels import blocks, compiled_operators, planes

numba_settings: Any = _config  # its names are made at run time
_HERE = Path(__file__).parent
ELSEWHERE = (scale, quantize, compiled_operators, planes, blocks)
"""Modules outside of this folder whose constants are compiled in."""


def compiled(function: Callable[..., Any]) -> Any:
    """Compile a function at its first call, without the interpreter's lock; divisions are not checked."""
    with _cached_in() as folder:
        found: Any = njit(nogil=True, cache=folder is not None, error_model="numpy")(function)
    if folder is not None:
        _read_and_write_alone(found._cache, folder / function.__name__)
    return found


def compiled_callback(function: Callable[..., Any], kind: Any) -> Any:
    """Compile a function now to what C code can call; its ``address`` is valid as long as the result lives.

    Args:
        function: Of numbers and pointers.
        kind: Its signature, of numba's types.
    """
    with _cached_in() as folder, nullcontext() if folder is None else alone_with(folder / function.__name__):
        return cfunc(kind, cache=folder is not None, error_model="numpy")(function)


@contextmanager
def _cached_in() -> Iterator[Path | None]:
    """Numba's cache where the code of these sources is; the folder, or ``None`` where nothing can be kept."""
    before = numba_settings.CACHE_DIR
    folder = code_folder(_HERE, before)
    numba_settings.CACHE_DIR = str(folder or before)
    try:
        yield folder
    finally:
        numba_settings.CACHE_DIR = before


def _read_and_write_alone(cache: Any, entry: Path) -> None:
    """Have numba's cache of one function be read and written by one process at a time.

    It notes the next free number for a signature and then writes the code of that number. Of two processes that
    compile two signatures at once both take the same number, and one signature may be left with the code of the other,
    which reads and writes memory that is not its own.
    """

    def alone(work: Callable[..., Any]) -> Callable[..., Any]:
        def waiting(*arguments: Any) -> Any:
            with alone_with(entry):
                return work(*arguments)

        return waiting

    cache.load_overload, cache.save_overload = alone(cache.load_overload), alone(cache.save_overload)


@lru_cache(maxsize=8)
def code_folder(sources: Path, asked: str = "") -> Path | None:
    """Folder of the machine code that was made of just these sources; created if it is missing.

    Args:
        sources: The folder with the sources.
        asked: Folder that the user named (``NUMBA_CACHE_DIR``); if empty, beside the sources, or in the user's cache
            where that cannot be written to.

    Returns:
        The folder, or ``None`` where none can be created: each process then compiles for itself.
    """
    digest = hashlib.blake2b(digest_size=8)
    for file in [*sorted(sources.glob("*.py")), *(Path(str(module.__file__)) for module in ELSEWHERE)]:
        digest.update(file.name.encode() + file.read_bytes())
    places = [Path(asked)] if asked else [sources / "__pycache__", cache_root() / "compiled"]
    for place in places:
        folder = place / digest.hexdigest()
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError:
            continue
        if os.access(folder, os.W_OK):
            return folder
    return None
