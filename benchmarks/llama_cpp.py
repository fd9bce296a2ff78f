"""llama.cpp through its own C functions, out of the library that the package ``xllamacpp`` brings (no compiler needed).

The package's server answers with texts; figures that compare need logits, which the C functions give. Structures that
change between versions are only passed on as they come; the few fields that are set have stood first for years, and
their defaults are compared before.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import POINTER, c_bool, c_char_p, c_float, c_int8, c_int32, c_uint32, c_void_p
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

_DEFAULTS = (512, 2048, 512)  # of a context: tokens it holds, tokens of a batch, tokens computed at once


class _Parameters(ctypes.Structure):
    """Any structure of parameters by value: as large as the largest, of which callees read what is theirs."""

    _fields_ = (("words", c_uint32 * 512),)


class _Batch(ctypes.Structure):
    _fields_ = (
        ("n_tokens", c_int32),
        ("token", POINTER(c_int32)),
        ("embd", POINTER(c_float)),
        ("pos", POINTER(c_int32)),
        ("n_seq_id", POINTER(c_int32)),
        ("seq_id", POINTER(POINTER(c_int32))),
        ("logits", POINTER(c_int8)),
    )


_silent = ctypes.CFUNCTYPE(None, c_int32, c_char_p, c_void_p)(lambda level, text, data: None)
"""What llama.cpp tells goes here. It holds the address alone, so this stays for as long as the process."""


@cache
def library() -> Any:
    """The loaded library; it prints nothing.

    Raises:
        ImportError: ``xllamacpp`` is not installed.
    """
    import xllamacpp

    lib = ctypes.CDLL(xllamacpp.xllamacpp.__file__)
    signatures: dict[str, tuple[Any, list[Any]]] = {
        "llama_model_default_params": (_Parameters, []),
        "llama_context_default_params": (_Parameters, []),
        "llama_model_load_from_file": (c_void_p, [c_char_p, _Parameters]),
        "llama_init_from_model": (c_void_p, [c_void_p, _Parameters]),
        "llama_model_get_vocab": (c_void_p, [c_void_p]),
        "llama_vocab_n_tokens": (c_int32, [c_void_p]),
        "llama_set_n_threads": (None, [c_void_p, c_int32, c_int32]),
        "llama_get_memory": (c_void_p, [c_void_p]),
        "llama_memory_clear": (None, [c_void_p, c_bool]),
        "llama_batch_init": (_Batch, [c_int32, c_int32, c_int32]),
        "llama_batch_free": (None, [_Batch]),
        "llama_decode": (c_int32, [c_void_p, _Batch]),
        "llama_get_logits": (POINTER(c_float), [c_void_p]),
        "llama_tokenize": (
            c_int32,
            [c_void_p, c_char_p, c_int32, POINTER(c_int32), c_int32, c_bool, c_bool],
        ),
        "llama_free": (None, [c_void_p]),
        "llama_model_free": (None, [c_void_p]),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
    lib.llama_log_set(_silent, None)
    lib.llama_backend_init()
    return lib


class LlamaCpp:
    """A GGUF file in llama.cpp.

    Args:
        path: Of the file.
        threads: To compute with.
        context: Most tokens of a text.

    Raises:
        RuntimeError: llama.cpp does not load it, or is of another version than this was written for.
    """

    def __init__(self, path: Path | str, threads: int, context: int = 1024) -> None:
        self._lib, self.context = library(), context
        self._model = self._lib.llama_model_load_from_file(str(path).encode(), self._lib.llama_model_default_params())
        if not self._model:
            raise RuntimeError(f"llama.cpp does not load {path}")
        parameters = self._lib.llama_context_default_params()
        if tuple(parameters.words[:3]) != _DEFAULTS:
            raise RuntimeError(f"the parameters of a context begin with {parameters.words[:3]}, not with {_DEFAULTS}")
        parameters.words[0] = parameters.words[1] = context
        self._context = self._lib.llama_init_from_model(self._model, parameters)
        if not self._context:
            raise RuntimeError(f"llama.cpp makes no context of {context} tokens for {path}")
        self._lib.llama_set_n_threads(self._context, threads, threads)
        self._vocabulary = self._lib.llama_model_get_vocab(self._model)
        self.tokens: int = self._lib.llama_vocab_n_tokens(self._vocabulary)
        self._length = 0

    def __enter__(self) -> LlamaCpp:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._lib.llama_free(self._context)
        self._lib.llama_model_free(self._model)

    def tokenize(self, text: str, special: bool = True) -> list[int]:
        """Numbers of a text's tokens, cut by llama.cpp; with ``special`` what the file puts around a text."""
        data, room = text.encode(), len(text.encode()) + 8
        found = (c_int32 * room)()
        count = self._lib.llama_tokenize(self._vocabulary, data, len(data), found, room, special, False)
        return list(found[:count])

    def forget(self) -> None:
        """Begin a new text."""
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), True)
        self._length = 0

    def logits(self, ids: Sequence[int], last: bool = False) -> np.ndarray[Any, np.dtype[np.float32]]:
        """Logits behind each of the next tokens of the text, or behind the last one alone: fp32 ``[n, tokens]``.

        Raises:
            RuntimeError: The text is longer than the context.
        """
        batch = self._lib.llama_batch_init(len(ids), 0, 1)
        batch.n_tokens = len(ids)
        for place, number in enumerate(ids):
            batch.token[place], batch.pos[place] = int(number), self._length + place
            batch.n_seq_id[place] = 1
            batch.seq_id[place][0] = 0
            batch.logits[place] = not last or place == len(ids) - 1
        status = self._lib.llama_decode(self._context, batch)
        self._lib.llama_batch_free(batch)
        if status:
            raise RuntimeError(f"llama_decode says {status} of {len(ids)} tokens behind {self._length}")
        self._length += len(ids)
        rows = 1 if last else len(ids)
        return np.ctypeslib.as_array(self._lib.llama_get_logits(self._context), (rows, self.tokens)).copy()

    def greedy(self, ids: Sequence[int], count: int) -> list[int]:
        """The likeliest ``count`` tokens behind a text that is begun anew."""
        self.forget()
        found = [int(self.logits(ids, last=True)[0].argmax())]
        while len(found) < count:
            found.append(int(self.logits(found[-1:], last=True)[0].argmax()))
        return found

    def losses(self, window: Sequence[int]) -> np.ndarray[Any, np.dtype[np.float64]]:
        """Cross-entropy in nats of each token of a window but the first, given those before it: ``[n - 1]``."""
        self.forget()
        logits = self.logits(window)[:-1].astype(np.float64)
        top = logits.max(axis=1)
        total = top + np.log(np.exp(logits - top[:, None]).sum(axis=1))
        chosen: np.ndarray[Any, np.dtype[np.float64]] = logits[np.arange(len(logits)), np.asarray(window[1:])]
        return total - chosen
