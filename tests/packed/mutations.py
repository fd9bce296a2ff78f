"""Damage to a packed folder, the same for the same number: accidents, lies, and layers with a fitting checksum.

Run as a program it reads thousands of damaged folders in a process whose memory is bounded (:func:`main`).
"""

from __future__ import annotations

import faulthandler
import json
import random
import resource
import sys
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

CONFIG, WEIGHTS = "config.json", "model.safetensors"
SLACK_BYTES = 64 << 20  # over twice the folder's size: interpreter, allocator and library overhead


@dataclass(frozen=True)
class Files:
    """The two files of a folder that decide what is loaded."""

    config: bytes
    weights: bytes

    def write(self, folder: Path) -> Path:
        (folder / CONFIG).write_bytes(self.config)
        (folder / WEIGHTS).write_bytes(self.weights)
        return folder

    @property
    def size(self) -> int:
        return len(self.config) + len(self.weights)

    @classmethod
    def read(cls, folder: Path) -> Files:
        return cls((folder / CONFIG).read_bytes(), (folder / WEIGHTS).read_bytes())


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


def tensor_places(weights: bytes) -> dict[str, tuple[int, int]]:
    """First byte and end of every tensor in a safetensors file."""
    length = int.from_bytes(weights[:8], "little")
    header = json.loads(weights[8 : 8 + length])
    return {
        name: (8 + length + entry["data_offsets"][0], 8 + length + entry["data_offsets"][1])
        for name, entry in header.items()
        if name != "__metadata__"
    }


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


def flip_bits(data: bytes, draw: random.Random, end: int) -> bytes:
    changed = bytearray(data)
    for _ in range(draw.choice([1, 1, 2, 8])):
        changed[draw.randrange(min(end, len(data)))] ^= 1 << draw.randrange(8)
    return bytes(changed)


def with_header(weights: bytes, header: bytes) -> bytes:
    length = int.from_bytes(weights[:8], "little")
    return len(header).to_bytes(8, "little") + header + weights[8 + length :]


def _header(files: Files) -> bytes:
    return files.weights[8 : 8 + int.from_bytes(files.weights[:8], "little")]


def _swap(files: Files, draw: random.Random) -> Files:
    """Two tensors exchange what their header says of them, or their names."""
    header = json.loads(_header(files))
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


MUTATIONS: dict[str, Callable[[Files, random.Random], Files]] = {
    "layer": _blob,
    "weights bits": lambda files, draw: replace(files, weights=flip_bits(files.weights, draw, len(files.weights))),
    "header bits": lambda files, draw: replace(files, weights=flip_bits(files.weights, draw, len(_header(files)) + 8)),
    "header json": lambda files, draw: replace(
        files, weights=with_header(files.weights, edited_json(_header(files), draw))
    ),
    "header length": _length,
    "tensors swapped": _swap,
    "truncated": lambda files, draw: replace(files, weights=files.weights[: draw.randrange(len(files.weights))]),
    "extended": lambda files, draw: replace(files, weights=files.weights + draw.randbytes(draw.choice([1, 8, 5000]))),
    "config json": lambda files, draw: replace(files, config=edited_json(files.config, draw)),
    "config section": lambda files, draw: replace(files, config=edited_json(files.config, draw, "quantization_config")),
    "config bits": lambda files, draw: replace(files, config=flip_bits(files.config, draw, len(files.config))),
    "config truncated": lambda files, draw: replace(files, config=files.config[: draw.randrange(len(files.config))]),
}


def mutated(files: Files, number: int) -> tuple[str, Files]:
    """The damaged folder of this number, and what was done to it."""
    kind = sorted(MUTATIONS)[number % len(MUTATIONS)]
    return kind, MUTATIONS[kind](files, random.Random(number))


def ran_out_of_memory(error: BaseException | None) -> bool:
    """Whether a refusal hides that an allocation failed."""
    while error is not None:
        if isinstance(error, MemoryError) or "allocate memory" in str(error) or "MemoryError" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


