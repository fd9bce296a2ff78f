"""Parts of a fused layer: loaded one by one as vLLM hands them on, and equal to the model's own layers."""

from __future__ import annotations

import pytest
import torch
from tiny_packed import pack, sketched_model
from torch import Tensor

import usllm
from usllm.packed.export import RestStorage
from usllm.packed.folder import PackedFolder, open_folder
from usllm.serving.vllm.parts import Parts
from usllm.system.errors import PackedFormatError

ATTENTION = "model.layers.0.self_attn"
QKV = [f"{ATTENTION}.{name}_proj" for name in "qkv"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> PackedFolder:
    rest = RestStorage("float32", 16, 8)
    return open_folder(pack(sketched_model(), tmp_path_factory.mktemp("parts") / "packed", rest))


def shapes(folder: PackedFolder, names: list[str]) -> tuple[list[int], int]:
    stored = [(folder.packed.layers.get(name) or folder.packed.blocks[name]).shape for name in names]
    return [rows for rows, _ in stored], stored[0][1]


def made(folder: PackedFolder, names: list[str]) -> Parts:
    rows, columns = shapes(folder, names)
    return Parts(names, rows, columns, folder.packed, torch.float32)


def stored(folder: PackedFolder, name: str, suffix: str = "packed") -> Tensor:
    with folder.reading() as tensors:
        return tensors[f"{name}.{suffix}"].clone()


def test_fused_parts_compute_what_the_layers_of_the_model_do(folder: PackedFolder) -> None:
    parts = made(folder, QKV)
    (holder,) = parts.placeholders().values()
    for shard, name in zip("vqk", [QKV[2], QKV[0], QKV[1]], strict=True):
        holder.weight_loader(holder, stored(folder, name), shard)  # type: ignore[attr-defined]
    parts.check()
    model = usllm.load(folder.path)
    x = torch.randn(3, parts.packed_linears()[0].in_features)
    with torch.no_grad():
        wanted = torch.cat([model.get_submodule(name)(x) for name in QKV], -1)
        assert torch.equal(parts(x), wanted)


def test_a_layer_in_blocks_computes_what_the_model_does(folder: PackedFolder) -> None:
    name = f"{ATTENTION}.o_proj"
    parts = made(folder, [name])
    (holder,) = parts.placeholders().values()
    holder.weight_loader(holder, stored(folder, name, "weight"))  # type: ignore[attr-defined]
    parts.check()
    x = torch.randn(3, folder.packed.blocks[name].shape[1])
    with torch.no_grad():
        assert torch.equal(parts(x), usllm.load(folder.path).get_submodule(name)(x))


def test_placeholders_hold_nothing(folder: PackedFolder) -> None:
    parts = made(folder, QKV)
    assert {name: holder.numel() for name, holder in parts.placeholders().items()} == {"packed": 0}
    assert list(parts.parameters()) == []  # vLLM would miss them among what it has loaded


def test_a_part_that_was_not_loaded_is_refused(folder: PackedFolder) -> None:
    parts = made(folder, QKV)
    (holder,) = parts.placeholders().values()
    for shard, name in (("q", QKV[0]), ("v", QKV[2])):
        holder.weight_loader(holder, stored(folder, name), shard)  # type: ignore[attr-defined]
    with pytest.raises(PackedFormatError, match=r"k_proj: was not loaded"):
        parts.check()


def test_damaged_bytes_are_refused(folder: PackedFolder) -> None:
    parts = made(folder, QKV[:1])
    (holder,) = parts.placeholders().values()
    bytes_ = stored(folder, QKV[0])
    bytes_[-1] ^= 1
    holder.weight_loader(holder, bytes_)  # type: ignore[attr-defined]
    with pytest.raises(PackedFormatError, match="q_proj"):
        parts.check()


def test_bytes_of_another_length_are_refused(folder: PackedFolder) -> None:
    parts = made(folder, QKV)
    (holder,) = parts.placeholders().values()
    with pytest.raises(PackedFormatError, match=r"q_proj: is .*, expected"):
        holder.weight_loader(holder, stored(folder, QKV[0])[:-1], "q")  # type: ignore[attr-defined]


def test_another_shape_in_vllm_is_refused(folder: PackedFolder) -> None:
    rows, columns = shapes(folder, QKV)
    with pytest.raises(PackedFormatError, match=r"k_proj: is .* in the folder, .* in vLLM's model"):
        Parts(QKV, [rows[0], rows[1] + 1, rows[2]], columns, folder.packed, torch.float32)
