"""Writing a planned model as one GGUF file, for llama.cpp and what is built on it: one tensor at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from usllm.models.gguf_families import GGUF_FAMILIES
from usllm.models.gguf_plan import GgufPlan, PlannedTensor
from usllm.models.gguf_tensors import as_stored
from usllm.system.errors import UserError
from usllm.system.files import partial_file


class Encoding(Protocol):
    """A type of tensors that the ``gguf`` package does not make."""

    number: Any
    """Of the type, in the file."""

    def bytes(self, shape: tuple[int, ...]) -> int:
        """Bytes that a tensor takes."""

    def encode(self, values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """These bytes, uint8 ``[bytes]``, of fp32 values."""


def write_gguf(
    plan: GgufPlan, read: Callable[[str], Tensor], path: Path, encodings: Mapping[str, Encoding] | None = None
) -> None:
    """Write the file, whole or not at all; one tensor is in memory at a time.

    Args:
        plan: of the file.
        read: a parameter of the model by its name in transformers.
        path: of the file; an older one is replaced.
        encodings: of tensors, by their names in the file, that are to be of another type than planned.

    Raises:
        UserError: a tensor has another shape than the model's, or a number is not finite in its type; it is named.
        OSError: the file cannot be written.
    """
    import gguf

    others = encodings or {}
    with partial_file(path) as partial:
        writer = gguf.GGUFWriter(partial, plan.architecture)
        try:
            for key, value in plan.metadata.items():
                add_entry(writer, key, value)
            for name, tensor in plan.tensors.items():
                if other := others.get(name):  # the package would reckon with types of its own
                    count, of_values = other.bytes(tensor.shape), np.dtype(np.float32)
                    writer.add_tensor_info(name, tensor.shape, of_values, count, raw_dtype=other.number)
                else:
                    kind = gguf.GGMLQuantizationType[tensor.kind]
                    writer.add_tensor_info(name, tensor.byte_shape, tensor.item_type, tensor.bytes, raw_dtype=kind)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for name, tensor in plan.tensors.items():
                values = _values(plan, name, tensor, read)
                encoded = others[name].encode(values) if name in others else _encoded(name, tensor, values)
                writer.write_tensor_data(encoded)
        finally:
            writer.close()


def _values(plan: GgufPlan, name: str, tensor: PlannedTensor, read: Callable[[str], Tensor]) -> np.ndarray[Any, Any]:
    values = tensor.values
    if values is None:
        assert tensor.source is not None
        values = read(tensor.source).detach().cpu().to(torch.float32)
        if tuple(values.shape) != tensor.shape:
            raise UserError(f"{tensor.source}: is {list(values.shape)}, the model's is {list(tensor.shape)}")
        values = as_stored(values, name, GGUF_FAMILIES[plan.architecture], plan.config)
    return values.contiguous().numpy()


def _encoded(name: str, tensor: PlannedTensor, values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize, quantize

    stored_as = GGMLQuantizationType[tensor.kind]
    with np.errstate(all="ignore"):  # blocks of denormal numbers: their scale is 0, and so are they
        encoded = quantize(values, stored_as)
    if not bool(np.isfinite(dequantize(encoded, stored_as)).all()):
        raise UserError(
            f"{tensor.source or name}: holds values that are not finite as {tensor.kind}; pass {tensor.setting}=F32"
        )
    return encoded


def add_entry(writer: Any, key: str, value: Any) -> None:
    """One entry in the type that llama.cpp expects of its kind."""
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, list(value))
