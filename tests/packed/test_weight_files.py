"""Where transformers reads a packed model from: all files are found and checked, or it is said that they are not."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from folder_files import Files, header_of, with_header
from tiny_packed import pack, sketched_model

import usllm
from usllm.packed.folder import open_folder
from usllm.packed.weight_files import check_files, files_of
from usllm.system.errors import PackedFormatError


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model in one file and in shards."""
    root, model = tmp_path_factory.mktemp("folders"), sketched_model()
    return {
        "one": pack(model, root / "one"),
        "shards": pack(model, root / "shards", max_shard_size=30_000),
    }


def loading(place: object, revision: str | None = None) -> Any:
    """What is asked of a model that is being loaded."""
    return SimpleNamespace(config=SimpleNamespace(name_or_path=str(place), _commit_hash=revision))


@pytest.mark.parametrize("kind", ["one", "shards"])
def test_all_files_of_a_local_folder_are_found(kind: str, folders: dict[str, Path]) -> None:
    assert set(files_of(loading(folders[kind]), None)) == set(folders[kind].glob("*.safetensors"))


@pytest.mark.parametrize("kind", ["one", "shards"])
def test_all_files_of_a_downloaded_model_are_found_in_its_revision(
    kind: str, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def cached(repository: str, file: str, revision: str | None = None) -> str | None:
        assert (repository, revision) == ("owner/name", "abc")
        found = folders[kind] / file
        return str(found) if found.is_file() else None

    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", cached)
    assert set(files_of(loading("owner/name", "abc"), None)) == set(folders[kind].glob("*.safetensors"))


def test_files_that_transformers_names_are_taken(folders: dict[str, Path]) -> None:
    assert files_of(loading("owner/name"), ["/a/b.safetensors"]) == [Path("/a/b.safetensors")]


@pytest.mark.parametrize("place", ["nobody/nothing", "empty"])
def test_files_that_are_not_found_are_told(
    place: str, folders: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "empty").mkdir()
    model = loading(tmp_path / place if place == "empty" else place)
    assert files_of(model, None) == []
    with caplog.at_level(logging.WARNING):
        check_files([], open_folder(folders["one"]).packed, model)
    assert "checksums are not compared: use usllm.load" in caplog.text


def test_shards_that_meant_different_models_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(folders["shards"], tmp_path / "mixed")
    shard = sorted((tmp_path / "mixed").glob("*.safetensors"))[1]
    weights = shard.read_bytes()
    header = json.loads(header_of(Files(b"", weights)))
    stored = json.loads(header["__metadata__"]["usllm"])
    stored["meaning"]["config"]["head_dim"] = 32
    header["__metadata__"]["usllm"] = json.dumps(stored)
    shard.write_bytes(with_header(weights, json.dumps(header).encode()))
    with pytest.raises(PackedFormatError, match=rf"^{shard.name}: was stored with another model than model-00001-of"):
        usllm.load(tmp_path / "mixed")
