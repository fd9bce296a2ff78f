"""A GGUF file before its weights are read: metadata and tensors, checked to be read as the same model.

Configuration and tokenizer become metadata the way llama.cpp's own converter writes them, and the reader of this
package says what it would make of them. Where that is not the same model, nothing is written.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from torch import Tensor
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from usllm.models.gguf_contents import GgufContents
from usllm.models.gguf_families import GGUF_FAMILIES, SETTINGS, GgufFamily, configuration_of
from usllm.models.gguf_out import GGUF_TYPES, WRITER
from usllm.models.gguf_rope import rope_metadata
from usllm.models.gguf_tensors import stored_names
from usllm.models.gguf_tokenizer import check_tokenizer
from usllm.models.gguf_vocabulary import vocabulary_metadata
from usllm.models.skeleton import skeleton
from usllm.packed.meaning import first_difference, meaning_of
from usllm.packed.sharded_files import stored_tensors
from usllm.system.errors import UserError

_NUMBERS = {"F32": np.float32, "F16": np.float16}
_IN_BLOCKS = ("Q8_0", "Q4_0")
_BLOCK = 32
_FILE_TYPES = {"F32": "ALL_F32", **{kind: f"MOSTLY_{kind}" for kind in GGUF_TYPES[1:]}}
_TOLD_BY_LAYERS = ("max_window_layers",)
"""Settings that decide nothing once the type of each layer is known."""


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor that is to be written.

    Attributes:
        source: its parameter; ``None`` where ``values`` are given.
        shape: of its values.
        kind: its type.
        values: those of a tensor that is no parameter.
        setting: the key that decides the type of a matrix.
    """

    source: str | None
    shape: tuple[int, ...]
    kind: str
    values: Tensor | None = None
    setting: str = "gguf.type"

    @property
    def byte_shape(self) -> tuple[int, ...]:
        """Shape of what the ``gguf`` package makes of it."""
        from gguf import GGMLQuantizationType
        from gguf.quants import quant_shape_to_byte_shape

        if self.kind in _NUMBERS:
            return self.shape
        return tuple(quant_shape_to_byte_shape(self.shape, GGMLQuantizationType[self.kind]))

    @property
    def item_type(self) -> np.dtype[Any]:
        """Type of what the ``gguf`` package makes of it."""
        return np.dtype(_NUMBERS.get(self.kind, np.uint8))

    @property
    def bytes(self) -> int:
        """Bytes that it takes."""
        return int(np.prod(self.byte_shape)) * self.item_type.itemsize


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
        return sum(tensor.bytes for tensor in self.tensors.values())

    def described(self, name: str, description: str) -> GgufPlan:
        """The same plan of a file that says what it is called and how it was made."""
        told = {"general.name": name, "general.description": description}
        return replace(self, metadata={**self.metadata, **told})  # the mark of the writer stays the first entry

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
) -> GgufPlan:
    """Everything of the file but its weights, checked to be read as the same model; no weights are read.

    Args:
        config: of the dense model.
        tokenizer: of the model.
        generation: names more tokens that end a text.
        kind: type of matrices, one of :data:`usllm.models.gguf_out.GGUF_TYPES`; rows that are no whole blocks are
            BF16, and what is no matrix is F32.
        embeddings: type of embedding and head; ``None``: that of the others, but Q8_0 beside Q4_0.

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
        asked, setting = (of_ends, "gguf.embeddings") if id(tensor) in ends else (kind, "gguf.type")
        tensors[name] = PlannedTensor(parameter, shape, _kind(shape, asked), setting=setting)
    metadata |= vocabulary_metadata(tokenizer, tensors["token_embd.weight"].shape[0], generation)
    plan = GgufPlan(architecture, config, _general(kind, tensors) | metadata, tensors)
    _check(plan, model)
    return plan


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


def _general(kind: str, tensors: Mapping[str, PlannedTensor]) -> dict[str, Any]:
    import gguf

    found: dict[str, Any] = {"quantized_by": WRITER, "type": "model"}
    found["file_type"] = int(gguf.LlamaFileType[_FILE_TYPES[kind]])
    if any(tensor.kind in _IN_BLOCKS for tensor in tensors.values()):
        found["quantization_version"] = gguf.GGML_QUANT_VERSION
    return {f"general.{key}": value for key, value in found.items()}


def _check(plan: GgufPlan, model: PreTrainedModel) -> None:
    """Compare what the reader would make of a plan with the model that it is of, which may have no weights."""
    given = {name: tensor for name, tensor in plan.tensors.items() if tensor.values is not None}
    stored = {name: _as_read(tensor) for name, tensor in given.items()}
    shapes = {name: tensor.shape for name, tensor in plan.tensors.items()}
    contents = _PlannedContents(Path("planned.gguf"), plan.architecture, plan.metadata, shapes, stored)
    found = skeleton(configuration_of(contents))
    check_tokenizer(contents)
    if what := first_difference(meaning_of(model), found, _TOLD_BY_LAYERS):
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
