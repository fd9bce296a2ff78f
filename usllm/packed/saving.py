"""What ``save_pretrained`` of a loaded packed model has to write beside the tensors: checksums for all of them.

transformers asks its quantizer for the metadata of the weight files before it writes anything, so what it is about to
write is worked out here from the model: the tensors with the types they have now, and the configuration as
``config.json`` will hold it.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from usllm.packed.checksums import SECTION, Checksums, of_keys, of_tensors
from usllm.packed.config import PackedConfig
from usllm.packed.meaning import meaning_of

if TYPE_CHECKING:  # this module is loaded while transformers still is
    from transformers import PreTrainedModel


def checksums_of(model: PreTrainedModel, packed: PackedConfig) -> Checksums:
    """Checksums of a model as it is about to be saved.

    Args:
        model: A packed model; layers that are offloaded are loaded one at a time.
        packed: Its packed configuration, as it will be written.
    """
    written = _written_config(model, packed)
    keys = of_keys(written)
    plain = type(model.config).from_dict({key: value for key, value in written.items() if key != SECTION})
    with torch.device("meta"):  # what the next load will make of it: the model itself may be older than its settings
        next_model = type(model)(plain)
    return Checksums(of_tensors(_tensors(model), packed), keys, meaning_of(next_model))


def _written_config(model: PreTrainedModel, packed: PackedConfig) -> dict[str, Any]:
    """Content of the ``config.json`` that ``save_pretrained`` of either major of transformers will write."""
    config: Any = copy.deepcopy(model.config)
    config.dtype = str(model.dtype).removeprefix("torch.")
    config.architectures = [type(model).__name__]
    config.quantization_config = packed.to_dict()
    moved = getattr(config, "_get_non_default_generation_parameters", dict)  # transformers 4: to another file
    for key in moved() if model.can_generate() else ():
        setattr(config, key, None)
    content: dict[str, Any] = json.loads(config.to_json_string())
    return content


def _tensors(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """State dict of a model; tied tensors under each of their names, since versions differ in which one they store."""
    for name, tensor in model.state_dict().items():
        yield name, tensor if tensor.device.type != "meta" else _loaded(model, name)


def _loaded(model: PreTrainedModel, name: str) -> Tensor:
    """A tensor that accelerate has offloaded."""
    from accelerate.utils.modeling import get_state_dict_from_offload

    module = model.get_submodule(name.rpartition(".")[0])
    tensor: Tensor = get_state_dict_from_offload(module, name, {name: ""}, device_to_put_offload="cpu")[name]
    return tensor
