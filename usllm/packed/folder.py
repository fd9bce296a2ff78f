"""A packed model's folder on disk: what is in it, read without trusting it and without reading tensors."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from usllm.packed.checksums import Checksums, check_keys, check_tensors, refuse_other_models
from usllm.packed.config import QUANT_METHOD, PackedConfig, is_name
from usllm.system.errors import PackedFormatError

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_DESCRIPTION_BYTES = 1 << 20  # of JSON in a folder of any size
_DESCRIPTION_SHARE = 16  # more where the weights are more: JSON takes up to 25 times its size when it is read
_DEPTH = 64  # of nested JSON: what walks through it recursively has a limit of its own
# Keys of a configuration that make transformers read other files than those checked here, or fetch and run code.
_REFUSED_KEYS = ("auto_map", "fusion_config", "transformers_weights")
_REFUSED_FILES = {
    "adapter_config.json": "adds weights from elsewhere to the model",
    "custom_generate": "holds code, which transformers 4 runs when it loads the model",
}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as its file's header describes it: file name, type as safetensors names it, and shape."""

    file: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class PackedFolder:
    """A folder whose configuration and tensor headers were read and agree.

    Attributes:
        path: Where.
        model_config: Content of ``config.json``.
        packed: Its ``quantization_config``.
        tensors: Every tensor by name.
        header_bytes: Bytes of each weight file before its first tensor.
        checksums: What the header of each weight file says; empty in format version 1.
    """

    path: Path
    model_config: dict[str, Any]
    packed: PackedConfig
    tensors: dict[str, StoredTensor]
    header_bytes: dict[str, int]
    checksums: dict[str, Checksums] = field(default_factory=dict)

    def check_tensors(self) -> None:
        """Check every tensor against its checksum; in format version 1 there are none beside the layers' own.

        Raises:
            PackedFormatError: One is missing or wrong; the tensor is named.
        """
        for file, stored in self.checksums.items():
            check_tensors(self.path / file, stored, self.packed)

    @contextmanager
    def reading(self) -> Iterator[TensorReader]:
        """Read tensors one at a time; each file is mapped, not loaded."""
        reader = TensorReader(self)
        try:
            yield reader
        finally:
            reader.close()


class TensorReader:
    """Tensors of a folder by name, on the CPU."""

    def __init__(self, folder: PackedFolder) -> None:
        self.folder = folder
        self._open: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Tensor:
        file = self.folder.tensors[name].file
        if file not in self._open:
            self._open[file] = safe_open(self.folder.path / file, framework="pt").__enter__()
        tensor: Tensor = self._open[file].get_tensor(name)
        return tensor

    def close(self) -> None:
        for file in self._open.values():
            file.__exit__(None, None, None)
        self._open.clear()


def is_packed(path: Path) -> bool:
    """Whether a folder says of itself that it is a packed usllm model; nothing is checked."""
    try:
        section = json.loads((path / CONFIG_FILE).read_text(encoding="utf-8")).get("quantization_config")
        return isinstance(section, dict) and section.get("quant_method") == QUANT_METHOD
    except (OSError, ValueError, AttributeError, RecursionError):
        return False


def open_folder(path: str | Path) -> PackedFolder:
    """Read and check configuration and headers: every compressed or block-quantised tensor is there with its shape,
    and the configuration is the one that the tensors were stored with.

    Raises:
        PackedFormatError: Something is missing, damaged or impossible; the message begins with its name.
    """
    path = Path(path)
    limit = _description_limit(path)
    model_config = read_json(path / CONFIG_FILE)
    packed = PackedConfig.from_dict(model_config.get("quantization_config") or {})
    _check_keys(model_config)
    refuse_files(path)
    tensors: dict[str, StoredTensor] = {}
    header_bytes, checksums = {}, {}
    for file, names in weight_files(path).items():
        header_bytes[file], found, metadata = _header(path / file, limit)
        if packed.format_version > 1:
            checksums[file] = Checksums.from_metadata(metadata, file)
        if names is not None and names != set(found):
            raise PackedFormatError(
                f"{INDEX_FILE}: does not list the tensors of {file}, such as {min(names ^ set(found))}"
            )
        tensors |= found
    folder = PackedFolder(path, model_config, packed, tensors, header_bytes, checksums)
    _check_tensors(folder)
    for stored in checksums.values():
        check_keys(model_config, stored)
    refuse_other_models(checksums)
    return folder


def refuse_files(path: Path) -> None:
    """Refuse a folder with files that make transformers run code or load more than the model.

    Raises:
        PackedFormatError: There is one; it is named.
    """
    for name, why in _REFUSED_FILES.items():
        if (path / name).exists():
            raise PackedFormatError(f"{name}: {why}; it is refused: delete it")


def _description_limit(path: Path) -> int:
    """Most bytes that one JSON file, or the header of one weight file, may have in this folder."""
    try:
        weights = sum(file.stat().st_size for file in path.glob("*.safetensors"))
    except OSError as error:
        raise PackedFormatError(f"{path.name}: cannot be read ({error})") from error
    return _DESCRIPTION_BYTES + weights // _DESCRIPTION_SHARE


