"""Writing a model as one GGUF file for llama.cpp and what is built on it, the way llama.cpp's own converter does.

The file is planned first: configuration and tokenizer become metadata, and the reader of this package says what it
would make of them. Where that is not the same model, nothing is written. Tensors are then written one at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase

from usllm.models.gguf_contents import GgufContents, is_gguf
from usllm.models.gguf_families import GGUF_FAMILIES, SETTINGS, GgufFamily, configuration_of
from usllm.models.gguf_rope import rope_metadata
from usllm.models.gguf_tensors import as_stored, stored_names
from usllm.models.gguf_tokenizer import check_tokenizer
from usllm.models.gguf_vocabulary import vocabulary_metadata
from usllm.models.skeleton import skeleton
from usllm.packed.meaning import first_difference, meaning_of
from usllm.packed.sharded_files import stored_tensors
from usllm.system.errors import UserError
from usllm.system.files import partial_file, unusable

GGUF_TYPES = ("F32", "F16", "BF16", "Q8_0", "Q4_0")
"""Types of matrices that can be written."""
_IN_BLOCKS = ("Q8_0", "Q4_0")
_BLOCK = 32
_FILE_TYPES = {"F32": "ALL_F32", **{kind: f"MOSTLY_{kind}" for kind in GGUF_TYPES[1:]}}
_TOLD_BY_LAYERS = ("max_window_layers",)
"""Settings that decide nothing once the type of each layer is known."""


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor that is to be written: its parameter (``None`` where ``values`` are given), shape and type."""

    source: str | None
    shape: tuple[int, ...]
    kind: str
    values: Tensor | None = None


@dataclass(frozen=True)
class GgufPlan:
    """A GGUF file before its weights are read.

    Attributes:
        architecture: GGUF's name of the family.
        config: of the model.
        metadata: every key and its value.
        tensors: by their names in the file, in their order there.
    """

    architecture: str
    config: PretrainedConfig
    metadata: Mapping[str, Any]
    tensors: Mapping[str, PlannedTensor]

    @property
    def tensor_bytes(self) -> int:
        """Bytes of all tensors, without the gaps between them."""
        return sum(_size(tensor) for tensor in self.tensors.values())

    def by_kind(self) -> dict[str, int]:
        """Number of tensors of each type."""
        kinds = [tensor.kind for tensor in self.tensors.values()]
        return {kind: kinds.count(kind) for kind in GGUF_TYPES if kind in kinds}


class _PlannedContents(GgufContents):
    def refusal(self, what: str) -> UserError:
        return UserError(f"form=gguf: {what}, as the file would be read again; pass form=dense")


def plan_gguf(
    config: PretrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    generation: GenerationConfig | None = None,
    *,
    kind: str = "BF16",
    embeddings: str | None = None,
    general: Mapping[str, Any] | None = None,
) -> GgufPlan:
    """Everything of the file but its weights, checked to be read as the same model; no weights are read.

    Args:
        config: of the dense model.
        tokenizer: of the model.
        generation: names more tokens that end a text.
        kind: type of matrices, one of :data:`GGUF_TYPES`; rows that are no whole blocks are BF16, and what is no matrix
            is F32.
        embeddings: type of embedding and head; ``None``: that of the others, but Q8_0 beside Q4_0.
        general: metadata under ``general.``, such as a name and a description.

    Raises:
        UserError: the family, its rotary embedding or its tokenizer has no form in GGUF.
    """
    architecture, family = _family(config)
    model = skeleton(config)
    metadata, divisors = _metadata(config, architecture, family)
    tensors = {name: PlannedTensor(None, tuple(values.shape), "F32", values) for name, values in divisors.items()}
    parameters = stored_tensors(model)
    names = stored_names(architecture, parameters, config.num_hidden_layers)
    ends = {id(module.weight) for module in (model.get_input_embeddings(), model.get_output_embeddings())}
    of_ends = embeddings or ("Q8_0" if kind == "Q4_0" else kind)
    for parameter, tensor in parameters.items():
        if (name := names[parameter]) == parameter:
            raise UserError(f"form=gguf: {parameter} has no name in a GGUF file of a {architecture}; pass form=dense")
        shape = tuple(tensor.shape)
        tensors[name] = PlannedTensor(parameter, shape, _kind(shape, of_ends if id(tensor) in ends else kind))
    metadata |= vocabulary_metadata(tokenizer, tensors["token_embd.weight"].shape[0], generation)
    plan = GgufPlan(architecture, config, metadata | _general(kind, general or {}), tensors)
    _check(plan)
    return plan


