"""The weight files of a folder that transformers loads: which tensors there are, and how they are dealt to files."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from huggingface_hub.serialization import split_state_dict_into_shards_factory
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from usllm.packed.folder import INDEX_FILE
from usllm.system.errors import UserError
from usllm.system.files import write_tensors, write_text

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
"""Types that tensors can be stored in, by their names in configurations."""


def empty_model(config: PretrainedConfig, dtype: str) -> PreTrainedModel:
    """The dense model without memory, on the meta device.

    Args:
        config: Of the dense model, or of a packed one.
        dtype: A key of :data:`DTYPES`.
    """
    plain = copy.deepcopy(config)
    if hasattr(plain, "quantization_config"):
        del plain.quantization_config
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(plain, dtype=DTYPES[dtype])
    return model


def stored_tensors(skeleton: nn.Module) -> dict[str, Tensor]:
    """State dict of a model with tied tensors once, under their first name."""
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in skeleton.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            found[name] = tensor
    return found


def rounded(tensor: Tensor, dtype: str, name: str, key: str = "rest.dtype") -> Tensor:
    """A tensor in the type that it is stored in, in memory of its own; whole numbers stay what they are.

    Args:
        tensor: On any device.
        dtype: A key of :data:`DTYPES`.
        name: Of the tensor, for the message.
        key: That chose the type, for the message.

    Raises:
        UserError: It holds numbers that are not finite in that type; it is named.
    """
    tensor = tensor.detach().cpu()
    if not tensor.is_floating_point():
        return tensor.contiguous().clone()
    found = tensor.to(DTYPES[dtype]).contiguous()
    if not bool(found.isfinite().all()):
        raise UserError(f"{name}: holds values that are not finite as {dtype}; store it with {key}=float32")
    return found.clone() if found.data_ptr() == tensor.data_ptr() else found


def write_shards(
    folder: Path,
    expected: Mapping[str, Tensor],
    read: Callable[[str], Tensor],
    metadata: Callable[[Mapping[str, Tensor]], dict[str, str]],
    max_shard_size: int,
) -> None:
    """Write one weight file, or several with an index; the tensors of one file are in memory at a time.

    Args:
        folder: Where to.
        expected: Every tensor as it is to be stored, on the meta device.
        read: One tensor as it is stored.
        metadata: Of a file, from its tensors.
        max_shard_size: Ceiling for one file, in bytes; a larger tensor has a file of its own.

    Raises:
        UserError: A tensor has another shape than it should; it is named.
    """
    sizes = {name: tensor.numel() * tensor.element_size() for name, tensor in expected.items()}
    split = split_state_dict_into_shards_factory(
        sizes,  # the factory looks at the values only through the functions below
        get_storage_size=lambda size: size,
        get_storage_id=lambda size: None,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_size,
    )
    for file, names in split.filename_to_tensors.items():
        tensors = {name: read(name) for name in names}
        for name, tensor in tensors.items():
            if tensor.shape != expected[name].shape:
                wanted = list(expected[name].shape)
                raise UserError(
                    f"{name}: is {list(tensor.shape)} in the checkpoint, {wanted} in the model's configuration"
                )
        write_tensors(folder / file, tensors, {"format": "pt"} | metadata(tensors))
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        write_text(folder / INDEX_FILE, json.dumps(index, indent=2, sort_keys=True) + "\n")
