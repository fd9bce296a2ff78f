"""Damage that leaves a folder looking healthy: every value that is put in is one that some healthy folder has."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from folder_files import Files, flip_bits, tensor_places


def swap_layers(files: Files, draw: random.Random) -> Files:
    """Two layers of the same size exchange their bytes; each is whole in itself."""
    places = {name: place for name, place in tensor_places(files.weights).items() if name.endswith(".packed")}
    one = draw.choice(sorted(places))
    size = places[one][1] - places[one][0]
    content = {name: files.weights[slice(*place)] for name, place in places.items()}
    fitting = [name for name in places if len(content[name]) == size and content[name] != content[one]]
    other = draw.choice(sorted(fitting) or sorted(places))
    return _with_bytes(_with_bytes(files, places[one], content[other][:size]), places[other], content[one])


def _with_bytes(files: Files, place: tuple[int, int], content: bytes) -> Files:
    content = content[: place[1] - place[0]]
    weights = files.weights[: place[0]] + content + files.weights[place[0] + len(content) :]
    return replace(files, weights=weights)


# Values that a healthy folder could have: no check of types or ranges finds them.
_FORMATS: dict[str, list[Any]] = {
    "seed": [0, 1, 12345, 2**32 - 1],
    "hash": ["balanced", "uniform", "shared"],
    "operator": ["absmaxmin", "countmin", "mean"],
    "query": ["magnitude_max", "signed_max"],
    "group_size": [16, 32, 63, 64, 65, 512],
}
_MEANINGS: dict[str, list[Any]] = {
    "rope_theta": [10000, 10001.0, 500000.0],
    "rms_norm_eps": [1e-5, 1e-6, 1.1e-6],
    "hidden_act": ["silu", "gelu", "relu"],
    "num_key_value_heads": [1, 2, 4],
    "tie_word_embeddings": [True, False],
    "rope_scaling": [None, {"rope_type": "linear", "factor": 2.0}],
    "rope_parameters": [{"rope_type": "default", "rope_theta": 10500.0}],
    "max_position_embeddings": [2048, 4096],
    "dtype": ["float32", "bfloat16", "float16"],
    "attention_bias": [True, False],
    "attention_dropout": [0.0, 0.1],
    "sliding_window": [2, 4096],
    "layer_types": [["sliding_attention", "full_attention"]],
}


def _format(files: Files, draw: random.Random) -> Files:
    """Another value of a key that gives the sketches' bytes their meaning."""
    content = json.loads(files.config)
    key = draw.choice(sorted(_FORMATS))
    section = content["quantization_config"]
    section = section.get("format") or section["sketch"]  # format version 1
    section[key] = draw.choice([value for value in _FORMATS[key] if value != section[key]])
    return replace(files, config=json.dumps(content).encode())


def _meaning(files: Files, draw: random.Random) -> Files:
    """Another value of a key that decides what is computed with the tensors."""
    content = json.loads(files.config)
    key = draw.choice(sorted(_MEANINGS))
    content[key] = draw.choice([value for value in _MEANINGS[key] if value != content.get(key)])
    return replace(files, config=json.dumps(content).encode())


def _rest(files: Files, draw: random.Random) -> tuple[int, int]:
    """A tensor outside the sketch."""
    places = {name: place for name, place in tensor_places(files.weights).items() if not name.endswith(".packed")}
    return places[draw.choice(sorted(places))]


def _rest_bits(files: Files, draw: random.Random) -> Files:
    place = _rest(files, draw)
    content = files.weights[slice(*place)]
    return _with_bytes(files, place, flip_bits(content, draw, len(content)))


def _rest_values(files: Files, draw: random.Random) -> Files:
    """Finite bf16 numbers (also finite as bytes of blocks) in the place of some others."""
    first, end = _rest(files, draw)
    at = draw.randrange(first, end - 1, 2)
    return _with_bytes(files, (at, end), draw.choice([b"\x80\x3f", b"\x00\x00", b"\x20\x41", b"\x80\xbf"]))


PLAUSIBLE: dict[str, Callable[[Files, random.Random], Files]] = {
    "layers swapped": swap_layers,
    "format": _format,
    "meaning": _meaning,
    "rest bits": _rest_bits,
    "rest values": _rest_values,
}
