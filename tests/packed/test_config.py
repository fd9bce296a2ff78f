"""``quantization_config``: what is written is read back; anything else is refused by the name of its key."""

from __future__ import annotations

import copy
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from strategies import configs

from usllm.compress.methods.sketch import SketchCompressor
from usllm.packed.config import BlockEntry, PackedConfig, PackedLayerEntry
from usllm.sketch import SketchConfig
from usllm.system.errors import PackedFormatError

CONFIG = PackedConfig(
    SketchCompressor(SketchConfig()),
    {"model.layers.0.mlp.up_proj": PackedLayerEntry((160, 64), 700)},
    {"model.embed_tokens": BlockEntry((264, 64), 8)},
)
LAYER = ("layers", "model.layers.0.mlp.up_proj")
BLOCK = ("blocks", "model.embed_tokens")
CONSTANTS = ("operator", "query", "hash", "group_size", "output_scale", "seed")
MISSING = object()


def changed(path: tuple[str, ...], value: Any) -> dict[str, Any]:
    content = copy.deepcopy(CONFIG.to_dict())
    section: Any = content
    for key in path[:-1]:
        section = section[key]
    if value is MISSING:
        del section[path[-1]]
    else:
        section[path[-1]] = value
    return content


def refused(content: Any, named: str) -> None:
    with pytest.raises(PackedFormatError, match=named) as raised:
        PackedConfig.from_dict(content)
    assert len(str(raised.value)) < 600  # whatever the file held


@given(configs())
@settings(max_examples=30)
@pytest.mark.parametrize("version", [1, 2])
def test_what_is_written_is_read_back_through_json(version: int, sketch: SketchConfig) -> None:
    config = PackedConfig(SketchCompressor(sketch), CONFIG.layers, CONFIG.blocks, format_version=version)
    read = PackedConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert (read.to_dict(), read.format, read.layers) == (config.to_dict(), config.format, config.layers)
    assert read.compressor.options == dataclasses.replace(
        SketchConfig(), **{key: getattr(sketch, key) for key in CONSTANTS}
    )


def test_version_1_becomes_version_2_with_the_same_content() -> None:
    old = PackedConfig.from_dict(dataclasses.replace(CONFIG, format_version=1).to_dict())
    assert set(old.to_dict()) == {"quant_method", "format_version", "hash_version", "sketch", "layers", "blocks"}
    new = PackedConfig.from_dict(CONFIG.to_dict())
    assert dataclasses.replace(old.upgraded(), options=new.options) == new
    assert old.options.items() <= new.options.items()  # options that are younger than version 1 are not made up


WRONG_VERSIONS = [0, 3, 10**30, -1, 1.0, "1", None, True, [1], MISSING]


@pytest.mark.parametrize("path", [("format_version",), ("method_version",), ("format", "hash_version")])
@pytest.mark.parametrize("value", WRONG_VERSIONS)
def test_unknown_version_is_refused_by_name(path: tuple[str, ...], value: Any) -> None:
    key = r"\.".join(path)
    problem = r"=.*this version of usllm reads 1( to 2)?; upgrade usllm|: is missing"
    refused(changed(path, value), rf"^quantization_config\.{key}({problem})")


@pytest.mark.parametrize("value", [0, 2, 10**30, "1", None, MISSING])
def test_unknown_hash_version_of_version_1(value: Any) -> None:
    content = dataclasses.replace(CONFIG, format_version=1).to_dict()
    content["hash_version"] = value
    refused(content, r"^quantization_config\.hash_version=.*this version of usllm reads 1; upgrade usllm")


def test_method_and_plug_in_that_are_not_here_are_named_and_nothing_is_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "trap_of_a_stranger.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    content = changed(("method",), "lattice")
    refused(content, r"^quantization_config\.method='lattice': is not among littlebit, rounding, sketch; upgrade usllm")
    content["plugin"] = "trap_of_a_stranger"
    refused(content, r"method='lattice': .*it comes with the plug-in trap_of_a_stranger: .* import it first")
    assert "trap_of_a_stranger" not in sys.modules
    PackedConfig.from_dict({**CONFIG.to_dict(), "plugin": "trap_of_a_stranger"})  # a method that is here needs none
    assert "trap_of_a_stranger" not in sys.modules


@pytest.mark.parametrize("value", ["", "a b", "../up", "a/b", 3, ["a"], "x" * 300])
def test_plug_in_that_is_no_name(value: Any) -> None:
    refused(changed(("plugin",), value), r"^quantization_config\.plugin=.*is no name of a package")


@pytest.mark.parametrize("path", [("speed",), ("format", "speed"), ("hash_version",)])
def test_unknown_key_of_the_format_is_refused_by_name(path: tuple[str, ...]) -> None:
    refused(changed(path, 1), rf"^quantization_config.*{path[-1]}.*unknown.*upgrade usllm")


@pytest.mark.parametrize("options", [{"novelty": {"a": [1]}}, {"bits_per_weight": "any", "rows": 99}, {}])
def test_options_are_kept_and_change_nothing(options: dict[str, Any]) -> None:
    read = PackedConfig.from_dict(changed(("options",), options))
    assert read.to_dict()["options"] == options
    assert (read.compressor.options, read.format) == (SketchConfig(), CONFIG.format)


