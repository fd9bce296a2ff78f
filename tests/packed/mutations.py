"""Damage to a packed folder, the same for the same number: accidents, mix-ups, and forgeries with fitting checksums."""

from __future__ import annotations

import json
import random
import zlib
from collections.abc import Callable
from dataclasses import replace

from folder_files import WEIGHTS, Files, flip_bits, header_of, tensor_places, with_header
from plausible import PLAUSIBLE


def nested(depth: int) -> str:
    return "[" * depth + "]" * depth


# As JSON text, because some of it is no Python value.
VALUES = [
    *("-1", "0", "1", "2", "3", "7", "8", "31", "64", "65536", "1048576", "2147483648", "9223372036854775808"),
    *("1" + "0" * 30, "1" + "0" * 400, "9" * 5000, "-" + "9" * 30, "0.5", "-0.0", "1e308", "1e999", "NaN", "-Infinity"),
    *("true", "false", "null", '""', '"x"', '"absmaxmin"', '"uniform"', '"\\u0000"', '"\\ud800"', '"../../x"', '"U8"'),
    *("[]", "{}", "[[]]", "[1,2,3]", '{"a":1}', '"' + "x" * 10_000 + '"', nested(50), nested(5_000), nested(100_000)),
    *('"someone/code"', '"float16"', '"relu"', '"gpt2"', '"qwen2"', '["LlamaForCausalLM"]', "[-1,-1,-1]", "[0,0,0]"),
]
_MARK = "\u0001"  # stands for a text of VALUES until the rest has been written


def edited_json(text: bytes, draw: random.Random, inside: str | None = None) -> bytes:
    """One value somewhere in a JSON object replaced, removed, doubled or added."""
    content = json.loads(text)
    section = content[inside] if inside else content
    while True:
        key = draw.choice(list(section) if isinstance(section, dict) else range(len(section)))
        if not isinstance(section[key], (dict, list)) or not section[key] or draw.random() < 0.2:
            break
        section = section[key]
    value, kind = draw.choice(VALUES), draw.randrange(10)
    if kind == 0:
        del section[key]
    elif kind == 1 and isinstance(section, dict):
        section[draw.choice(["x", "", "..", "a b", "num_layers", "attn_implementation", f"{key}.x"])] = _MARK
    elif kind == 2 and isinstance(section[key], int):
        section[key] += draw.choice([-1, 1, 1 << 20, 1 << 32])
    else:
        section[key] = _MARK
    return json.dumps(content).replace(json.dumps(_MARK), value).encode()


def sealed(blob: bytes) -> bytes:
    """A layer with the checksum that fits."""
    if len(blob) < 8:
        return blob
    return blob[:4] + zlib.crc32(blob[8:], zlib.crc32(blob[:4])).to_bytes(4, "little") + blob[8:]


def damaged_blob(blob: bytes, draw: random.Random) -> bytes:
    """A layer with some bytes changed, mostly in its tables, or of another length; its checksum fits most times."""
    data = bytearray(blob)
    kind = draw.randrange(12)
    if kind == 0:
        data = data[: draw.randrange(len(data) + 1)]
    elif kind == 1:
        data += draw.randbytes(draw.choice([1, 2, 1000]))
    elif kind == 2:
        data = bytearray(draw.randbytes(len(data)))
    elif kind == 3:
        data[0] = draw.randrange(1, 17)
    else:
        for _ in range(draw.choice([1, 1, 2, 4, 16])):
            at = draw.choice([draw.randrange(4), draw.randrange(8, min(60, len(data))), draw.randrange(len(data))])
            data[at] = draw.choice([0, 1, 127, 128, 255, data[at] ^ 1 << draw.randrange(8), draw.randrange(256)])
    return sealed(bytes(data)) if draw.random() < 0.9 else bytes(data)


