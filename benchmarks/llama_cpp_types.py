"""GGUF files in types of blocks that llama.cpp makes and the ``gguf`` package does not, such as those of two bits."""

from __future__ import annotations

from collections.abc import Callable
from ctypes import POINTER, c_char_p, c_float, c_int32, c_int64, c_size_t, c_void_p
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from benchmarks.llama_cpp import library
from usllm.models.gguf_plan import GgufPlan
from usllm.models.gguf_writer import write_gguf

_MOST_TYPES = 43  # whose numbers are llama.cpp's; what stands behind them is not a name


class _Kind(int):
    """Number of a type, where the ``gguf`` package wants a member of its enumeration."""

    @property
    def name(self) -> str:
        return str(int(self))


def type_of(name: str) -> tuple[int, int, int]:
    """Number of a type, weights in one of its blocks, and bytes of a block.

    Raises:
        ValueError: This llama.cpp has no such type.
    """
    lib = library()
    lib.ggml_type_name.restype, lib.ggml_type_name.argtypes = c_char_p, [c_int32]
    lib.ggml_blck_size.restype, lib.ggml_blck_size.argtypes = c_int64, [c_int32]
    lib.ggml_type_size.restype, lib.ggml_type_size.argtypes = c_size_t, [c_int32]
    for number in range(_MOST_TYPES):
        if lib.ggml_type_name(number) == name.encode():
            return number, int(lib.ggml_blck_size(number)), int(lib.ggml_type_size(number))
    raise ValueError(f"llama.cpp has no type {name}")


def quantized(values: np.ndarray[Any, Any], name: str) -> np.ndarray[Any, Any]:
    """A matrix in a type of llama.cpp, chosen by its own function and without statistics of a text: uint8 ``[bytes]``.

    Args:
        values: fp32 ``[rows, columns]``, whole blocks.
        name: Of the type, as llama.cpp writes it.
    """
    number, block, size = type_of(name)
    function = library().ggml_quantize_chunk
    function.restype = c_size_t
    function.argtypes = [c_int32, POINTER(c_float), c_void_p, c_int64, c_int64, c_int64, c_void_p]
    data = np.ascontiguousarray(values, dtype=np.float32)
    found = np.empty(data.size // block * size, dtype=np.uint8)
    written = function(
        number, data.ctypes.data_as(POINTER(c_float)), found.ctypes.data_as(c_void_p), 0, *data.shape, None
    )
    assert written == found.size, (written, found.size)
    return found


class InBlocks:
    """The encoding of a type of llama.cpp.

    Args:
        name: Of the type.
    """

    def __init__(self, name: str) -> None:
        number, self.block, self._size = type_of(name)
        self.number, self._name = _Kind(number), name

    def bytes(self, shape: tuple[int, ...]) -> int:
        """Bytes that a tensor takes."""
        return int(np.prod(shape)) // self.block * self._size

    def encode(self, values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """These bytes, by llama.cpp's own function."""
        return quantized(values, self._name)


def write_in_blocks(plan: GgufPlan, read: Callable[[str], Tensor], path: Path, name: str) -> None:
    """Write a planned file with matrices in a type of llama.cpp; those whose rows are no whole blocks stay as planned.

    Args:
        plan: Of the file; embedding and head keep its types.
        read: A parameter of the model.
        path: Of the file.
        name: Of the type.
    """
    encoding = InBlocks(name)
    chosen = [
        each
        for each, tensor in plan.tensors.items()
        if tensor.kind == "Q4_0" and tensor.shape[-1] % encoding.block == 0
    ]
    write_gguf(plan, read, path, dict.fromkeys(chosen, encoding))