def _check_keys(section: dict[str, Any]) -> None:
    """Refuse what would make transformers fetch or run code, here and in nested configurations."""
    for key, value in section.items():
        # sdpa, eager and the like are built in; owner/name, or a mapping to such, is code on the hub.
        named = key.endswith(("attn_implementation", "experts_implementation")) and value is not None
        if (key in _REFUSED_KEYS and value) or (named and not (isinstance(value, str) and value.isidentifier())):
            raise PackedFormatError(
                f"{CONFIG_FILE}: {key}={str(value)[:80]!r} could fetch and run code; it is refused: remove the key"
            )
        if isinstance(value, dict) and key != "quantization_config":
            _check_keys(value)


def _check_tensors(folder: PackedFolder) -> None:
    from usllm.packed.blocks import bytes_per_row

    expected: dict[str, tuple[int, ...]] = {
        f"{name}.packed": (entry.bytes,) for name, entry in folder.packed.layers.items()
    }
    for name, block in folder.packed.blocks.items():
        try:
            expected[f"{name}.weight"] = (block.shape[0], bytes_per_row(block.shape[1], block.bits))
        except ValueError as error:
            raise PackedFormatError(f"quantization_config.blocks.{name}: {error}") from error
    for name, shape in expected.items():
        stored = folder.tensors.get(name)
        if stored is None:
            raise PackedFormatError(f"{name}: is missing from the weight files")
        if stored.dtype != "U8" or stored.shape != shape:
            raise PackedFormatError(f"{name}: is {stored.dtype} {list(stored.shape)}, expected U8 {list(shape)}")


def weight_files(path: Path) -> dict[str, set[str] | None]:
    """Weight files, each with the tensors that an index says are in it, ``None`` without an index.

    Raises:
        PackedFormatError: There are none, or the index leads elsewhere.
    """
    if (path / WEIGHTS_FILE).is_file():
        return {WEIGHTS_FILE: None}
    if not (path / INDEX_FILE).is_file():
        raise PackedFormatError(f"{WEIGHTS_FILE}: is missing from {path}, and so is {INDEX_FILE}")
    weight_map = read_json(path / INDEX_FILE).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise PackedFormatError(f"{INDEX_FILE}: has no weight_map")
    files: dict[str, set[str] | None] = {}
    for name, file in weight_map.items():
        plain = is_name(file) and file.endswith(".safetensors")
        if not plain or not is_name(name):
            raise PackedFormatError(
                f"{INDEX_FILE}: {name[:80]!a} is said to be in {str(file)[:80]!a}, which is no weight file here"
            )
        if file not in files and not (path / file).is_file():
            raise PackedFormatError(f"{file}: is missing from {path}")
        names = files.setdefault(file, set())
        assert names is not None
        names.add(name)
    return files


def _header(path: Path, limit: int) -> tuple[int, dict[str, StoredTensor], dict[str, str] | None]:
    try:
        if not path.is_file():
            raise PackedFormatError(f"{path.name}: is missing from {path.parent}")
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
        if length > limit:
            raise PackedFormatError(f"{path.name}: its header of {length} bytes is too long for its tensors")
        with safe_open(path, framework="pt") as content:
            metadata = content.metadata()
            slices = {name: content.get_slice(name) for name in content.keys()}  # noqa: SIM118 (not a dict)
            found = {
                name: StoredTensor(path.name, part.get_dtype(), tuple(part.get_shape()))
                for name, part in slices.items()
            }
    except PackedFormatError:
        raise
    except (OSError, SafetensorError, ValueError, OverflowError) as error:
        raise PackedFormatError(f"{path.name}: cannot be read ({error})") from error
    for name in found:
        if not is_name(name):
            raise PackedFormatError(f"{path.name}: {name[:80]!a} is no name of a tensor")
    return 8 + length, found, metadata


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of a folder, bounded in size by the folder's weights and in depth.

    Raises:
        PackedFormatError: It is missing, damaged or too large; the file is named.
    """
    limit = _description_limit(path.parent)
    try:
        if not path.is_file():
            raise PackedFormatError(f"{path.name}: is missing from {path.parent}")
        if path.stat().st_size > limit:
            raise PackedFormatError(f"{path.name}: has {path.stat().st_size} bytes, too many for a description")
        content = json.loads(path.read_text(encoding="utf-8"))
    except PackedFormatError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise PackedFormatError(f"{path.name}: cannot be read ({error})") from error
    if not isinstance(content, dict):
        raise PackedFormatError(f"{path.name}: is not an object")
    level: list[Any] = [content]
    for _ in range(_DEPTH):
        level = [value for item in level for value in (item.values() if isinstance(item, dict) else item)]
        level = [value for value in level if isinstance(value, (dict, list))]
    if level:
        raise PackedFormatError(f"{path.name}: cannot be read (nested deeper than {_DEPTH} levels)")
    return content
