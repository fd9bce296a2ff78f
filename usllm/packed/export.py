"""Write a packed model: layer by layer, atomically, and read back before it gets its name."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from usllm.packed.blocks import BLOCK, fits, pack_blocks
from usllm.packed.checksums import Checksums, of_keys, of_tensors
from usllm.packed.config import BlockEntry, PackedConfig, PackedLayerEntry
from usllm.packed.description import ModelFiles, write_description
from usllm.packed.folder import CONFIG_FILE, open_folder
from usllm.packed.inspection import Inspection, inspect_folder
from usllm.packed.loading import check_against_model
from usllm.packed.meaning import meaning_of
from usllm.packed.new_folder import new_folder
from usllm.packed.quantizer import can_be_blocks, swap_packed_
from usllm.packed.sharded_files import DTYPES, empty_model, rounded, stored_tensors, write_shards
from usllm.packed.source import PackingSource
from usllm.system.errors import RunError, UserError, no_space
from usllm.system.files import write_text


@dataclass(frozen=True)
class RestStorage:
    """How what the sketch leaves alone is stored.

    Attributes:
        dtype: Of tensors that are not stored in blocks: ``bfloat16``, ``float16`` or ``float32``.
        embeddings: Bits of input embeddings and head: 16 (``dtype``), 8 or 4.
        linears: Bits of the other linear layers, such as output projections: 16, 8 or 4.

    Raises:
        ValueError: A value is unknown; it is named.
    """

    dtype: str = "bfloat16"
    embeddings: int = 16
    linears: int = 16

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"rest.dtype={self.dtype!r} is unknown: choose one of {', '.join(DTYPES)}")
        for key in ("embeddings", "linears"):
            if getattr(self, key) not in (16, 8, 4):
                raise ValueError(f"rest.{key}={getattr(self, key)!r} must be 16 (as rest.dtype), 8 or 4")


def export(
    source: PackingSource,
    files: ModelFiles,
    out: str | Path,
    *,
    rest: RestStorage | None = None,
    max_shard_size: int = 4_000_000_000,
    overwrite: bool = False,
    card: Callable[[Path, Inspection], str] | None = None,
) -> Inspection:
    """Write a packed model folder.

    At most one shard of tensors and one layer are in memory at a time, however many layers there are.

    Args:
        source: The sketched model.
        files: Configuration and tokenizer of the dense model.
        out: Folder to make.
        rest: How unsketched tensors are stored.
        max_shard_size: Ceiling for one weight file, in bytes; a larger tensor has a file of its own.
        overwrite: Replace ``out`` if it exists.
        card: Makes the model card (``README.md``) from the folder under construction and what is in it.

    Returns:
        What was written, read back from disk.

    Raises:
        UserError: ``out`` exists, the model does not fit its configuration, or a number is not finite in the type
            that it is stored in.
        RunError: ``out`` cannot be written.
    """
    out = Path(out)
    rest = rest or RestStorage()
    skeleton, stored = packed_skeleton(source, files.config, rest)
    with new_folder(out, overwrite) as folder:
        try:
            write_description(files, type(skeleton).__name__, stored, DTYPES[rest.dtype], folder)
            _write_tensors(source, skeleton, stored, rest, folder, max_shard_size)
            check_against_model(open_folder(folder))  # also: the written configuration means what it meant in memory
            inspection = inspect_folder(folder)
            if card is not None:
                write_text(folder / "README.md", card(folder, inspection))
                inspection = inspect_folder(folder)
        except Exception as error:  # tokenizers and safetensors have errors of their own for a full disk
            if isinstance(error, OSError) or no_space(error):
                raise RunError(
                    f"out={out} cannot be written ({error}): free space, or choose another folder"
                ) from error
            raise
        if inspection.accounted_bytes != inspection.disk_bytes:
            raise RuntimeError(
                f"{inspection.disk_bytes} bytes were written, {inspection.accounted_bytes} are accounted for"
            )
    return replace(inspection, path=out)


def packed_skeleton(
    source: PackingSource, config: PretrainedConfig, rest: RestStorage
) -> tuple[PreTrainedModel, PackedConfig]:
    """The packed model without memory (on the meta device), and its packed configuration.

    Raises:
        UserError: A sketched layer is not in the model that ``config`` describes.
    """
    model = empty_model(config, rest.dtype)
    layers = {name: PackedLayerEntry(plan.shape, plan.total_bits // 8) for name, plan in source.plans.items()}
    stored = PackedConfig(source.compressor, layers, _blocks(model, layers, rest))
    try:
        swap_packed_(model, stored)
    except ValueError as error:
        raise UserError(f"the checkpoint does not fit the model that it names: {error}") from error
    return model, stored


def left_whole(source: PackingSource, config: PretrainedConfig, rest: RestStorage) -> list[str]:
    """One line for each key of ``rest`` that does not have its whole effect on a model, with the reason."""
    model = empty_model(config, rest.dtype)
    lines = []
    for key in ("embeddings", "linears"):
        outside = [matrix for matrix in _outside(model, source.plans) if matrix.key == key]
        whole = [matrix for matrix in outside if not matrix.stored_in_blocks]
        if (bits := getattr(rest, key)) == 16 or (outside and not whole):
            continue
        if not outside:
            lines.append(f"rest.{key}={bits} has no effect: the model has no such layer outside of the sketch")
            continue
        shown = ", ".join(matrix.name for matrix in whole[:3]) + (f", … ({len(whole)} tensors)" if whole[3:] else "")
        stay = f"{shown} stay{'s' * (len(whole) == 1)} at 16 bits"
        why = f"rows are no whole blocks of {BLOCK}" if all(m.plain for m in whole) else "no plain embedding or linear"
        lines.append(f"rest.{key}={bits}: {stay}: {why}")
    return lines


class _Matrix(NamedTuple):
    """What is stored beside the compressed layers.

    Attributes:
        name: of the module.
        key: of :class:`RestStorage`.
        shape: ``(out, in)``.
        plain: whether blocks can stand in for all modules that share the weight.
    """

    name: str
    key: str
    shape: tuple[int, int]
    plain: bool

    @property
    def stored_in_blocks(self) -> bool:
        return self.plain and fits(self.shape[1])


def _outside(model: Any, layers: Collection[str]) -> list[_Matrix]:
    """Embeddings and linear layers outside of ``layers``; tied ones once, under the first name."""
    ends = {id(module) for module in (model.get_input_embeddings(), model.get_output_embeddings())}
    found: dict[int, _Matrix] = {}
    for name, module in model.named_modules():
        if name in layers or not isinstance(module, (nn.Linear, nn.Embedding)):
            continue
        key = "embeddings" if id(module) in ends or isinstance(module, nn.Embedding) else "linears"
        shape, plain = (int(module.weight.shape[0]), int(module.weight.shape[1])), can_be_blocks(module)
        first = found.setdefault(id(module.weight), _Matrix(name, key, shape, plain))
        found[id(module.weight)] = first._replace(plain=first.plain and plain)
    return list(found.values())


def _blocks(model: Any, layers: Mapping[str, Any], rest: RestStorage) -> dict[str, BlockEntry]:
    """Embeddings and linear layers that are asked for in blocks and can be stored so."""
    asked = ((matrix, getattr(rest, matrix.key)) for matrix in _outside(model, layers) if matrix.stored_in_blocks)
    return {matrix.name: BlockEntry(matrix.shape, bits) for matrix, bits in asked if bits != 16}


def _write_tensors(
    source: PackingSource,
    skeleton: PreTrainedModel,
    stored: PackedConfig,
    rest: RestStorage,
    folder: Path,
    max_shard_size: int,
) -> None:
    keys = of_keys(json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8")))
    meaning = meaning_of(skeleton)
    write_shards(
        folder,
        stored_tensors(skeleton),
        lambda name: _stored(name, source, stored, rest),
        lambda tensors: Checksums(of_tensors(tensors.items(), stored), keys, meaning).to_metadata(),
        max_shard_size,
    )


def _stored(name: str, source: PackingSource, stored: PackedConfig, rest: RestStorage) -> Tensor:
    """One tensor as the file holds it."""
    module, _, kind = name.rpartition(".")
    if kind == "packed" and module in source.plans:
        return source.plans[module].pack(source.states(module))
    tensor = source.tensors.get(name)
    if tensor is None:
        raise UserError(f"{name}: is in the model's configuration, but not in the checkpoint")
    if kind == "weight" and module in stored.blocks:
        try:
            return pack_blocks(tensor.detach().cpu(), stored.blocks[module].bits, name)
        except ValueError as error:
            raise UserError(f"{error}; store it with rest.embeddings=16 and rest.linears=16") from error
    return rounded(tensor, rest.dtype, name)