def _swap(files: Files, draw: random.Random) -> Files:
    """Two tensors exchange what their header says of them, or their names."""
    header = json.loads(header_of(files))
    one, two = draw.sample([name for name in header if name != "__metadata__"], 2)
    key = draw.choice(["data_offsets", "shape", "dtype", None])
    if key is None:
        header[one], header[two] = header[two], header[one]
    else:
        header[one][key], header[two][key] = header[two][key], header[one][key]
    return replace(files, weights=with_header(files.weights, json.dumps(header).encode()))


def _blob(files: Files, draw: random.Random) -> Files:
    places = {name: place for name, place in tensor_places(files.weights).items() if name.endswith(".packed")}
    first, end = places[draw.choice(sorted(places))]
    blob = damaged_blob(files.weights[first:end], draw)[: end - first].ljust(end - first, b"\0")
    return replace(files, weights=files.weights[:first] + sealed(blob) + files.weights[end:])


def _length(files: Files, draw: random.Random) -> Files:
    honest = int.from_bytes(files.weights[:8], "little")
    lie = draw.choice([0, 1, 2, honest - 1, honest + 1, honest * 2, 1 << 20, 1 << 27, 1 << 40, (1 << 64) - 1])
    return replace(files, weights=lie.to_bytes(8, "little") + files.weights[8:])


def forged(files: Files) -> Files:
    """The folder with checksums that fit what is in it, as far as it can be read; what a forger would write."""
    import safetensors.torch

    from usllm.packed.checksums import METADATA, Checksums, of_keys, of_tensors
    from usllm.packed.config import PackedConfig

    try:
        header, config = json.loads(header_of(files)), json.loads(files.config)
        stored = Checksums.from_metadata(header["__metadata__"], WEIGHTS)
        tensors = safetensors.torch.load(files.weights)
        packed = PackedConfig.from_dict(config["quantization_config"])
        checksums = Checksums(of_tensors(tensors.items(), packed), of_keys(config), stored.meaning)
        header["__metadata__"][METADATA] = checksums.to_metadata()[METADATA]
    except Exception:  # whatever the damage led to: such a file is refused for other reasons than its checksums
        return files
    return replace(files, weights=with_header(files.weights, json.dumps(header).encode()))


DAMAGE: dict[str, Callable[[Files, random.Random], Files]] = {
    "layer": _blob,
    "weights bits": lambda files, draw: replace(files, weights=flip_bits(files.weights, draw, len(files.weights))),
    "header bits": lambda files, draw: replace(
        files, weights=flip_bits(files.weights, draw, len(header_of(files)) + 8)
    ),
    "header json": lambda files, draw: replace(
        files, weights=with_header(files.weights, edited_json(header_of(files), draw))
    ),
    "header length": _length,
    "tensors swapped": _swap,
    "truncated": lambda files, draw: replace(files, weights=files.weights[: draw.randrange(len(files.weights))]),
    "extended": lambda files, draw: replace(files, weights=files.weights + draw.randbytes(draw.choice([1, 8, 5000]))),
    "config json": lambda files, draw: replace(files, config=edited_json(files.config, draw)),
    "config section": lambda files, draw: replace(files, config=edited_json(files.config, draw, "quantization_config")),
    "config bits": lambda files, draw: replace(files, config=flip_bits(files.config, draw, len(files.config))),
    "config truncated": lambda files, draw: replace(files, config=files.config[: draw.randrange(len(files.config))]),
    **PLAUSIBLE,
}
FORGED = ("layer", "header json", "tensors swapped", "config json", "config section", "format", "meaning", "rest bits")


def _forgery(kind: str) -> Callable[[Files, random.Random], Files]:
    return lambda files, draw: forged(DAMAGE[kind](files, draw))


MUTATIONS = DAMAGE | {f"{kind}, forged": _forgery(kind) for kind in FORGED}


def mutated(files: Files, number: int) -> tuple[str, Files]:
    """The damaged folder of this number, and what was done to it."""
    kind = sorted(MUTATIONS)[number % len(MUTATIONS)]
    return kind, MUTATIONS[kind](files, random.Random(number))
