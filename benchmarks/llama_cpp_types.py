"""GGUF files in types of blocks that llama.cpp makes and the ``gguf`` package does not, such as those of two bits."""

from __future__ import annotations

from collections.abc import Callable
from ctypes import POINTER, c_char_p, c_float, c_int32, c_int64, c_size_t, c_void_p
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from benchmarks.llama_cpp import library
from usllm.models.gguf_families import GGUF_FAMILIES
from usllm.models.gguf_plan import GgufPlan, PlannedTensor
from usllm.models.gguf_tensors import as_stored
from usllm.models.gguf_writer import add_entry, write_gguf

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


def write_in_blocks(plan: GgufPlan, read: Callable[[str], Tensor], path: Path, name: str) -> None:
    """Write a planned file with matrices in a type of llama.cpp; those whose rows are no whole blocks stay as planned.

    Args:
        plan: Of the file; embedding and head keep its types.
        read: A parameter of the model.
        path: Of the file.
        name: Of the type.
    """
    import gguf

    number, block, size = type_of(name)
    plain = path.with_suffix(".planned")
    write_gguf(plan, read, plain)
    reader = gguf.GGUFReader(plain)
    writer = gguf.GGUFWriter(path, plan.architecture)
    for key, value in plan.metadata.items():
        add_entry(writer, key, value)
    chosen = {each for each, tensor in plan.tensors.items() if _fits(tensor, block)}
    stored = {tensor.name: tensor for tensor in reader.tensors}
    for each, tensor in plan.tensors.items():
        if each in chosen:
            count = int(np.prod(tensor.shape)) // block * size
            writer.add_tensor_info(each, tensor.shape, np.dtype(np.float32), count, raw_dtype=_Kind(number))  # type: ignore[arg-type]
        else:
            data = stored[each].data
            writer.add_tensor_info(each, data.shape, data.dtype, data.nbytes, raw_dtype=stored[each].tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for each, tensor in plan.tensors.items():
        if each in chosen:
            assert tensor.source is not None
            values = as_stored(read(tensor.source).float(), each, GGUF_FAMILIES[plan.architecture], plan.config)
            writer.write_tensor_data(quantized(values.numpy(), name))
        else:
            writer.write_tensor_data(np.ascontiguousarray(stored[each].data))
    writer.close()
    plain.unlink()


def _fits(tensor: PlannedTensor, block: int) -> bool:
    return tensor.kind == "Q4_0" and tensor.shape[-1] % block == 0
