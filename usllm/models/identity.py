"""What a model is, by content: the key of everything that it alone decides."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.tensor import DTensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_PLACES = ("_name_or_path", "name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures")
"""Entries of a configuration that say where a model came from, not what it computes."""


def weights_digest(model: PreTrainedModel) -> str:
    """Fingerprint (32 hex digits) of the configuration and all parameters, wherever the model came from.

    Parameters of a model in shards are gathered one by one, which all ranks do together.

    One pass over the memory; 128 bits of xxHash, which is fast and does not withstand forgery.
    """
    import xxhash  # a dependency of datasets

    digest = xxhash.xxh3_128(json.dumps(configuration_words(model), sort_keys=True, default=str).encode())
    for name, parameter in model.named_parameters():
        values = parameter.detach()
        values = (values.full_tensor() if isinstance(values, DTensor) else values).cpu().contiguous()
        digest.update(f"{name} {values.dtype} {list(values.shape)}".encode())
        digest.update(values.flatten().view(torch.uint8).numpy().data)
    return str(digest.hexdigest())


def configuration_words(model: PreTrainedModel) -> list[Any]:
    """What a model computes besides its weights: its kind and its configuration, without where it came from."""
    config = {key: value for key, value in model.config.to_dict().items() if key not in _PLACES}
    return [[type(model).__name__, getattr(model.config, "_attn_implementation", None)], config]