@pytest.mark.parametrize("value", [None, [], "x", 3, MISSING])
def test_options_that_are_no_object(value: Any) -> None:
    refused(changed(("options",), value), r"^quantization_config\.options=.*: must be an object")


@pytest.mark.parametrize("content", [{}, [], None, 3, "usllm", {"quant_method": "gptq"}, {"quant_method": ["usllm"]}])
def test_another_method_is_refused(content: Any) -> None:
    refused(content, r"^quantization_config: is not that of a packed usllm model")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hash", "sha256"),
        ("operator", "sum"),
        ("query", "median"),
        ("seed", -1),
        ("seed", 2**32),
        ("seed", 0.5),
        ("seed", True),
        ("seed", "0"),
        ("group_size", 0),
        ("group_size", 10**12),
        ("output_scale", 1),
        ("output_scale", "yes"),
        ("operator", None),
        ("operator", ["absmaxmin"]),
        ("operator", "x" * 10**6),
        ("hash", {"balanced": 1}),
    ],
)
@pytest.mark.parametrize("version", [1, 2])
def test_impossible_constant_is_refused_by_name(version: int, key: str, value: Any) -> None:
    content = dataclasses.replace(CONFIG, format_version=version).to_dict()
    section = {1: "sketch", 2: "format"}[version]
    content[section][key] = value
    refused(content, rf"^quantization_config\.{section}\.{key}=")


@pytest.mark.parametrize("value", [None, [], "absmaxmin", MISSING])
def test_format_that_is_no_object(value: Any) -> None:
    refused(changed(("format",), value), r"^quantization_config\.format=.*: must be an object")


@pytest.mark.parametrize("value", [None, [], "absmaxmin", {}])
def test_sketch_of_version_1_that_is_no_object(value: Any) -> None:
    content = dataclasses.replace(CONFIG, format_version=1).to_dict() | {"sketch": value}
    refused(content, r"^quantization_config\.sketch: keys are missing or unknown")


@pytest.mark.parametrize("key", ["seed", "operator", "output_scale"])
def test_missing_key_is_named(key: str) -> None:
    refused(changed(("format", key), MISSING), rf"^quantization_config\.format\.{key}: is missing$")


@pytest.mark.parametrize("path", [LAYER, BLOCK])
@pytest.mark.parametrize(
    "value",
    [
        [0, 64, 700],
        [-160, 64, 700],
        [160, 64, -1],
        [160, 64, 0],
        [160, 64],
        [160, 64, 700, 1],
        [160.0, 64, 700],
        [True, 64, 700],
        ["160", 64, 700],
        [10**30, 1, 700],
        [1 << 21, 1, 700],
        [[160], 64, 700],
        {"out": 160},
        None,
        "160x64",
    ],
)
def test_impossible_entry_is_refused_by_name(path: tuple[str, str], value: Any) -> None:
    refused(changed(path, value), rf"^quantization_config\.{path[0]}\.'?{path[1]}")


@pytest.mark.parametrize("size", [10, 10**4 * 64, 1 << 62])
def test_bytes_that_no_layer_of_the_shape_has(size: int) -> None:
    refused(changed(LAYER, [160, 64, size]), r"^quantization_config\.layers\.model\.layers\.0\.mlp\.up_proj: .*bytes")


def test_few_bytes_cannot_ask_for_any_amount_of_decoded_memory() -> None:
    refused(changed(LAYER, [1 << 20, 1 << 20, 1000]), "1000 bytes for .* are impossible")
    PackedConfig.from_dict(changed(LAYER, [1 << 10, 1 << 10, 11]))  # small layers may be empty


@pytest.mark.parametrize("bits", [1, 2, 16, 700])
def test_blocks_of_another_width(bits: int) -> None:
    refused(changed(BLOCK, [264, 64, bits]), rf"model\.embed_tokens: {bits} bits are not 4 or 8")


def test_layer_that_is_sketched_and_in_blocks() -> None:
    refused(changed(("blocks", LAYER[1]), [160, 64, 8]), "is among the compressed layers too")


@pytest.mark.parametrize("key", ["layers", "blocks"])
@pytest.mark.parametrize("value", [None, [], "x", 3, MISSING])
def test_tables_that_are_no_objects(key: str, value: Any) -> None:
    refused(changed((key,), value), rf"^quantization_config\.{key}=.*: must be an object")


def test_model_without_sketched_layers() -> None:
    refused(changed(("layers",), {}), "names no compressed layer")


@pytest.mark.parametrize(
    "name", ["", ".", "a..b", "../up", "a/b", "a b", "a\n", "\x1b[2J", "\ud800", "ä", "x" * 257, "a." * 200 + "b"]
)
@pytest.mark.parametrize("section", ["layers", "blocks"])
def test_names_that_no_module_has(section: str, name: str) -> None:
    content = changed((section, name), [160, 64, 700 if section == "layers" else 8])
    refused(content, rf"^quantization_config\.{section}\..*is impossible")
    with pytest.raises(PackedFormatError) as raised:
        PackedConfig.from_dict(content)
    assert str(raised.value).isprintable()


def test_value_nested_too_deep_to_print() -> None:
    nested: Any = []
    for _ in range(100_000):
        nested = [nested]
    refused(changed(("layers",), nested), r"^quantization_config\.layers=list: must be an object")