class Cases:
    """Reads damaged folders; whatever is neither success nor :class:`PackedFormatError` is raised.

    Args:
        source: A valid packed folder.
        scratch: Folder to write damaged ones to.
    """

    def __init__(self, source: Path, scratch: Path) -> None:
        from usllm.packed.config import PackedConfig

        self.files, self.scratch = Files.read(source), scratch
        packed = PackedConfig.from_dict(json.loads(self.files.config)["quantization_config"])
        self.sketch = packed.sketch
        places = tensor_places(self.files.weights)
        self.layers = {
            name: (entry.shape, self.files.weights[slice(*places[f"{name}.packed"])])
            for name, entry in packed.layers.items()
        }

    def layer(self, number: int) -> str:
        """Read and decode a damaged layer."""
        import torch

        from usllm.sketch import query
        from usllm.sketch.layer_bytes import read_plan, read_states

        draw = random.Random(number)
        name = draw.choice(sorted(self.layers))
        shape, blob = self.layers[name]
        packed = torch.frombuffer(bytearray(damaged_blob(blob, draw)) or bytearray(1), dtype=torch.uint8)

        def attempt() -> None:
            plan = read_plan(packed, shape, self.sketch, name)
            decoded = query(read_states(packed, plan), plan)
            assert decoded.shape == shape and bool(decoded.isfinite().all()), "decoded weights are not finite"

        return self._outcome("layer alone", attempt)

    def inspect(self, number: int) -> str:
        """Inspect a damaged folder."""
        from usllm.packed.inspection import inspect_folder

        kind, files = mutated(self.files, number)
        folder = files.write(self.scratch)
        return self._outcome(f"{kind}, inspected", lambda: inspect_folder(folder))

    def load(self, number: int) -> str:
        """Load a damaged folder and compute with it."""
        import torch

        import usllm

        kind, files = mutated(self.files, number)
        folder = files.write(self.scratch)

        def attempt() -> None:
            with torch.no_grad():
                usllm.load(folder)(torch.tensor([[1, 2, 3, 4]]), use_cache=False)

        return self._outcome(f"{kind}, loaded", attempt)

    def _outcome(self, kind: str, attempt: Callable[[], Any]) -> str:
        from usllm.system.errors import PackedFormatError

        try:
            attempt()
        except PackedFormatError as error:
            if ran_out_of_memory(error):
                raise AssertionError("more memory was asked for than the file is worth") from error
            return f"{kind}: refused"
        return f"{kind}: accepted"


def main(source: str, scratch: str, layers: int, folders: int, loads: int, start: int) -> None:
    """Read damaged layers and folders in this process; print what became of them as JSON.

    Memory is bounded to what a healthy folder needed, twice the folder and a fixed slack; a case that takes over two
    minutes ends the process with a traceback. Damage that is handled wrongly is printed with its number.
    """
    import transformers

    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    transformers.logging.disable_progress_bar()
    import usllm
    from usllm.packed.inspection import inspect_folder

    cases = Cases(Path(source), Path(scratch))
    inspect_folder(source)
    import torch

    usllm.load(source)(torch.tensor([[1, 2, 3, 4]]), use_cache=False)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + 2 * cases.files.size + SLACK_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    outcomes: Counter[str] = Counter()
    failures = []
    for kind, count in (("layer", layers), ("inspect", folders), ("load", loads)):
        for number in range(start, start + count):
            faulthandler.dump_traceback_later(120, exit=True)
            try:
                outcomes[getattr(cases, kind)(number)] += 1
            except Exception as error:  # the case is told, and the others go on
                failures.append([kind, number, f"{type(error).__name__}: {error}"[:300]])
    faulthandler.cancel_dump_traceback_later()
    print(json.dumps({"outcomes": dict(sorted(outcomes.items())), "failures": failures}))


if __name__ == "__main__":
    main(*sys.argv[1:3], *map(int, sys.argv[3:]))  # type: ignore[arg-type]