def check_gguf_out(out: Path, overwrite: bool) -> None:
    """Refuse a place that may not become a GGUF file, before any work; only a GGUF file is ever replaced.

    Raises:
        UserError: it exists and may not be replaced, has another ending, or cannot be written.
    """
    if out.suffix != ".gguf":
        raise UserError(f"out={out}: form=gguf writes one file: give it a name that ends in .gguf")
    if reason := unusable(out):
        raise UserError(f"out={out}: {reason}; give the name of a file")
    if out.is_symlink() or out.exists():
        if out.is_symlink() or not out.is_file() or not is_gguf(out):
            raise UserError(f"out={out} exists and is no GGUF file: it is never replaced, choose another name")
        if not overwrite:
            raise UserError(f"out={out} exists already: pass overwrite=true to replace it, or another name")


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
                writer.add_tensor_info(
                    name, _byte_shape(tensor), _item_type(tensor.kind), _size(tensor), raw_dtype=stored_as
                )
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for name, tensor in plan.tensors.items():
                writer.write_tensor_data(_encoded(plan, name, tensor, read))
        finally:
            writer.close()


def _family(config: PretrainedConfig) -> tuple[str, GgufFamily]:
    for architecture, family in GGUF_FAMILIES.items():
        if family.model_type == config.model_type:
            return architecture, family
    known = ", ".join(family.model_type for family in GGUF_FAMILIES.values())
    raise UserError(f"form=gguf: a {config.model_type} cannot be written; those that can are {known}; pass form=dense")


def _metadata(
    config: PretrainedConfig, architecture: str, family: GgufFamily
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    found: dict[str, Any] = {key: getattr(config, setting) for key, setting in SETTINGS.items()}
    found |= {"attention.head_count_kv": config.num_key_value_heads, "vocab_size": config.vocab_size}
    found |= {"attention.key_length": width, "attention.value_length": width}
    rope, divisors = rope_metadata(config, architecture, width)
    found |= rope | family.stated(config)
    return {f"{architecture}.{key}": value for key, value in found.items() if value is not None}, divisors


def _general(kind: str, given: Mapping[str, Any]) -> dict[str, Any]:
    import gguf

    found: dict[str, Any] = {"type": "model", "file_type": int(gguf.LlamaFileType[_FILE_TYPES[kind]])}
    if kind in _IN_BLOCKS:
        found["quantization_version"] = gguf.GGML_QUANT_VERSION
    return {f"general.{key}": value for key, value in (found | dict(given)).items()}


def _check(plan: GgufPlan) -> None:
    """Compare what the reader would make of a plan with the model that it is of."""
    given = {name: tensor for name, tensor in plan.tensors.items() if tensor.values is not None}
    stored = {name: _as_read(tensor) for name, tensor in given.items()}
    shapes = {name: tensor.shape for name, tensor in plan.tensors.items()}
    contents = _PlannedContents(Path("planned.gguf"), plan.architecture, plan.metadata, shapes, stored)
    found = skeleton(configuration_of(contents))
    check_tokenizer(contents)
    if what := first_difference(meaning_of(skeleton(plan.config)), found, _TOLD_BY_LAYERS):
        raise UserError(
            f"form=gguf: GGUF does not say it all of this {plan.config.model_type}: {what}; pass form=dense"
        )


def _as_read(tensor: PlannedTensor) -> Any:
    from gguf import GGMLQuantizationType

    assert tensor.values is not None
    return SimpleNamespace(data=tensor.values.numpy(), tensor_type=GGMLQuantizationType.F32)


def _kind(shape: tuple[int, ...], asked: str) -> str:
    if len(shape) < 2:
        return "F32"
    return "BF16" if asked in _IN_BLOCKS and shape[-1] % _BLOCK else asked


def _byte_shape(tensor: PlannedTensor) -> tuple[int, ...]:
    """Shape of what the ``gguf`` package makes of a tensor."""
    from gguf import GGMLQuantizationType
    from gguf.quants import quant_shape_to_byte_shape

    if tensor.kind in ("F32", "F16"):
        return tensor.shape
    return tuple(quant_shape_to_byte_shape(tensor.shape, GGMLQuantizationType[tensor.kind]))


def _item_type(kind: str) -> np.dtype[Any]:
    return np.dtype({"F32": np.float32, "F16": np.float16}.get(kind, np.uint8))


def _size(tensor: PlannedTensor) -> int:
    return int(np.prod(_byte_shape(tensor))) * _item_type(tensor.kind).itemsize


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
            f"{tensor.source or name}: holds values that are not finite as {tensor.kind}; pass gguf.type=F32"
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
