"""Tensors of a GGUF file and parameters of a model: each accounted for, and equal value by value."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from usllm.models.completeness import incompleteness
from usllm.models.gguf_contents import GgufContents
from usllm.models.gguf_families import GgufFamily, family_of
from usllm.models.gguf_rope import ROPE_TENSORS
from usllm.models.skeleton import skeleton
from usllm.system.errors import UserError


def check_tensors(contents: GgufContents, config: PretrainedConfig) -> None:
    """Compare names and shapes with those of the model that the configuration describes; nothing is decoded.

    Raises:
        UserError: tensors are missing, left over or misshaped; the first ones and their number are named.
    """
    blocks = {name.split(".")[1] for name in contents.shapes if name.startswith("blk.")}
    if len(blocks) != config.num_hidden_layers:  # before a model of a billion layers is built
        raise UserError(
            f"model.file={contents.path} holds {len(blocks)} layers, its metadata say {config.num_hidden_layers}; "
            "download it again"
        )
    wanted = {
        name: tuple(tensor.shape)
        for name, tensor in _renamed(contents, skeleton(config).state_dict(), config.num_hidden_layers).items()
    }
    if config.tie_word_embeddings:
        wanted.pop("output.weight", None)
    found = {name: shape for name, shape in contents.shapes.items() if name not in ROPE_TENSORS}
    problem = incompleteness(
        missing=[name for name in wanted if name not in found],
        unexpected=[name for name in found if name not in wanted],
        misshaped=[
            f"{name} ({list(shape)} for {list(wanted[name])})"
            for name, shape in found.items()
            if name in wanted and shape != wanted[name]
        ],
    )
    if problem is not None:
        raise UserError(f"model.file={contents.path} is not a whole {config.model_type} model: {problem}")


def check_values(contents: GgufContents, model: PreTrainedModel) -> None:
    """Compare every parameter of a decoded model with the tensor of the file, decoded by the ``gguf`` package.

    Args:
        contents: the file.
        model: decoded by transformers, fp32.

    Raises:
        UserError: a parameter has other values.
    """
    family = family_of(contents)
    tied = model.config.tie_word_embeddings
    for name, parameter in _renamed(contents, model.state_dict(), model.config.num_hidden_layers).items():
        if name == "output.weight" and tied:
            continue
        if not torch.equal(parameter, _as_parameter(contents, name, family, model.config)):
            raise contents.refusal(f"the values of the tensor {name} are not those that transformers has read")


def stored_names(architecture: str, names: Iterable[str], layers: int) -> dict[str, str]:
    """The name in a GGUF file of each parameter of a model; one that GGUF does not know keeps its own.

    Args:
        architecture: GGUF's name of the family.
        names: of the parameters.
        layers: of the model.
    """
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    kind = next(key for key, name in MODEL_ARCH_NAMES.items() if name == architecture)
    known = get_tensor_name_map(kind, layers)
    head = {"lm_head.weight": "output.weight"}  # which the map of an architecture that always ties it leaves out
    return {name: known.get_name(name, try_suffixes=(".weight", ".bias")) or head.get(name, name) for name in names}


def as_stored(tensor: Tensor, name: str, family: GgufFamily, config: PretrainedConfig) -> Tensor:
    """A parameter as llama.cpp stores it; inverse of what the reader does.

    Args:
        tensor: fp32, of the model.
        name: in the file.
        family: of the model.
        config: of the model.
    """
    if family.norm_offset and name.endswith("norm.weight"):
        return tensor + family.norm_offset
    if family.permuted_heads and _ends(name, ("attn_q", "attn_k")):
        halves = tensor.view(_heads(name, config), 2, -1, *tensor.shape[1:])
        return halves.transpose(1, 2).reshape(tensor.shape)
    return tensor


def _renamed(contents: GgufContents, tensors: dict[str, Tensor], layers: int) -> dict[str, Tensor]:
    """State dict of a model under the names of GGUF; a name that GGUF does not know stays as it is."""
    names = stored_names(contents.architecture, tensors, layers)
    return {names[name]: value for name, value in tensors.items()}


def _as_parameter(contents: GgufContents, name: str, family: GgufFamily, config: PretrainedConfig) -> Tensor:
    """A tensor of the file as the parameter of a model, without what llama.cpp changed when it wrote the file."""
    tensor = contents.tensor(name)
    if family.norm_offset and name.endswith("norm.weight"):
        return tensor - family.norm_offset
    if family.permuted_heads and _ends(name, ("attn_q", "attn_k")):
        # Rows of a head: (0, half), (1, half + 1), … in the file; 0, 1, …, half, half + 1, … in transformers.
        paired = tensor.view(_heads(name, config), -1, 2, *tensor.shape[1:])
        return paired.transpose(1, 2).reshape(tensor.shape)
    return tensor


def _heads(name: str, config: PretrainedConfig) -> int:
    return int(config.num_attention_heads if "attn_q" in name else config.num_key_value_heads)


def _ends(name: str, stems: Iterable[str]) -> bool:
    return any(name.endswith((f"{stem}.weight", f"{stem}.bias")) for stem in stems)
