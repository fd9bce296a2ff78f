"""FORMAT.md is enough to read a packed layer: a reader written from it alone decodes to the same bits."""

from __future__ import annotations

import ast
import dataclasses
import json
from pathlib import Path

import numpy as np
import numpy_reader
import pytest
import torch
from hypothesis import given, settings
from numpy_reader import decode, wrong_checksums
from strategies import layers
from tiny_packed import pack, sketched_model

import usllm
import usllm.packed
from usllm.compress.methods.sketch import SketchCompressor
from usllm.packed.config import FORMAT_VERSION
from usllm.packed.export import RestStorage
from usllm.packed.linear import packed_layers
from usllm.sketch import Plan, SketchConfig, project, query
from usllm.sketch.classes import ChannelClass
from usllm.sketch.hash import HASH_VERSION, HASHES
from usllm.sketch.layer_bytes import WIDTHS, pack_layer


def same_bits(found: np.ndarray, expected: torch.Tensor) -> bool:
    """Equal including the signs of zeros; both fp32 [out, in]."""
    return found.dtype == np.float32 and np.array_equal(found.view(np.int32), expected.numpy().view(np.int32))


def decode_from(folder: Path, name: str) -> np.ndarray:
    """A layer of a folder with one weight file, read without a library."""
    section = json.loads((folder / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    data = (folder / "model.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    begin, end = json.loads(data[8 : 8 + length])[f"{name}.packed"]["data_offsets"]
    rows, columns, size = section["layers"][name]
    assert end - begin == size
    return decode(data[8 + length + begin : 8 + length + end], (rows, columns), section["format"], name)


def decoded_by_reader(weight: torch.Tensor, plan: Plan) -> tuple[np.ndarray, torch.Tensor]:
    states = project(weight, plan)
    data = pack_layer(plan, states).numpy().tobytes()
    return decode(data, plan.shape, SketchCompressor(plan.config).format, plan.name), query(states, plan)


@given(layers())
@settings(max_examples=60, deadline=None)
def test_reader_decodes_what_was_projected(layer: tuple[torch.Tensor, Plan, torch.Tensor]) -> None:
    weight, plan, _ = layer
    assert same_bits(*decoded_by_reader(weight, plan))


@given(layers(operator="absmaxmin"))
@settings(max_examples=15, deadline=None)
def test_reader_knows_the_signed_query(layer: tuple[torch.Tensor, Plan, torch.Tensor]) -> None:
    weight, plan, _ = layer
    config = dataclasses.replace(plan.config, query="signed_max")
    assert same_bits(*decoded_by_reader(weight, Plan(plan.name, plan.shape, config, plan.classes, plan.channel_class)))


@pytest.mark.parametrize("operator", ["absmaxmin", "countmin", "mean"])
@pytest.mark.parametrize("hash_name", sorted(HASHES))
def test_reader_knows_every_width_in_one_layer(operator: str, hash_name: str) -> None:
    """Classes of all widths beside each other, few of which begin on a byte, groups of two sizes, an empty class."""
    config = SketchConfig(operator=operator, hash=hash_name, group_size=20, output_scale=True, seed=3)
    classes = (*(ChannelClass(1 + bits % 3, 3, bits) for bits in WIDTHS), ChannelClass(0, 0, 0))
    channel_class = torch.arange(31, dtype=torch.uint8) % len(classes)
    plan = Plan("model.layers.0.mlp.up_proj", (53, 31), config, classes, channel_class)
    weight = torch.randn(plan.shape, generator=torch.Generator().manual_seed(0))
    assert same_bits(*decoded_by_reader(weight, plan))


def test_reader_decodes_a_layer_of_an_exported_model(tmp_path: Path) -> None:
    model = sketched_model(allocation="waterfill", output_scale=True)
    folder = pack(model, tmp_path / "packed")
    loaded = packed_layers(usllm.load(folder))
    for name in ("model.layers.0.self_attn.k_proj", "model.layers.1.mlp.down_proj"):
        assert same_bits(decode_from(folder, name), loaded[name].decoded_weight())


def test_reader_is_short_and_imports_nothing_of_usllm() -> None:
    source = Path(numpy_reader.__file__).read_text(encoding="utf-8")
    imported = {
        (node.module or "") if isinstance(node, ast.ImportFrom) else node.names[0].name
        for node in ast.walk(ast.parse(source))
        if isinstance(node, (ast.Import, ast.ImportFrom))
    }
    assert imported == {"__future__", "json", "zlib", "typing", "numpy"}
    assert len(source.splitlines()) < 150


def test_page_names_the_versions_that_are_written() -> None:
    page = (Path(usllm.packed.__file__).parent / "FORMAT.md").read_text(encoding="utf-8")
    assert page.startswith(f"# The packed model, format version {FORMAT_VERSION}\n")
    assert f"\n# Method `sketch`, version {SketchCompressor.version}, hash version {HASH_VERSION}\n" in page
    assert all(f"`{key}`" in page for key in SketchCompressor(SketchConfig()).format)


@pytest.mark.parametrize("shards", [4_000_000_000, 20_000])
def test_reader_computes_the_checksums_of_an_exported_model(shards: int, tmp_path: Path) -> None:
    folder = pack(sketched_model(), tmp_path / "packed", RestStorage(embeddings=8), max_shard_size=shards)
    files = sorted(folder.glob("*.safetensors"))
    assert (len(files) > 1) == (shards == 20_000)
    for file in files:
        assert wrong_checksums(file.read_bytes(), (folder / "config.json").read_bytes()) == []
    damaged = files[0].read_bytes()[:-1] + b"\x55"
    assert len(wrong_checksums(damaged, (folder / "config.json").read_bytes())) == 1
    altered = (folder / "config.json").read_bytes().replace(b'"seed": 0', b'"seed": 1')
    assert "quantization_config.format.seed" in wrong_checksums(files[0].read_bytes(), altered)
