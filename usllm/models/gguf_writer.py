"""Writing a planned model as one GGUF file, for llama.cpp and what is built on it: one tensor at a time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from usllm.models.gguf_families import GGUF_FAMILIES
from usllm.models.gguf_plan import GgufPlan, PlannedTensor
from usllm.models.gguf_tensors import as_stored
from usllm.system.errors import UserError
from usllm.system.files import partial_file


def write_gguf(plan: GgufPlan, read: Callable[[str], Tensor], path: Path) -> None:
    """Write the file, whole or not at all; one tensor is in memory at a time.

    Args:
        plan: of the file.
        read: a parameter of the model by its name in transformers.
        path: of the file; an older one is replaced.

    Raises:
        UserError: a tensor has another shape than the model's, or a number is not finite in its type; it is named.
        OSError: the file cannot be written.
    """
    import gguf

    with partial_file(path) as partial:
        writer = gguf.GGUFWriter(partial, plan.architecture)
        try:
            for key, value in plan.metadata.items():
                add_entry(writer, key, value)
            for name, tensor in plan.tensors.items():
                stored_as = gguf.GGMLQuantizationType[tensor.kind]
                writer.add_tensor_info(name, tensor.byte_shape, tensor.item_type, tensor.bytes, raw_dtype=stored_as)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for name, tensor in plan.tensors.items():
                writer.write_tensor_data(_encoded(plan, name, tensor, read))
        finally:
            writer.close()


def _encoded(plan: GgufPlan, name: str, tensor: PlannedTensor, read: Callable[[str], Tensor]) -> np.ndarray[Any, Any]:
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize, quantize

    values = tensor.values
    if values is None:
        assert tensor.source is not None
        values = read(tensor.source).detach().cpu().to(torch.float32)
        if tuple(values.shape) != tensor.shape:
            raise UserError(f"{tensor.source}: is {list(values.shape)}, the model's is {list(tensor.shape)}")
        values = as_stored(values, name, GGUF_FAMILIES[plan.architecture], plan.config)
    stored_as = GGMLQuantizationType[tensor.kind]
    with np.errstate(all="ignore"):  # blocks of denormal numbers: their scale is 0, and so are they
        encoded = quantize(values.contiguous().numpy(), stored_as)
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
