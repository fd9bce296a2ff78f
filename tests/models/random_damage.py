"""Model files of tiny random models with something done to them at random, as accidents and other programs do it.

What is done either leaves the model as it is or takes something of it that no reader can make up: so a file is refused,
or computes what the whole one does. Changes that make another model of it, such as other weights, are not among them.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from damaged_folders import cut, tensors, write_folder
from damaged_gguf import Tensors
from gguf_of_model import MODELS, write_model
from transformers import AutoModelForCausalLM, PreTrainedModel

Damage = Callable[[random.Random, Path], None]

_COUNTS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_key_value_heads", "vocab_size", "head_dim")
_GGUF_COUNTS = (
    *("embedding_length", "block_count", "feed_forward_length", "attention.head_count", "attention.head_count_kv"),
    *("attention.key_length", "attention.value_length", "vocab_size", "expert_count", "rope.dimension_count"),
)


def _other(draw: random.Random, number: int) -> int:
    return draw.choice([other for other in (0, 1, number // 2, number - 1, number + 1, 2 * number) if other != number])


def _rename(draw: random.Random, values: dict[str, Any]) -> None:
    """One tensor, or all of one kind, under a name that the model does not have."""
    name = draw.choice(sorted(values))
    part = draw.choice(name.split("."))
    chosen = [name] if draw.random() < 0.5 else [each for each in values if part in each.split(".")]
    for each in chosen:
        values[each.replace(part, f"{part}_{draw.randrange(9)}")] = values.pop(each)


def _drop(draw: random.Random, values: dict[str, Any]) -> None:
    for name in draw.sample(sorted(values), draw.choice((1, 1, 3))):
        del values[name]


def _repeat(draw: random.Random, values: dict[str, Any]) -> None:
    """A tensor once more, under a name of its own."""
    name = draw.choice(sorted(values))
    values[draw.choice((f"{name}.old", f"ema.{name}", name.replace(".0.", ".7.") + "_"))] = values[name] + 0


def _crop(draw: random.Random, values: dict[str, Any]) -> None:
    """A tensor with one row (or number) less."""
    name = draw.choice(sorted(values))
    values[name] = values[name][:-1] + 0


def _break(draw: random.Random, values: dict[str, Any]) -> None:
    """A number of a tensor that is not finite."""
    name = draw.choice(sorted(values))
    values[name] = values[name] + 0
    values[name][draw.randrange(len(values[name]))] = draw.choice((float("nan"), float("inf")))


_TENSORS = (_rename, _rename, _drop, _repeat, _crop, _break)


def _tensors(draw: random.Random, folder: Path) -> None:
    tensors(lambda values: draw.choice(_TENSORS)(draw, values))(folder)


def _types(draw: random.Random, folder: Path) -> None:
    """The same numbers in a wider type: the model as it was."""
    chosen = draw.choice((torch.float64, torch.float32))
    tensors(lambda values: values.update({name: value.to(chosen) for name, value in values.items()}))(folder)


def _cut(draw: random.Random, folder: Path) -> None:
    cut(draw.random())(folder)


def _longer(draw: random.Random, folder: Path) -> None:
    with (folder / "model.safetensors").open("ab") as file:
        file.write(draw.randbytes(draw.choice((1, 8, 4096))))


def _header(draw: random.Random, folder: Path) -> None:
    """One byte of the names, types, shapes and places of the tensors."""
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    place = draw.randrange(8 + int.from_bytes(content[:8], "little"))
    content[place] = (content[place] + draw.randint(1, 255)) % 256
    path.write_bytes(bytes(content))


def _file(draw: random.Random, folder: Path) -> None:
    """A file lost or cut."""
    path = draw.choice(sorted(folder.iterdir()))
    if draw.random() < 0.4:
        path.unlink()
    else:
        content = path.read_bytes()
        path.write_bytes(content[: int(len(content) * draw.random())])


def _config(draw: random.Random, folder: Path) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    key = draw.choice([key for key in _COUNTS if isinstance(config.get(key), int)])
    config[key] = draw.choice((_other(draw, config[key]), str(config[key]), None, -1, [config[key]]))
    path.write_text(json.dumps(config))


FOLDER: tuple[Damage, ...] = (
    _tensors,
    _tensors,
    _tensors,
    _types,
    _cut,
    _longer,
    _header,
    _file,
    _file,
    _config,
    _config,
)


def damaged_folder(draw: random.Random, place: Path) -> PreTrainedModel:
    """Write the folder ``model``; returns the whole model.

    Args:
        draw: what is done.
        place: folder for it.
    """
    architecture, shards = draw.choice(("llama", "llama", "qwen2", "qwen3")), draw.random() < 0.3
    write_folder(place / "whole", tied=draw.random() < 0.4, architecture=architecture)
    whole: PreTrainedModel = AutoModelForCausalLM.from_pretrained(place / "whole", dtype=torch.float32)
    if shards:
        whole.save_pretrained(place / "model", max_shard_size="60KB")
        for path in (place / "whole").iterdir():
            if path.name.startswith("token"):
                path.rename(place / "model" / path.name)
        _file(draw, place / "model")
    else:
        (place / "whole").rename(place / "model")
        draw.choice(FOLDER)(draw, place / "model")
    return whole


def damaged_gguf(draw: random.Random, place: Path) -> PreTrainedModel:
    """Write ``model.gguf``; returns the whole model.

    Args:
        draw: what is done.
        place: folder for it.
    """
    name = draw.choice(sorted(MODELS))
    architecture = name.partition("-")[0].replace("llama3", "llama")
    path, kind = place / "model.gguf", draw.randrange(6)
    if kind == 0:
        entries: dict[str, Any] = {}
        key = draw.choice(_GGUF_COUNTS[:-1] if architecture == "phi3" else _GGUF_COUNTS)  # which may rotate a part
        entries[f"{architecture}.{key}"] = draw.choice(
            (0, 1, 2, 3, 5, 8, 48, 64, 100, 128, 2**31, "8", -1.0, True, [8, 8])
        )
        return write_model(path, name, metadata=entries)
    if kind in (1, 2):

        def change(values: Tensors) -> None:
            draw.choice(_TENSORS)(draw, values)

        return write_model(path, name, tensors=change)
    whole = write_model(path, name)
    content = bytearray(path.read_bytes())
    if kind == 3:
        content = content[: int(len(content) * draw.random())]
    elif kind == 4:
        content += draw.randbytes(draw.choice((1, 32, 4096)))
    else:  # magic, version, numbers of tensors and of entries
        place_ = draw.randrange(24)
        content[place_] = (content[place_] + draw.randint(1, 255)) % 256
    path.write_bytes(bytes(content))
    return whole


def logits(model: PreTrainedModel) -> torch.Tensor:
    """Logits of fixed tokens."""
    ids = torch.randint(200, (2, 60), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=ids, use_cache=False).logits
    return found
