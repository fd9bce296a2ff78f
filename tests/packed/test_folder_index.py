"""The index of a folder in shards: it names all tensors where they are, and leads nowhere else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from packed_folders import INDEX, LAYER, edit_json, refused


@pytest.mark.parametrize(
    "file",
    [
        "../x.safetensors",
        "/etc/x.safetensors",
        "more/x.safetensors",
        "..",
        "",
        "model.bin",
        "x.safetensors\0",
        "\0.safetensors",
        "\ud800.safetensors",
        None,
        3,
        ["x.safetensors"],
        "x" * 300 + ".safetensors",
        "nowhere.safetensors",
    ],
)
def test_index_leads_nowhere_else(shards: Path, file: Any) -> None:
    def lead_away(content: dict[str, Any]) -> None:
        content["weight_map"][f"{LAYER}.packed"] = file

    edit_json(shards / INDEX, lead_away)
    refused(shards, r"^(model\.safetensors\.index\.json: .* no weight file here|nowhere.safetensors: is missing)")


@pytest.mark.parametrize("content", [{}, {"weight_map": {}}, {"weight_map": []}, {"weight_map": None}, []])
def test_index_without_a_table(shards: Path, content: Any) -> None:
    (shards / INDEX).write_text(json.dumps(content))
    refused(shards, rf"^{INDEX}: (has no weight_map|is not an object)")


def test_index_that_lists_other_tensors(shards: Path) -> None:
    def swap(content: dict[str, Any]) -> None:
        table = content["weight_map"]
        name = next(name for name in table if table[name] != table[f"{LAYER}.packed"])
        table[name], table[f"{LAYER}.packed"] = table[f"{LAYER}.packed"], table[name]

    edit_json(shards / INDEX, swap)
    refused(shards, rf"^{INDEX}: does not list the tensors of model-")


def test_index_that_forgets_or_invents_a_tensor(shards: Path) -> None:
    edit_json(shards / INDEX, lambda content: content["weight_map"].pop(f"{LAYER}.packed"))
    refused(shards, rf"^{INDEX}: does not list the tensors of model-.*{LAYER}\.packed")
    edit_json(shards / INDEX, lambda content: content["weight_map"].update({"a b": "model-00001-of-00002.safetensors"}))
    refused(shards, rf"^{INDEX}: 'a b' is said to be in")


def test_missing_shard_is_named(shards: Path) -> None:
    shard = sorted(shards.glob("*.safetensors"))[1]
    shard.unlink()
    refused(shards, rf"^{shard.name}: is missing")
