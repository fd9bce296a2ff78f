"""What is known of a folder before vLLM reads it, and that a damaged one is refused as by ``usllm.load``."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from packed_folders import copied
from tiny_packed import pack, rewrite, seal, sketched_model

import usllm
from usllm.packed.export import RestStorage
from usllm.serving.vllm.folder import checked_folder
from usllm.system.errors import PackedFormatError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack(sketched_model(), tmp_path_factory.mktemp("served") / "packed", RestStorage("bfloat16", 8, 4))


@pytest.mark.parametrize("tied", [True, False])
def test_embedding_and_head_in_blocks_are_found(tmp_path: Path, tied: bool) -> None:
    served = checked_folder(pack(sketched_model(tied=tied), tmp_path / "packed", RestStorage("bfloat16", 8)))
    assert (served.embedding, served.head) == ("model.embed_tokens", "model.embed_tokens" if tied else "lm_head")


def test_embedding_and_head_as_floats_are_left_to_vllm(tmp_path: Path) -> None:
    served = checked_folder(pack(sketched_model(), tmp_path / "packed"))
    assert (served.embedding, served.head) == (None, None)


def flip(folder: Path) -> None:
    file = folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def cut(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def remove_a_tensor(folder: Path) -> None:
    rewrite(folder, **{"model.norm.weight": None})
    seal(folder)


def remove_the_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


@pytest.mark.parametrize("damage", [flip, cut, remove_a_tensor, remove_the_weights])
def test_a_damaged_folder_is_refused_as_by_load(folder: Path, tmp_path: Path, damage: object) -> None:
    damaged = copied(folder, tmp_path / "packed")
    damage(damaged)  # type: ignore[operator]
    with pytest.raises(PackedFormatError) as ours:
        checked_folder(damaged)
    with pytest.raises(PackedFormatError) as loads:
        usllm.load(damaged)
    assert str(ours.value) == str(loads.value)


def test_numbers_that_are_not_finite_are_refused(folder: Path, tmp_path: Path) -> None:
    damaged = copied(folder, tmp_path / "packed")
    norm = torch.full((64,), float("nan"), dtype=torch.bfloat16)
    rewrite(damaged, **{"model.norm.weight": norm})
    seal(damaged)
    with pytest.raises(PackedFormatError, match=r"model\.norm\.weight: holds numbers that are not finite"):
        checked_folder(damaged)
