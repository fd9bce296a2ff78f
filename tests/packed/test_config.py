"""``quantization_config``: what is written is read back; anything else is refused by the name of its key."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from hypothesis import given, settings
from strategies import configs

from usllm.packed.config import BlockEntry, PackedConfig, PackedLayerEntry
from usllm.sketch import SketchConfig
from usllm.system.errors import PackedFormatError

CONFIG = PackedConfig(
    SketchConfig(),
    {"model.layers.0.mlp.up_proj": PackedLayerEntry((160, 64), 700)},
    {"model.embed_tokens": BlockEntry((264, 64), 8)},
)
LAYER = ("layers", "model.layers.0.mlp.up_proj")
BLOCK = ("blocks", "model.embed_tokens")
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
def test_what_is_written_is_read_back_through_json(sketch: SketchConfig) -> None:
    config = PackedConfig(sketch, CONFIG.layers, CONFIG.blocks)
    assert PackedConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize("key", ["format_version", "hash_version"])
@pytest.mark.parametrize("value", [0, 2, 10**30, -1, 1.0, "1", None, True, [1], MISSING])
def test_unknown_version_is_refused_by_name(key: str, value: Any) -> None:
    refused(changed((key,), value), rf"^quantization_config\.{key}=.*this version of usllm reads 1; upgrade usllm")


@pytest.mark.parametrize("content", [{}, [], None, 3, "usllm", {"quant_method": "gptq"}, {"quant_method": ["usllm"]}])
def test_another_method_is_refused(content: Any) -> None:
    refused(content, r"^quantization_config: is not that of a packed usllm model")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hash", "sha256"),
        ("operator", "sum"),
        ("query", "median"),
        ("rounding", "up"),
        ("seed", -1),
        ("seed", 2**32),
        ("seed", 0.5),
        ("seed", True),
        ("seed", "0"),
        ("group_size", 0),
        ("group_size", 10**12),
        ("rows", 16),
        ("bits_per_weight", float("nan")),
        ("bits_per_weight", float("inf")),
        ("bits_per_weight", 10**400),
        ("bits_per_weight", "0.5"),
        ("bits_per_weight", True),
        ("output_scale", 1),
        ("output_scale", "yes"),
        ("operator", None),
        ("operator", ["absmaxmin"]),
        ("operator", "x" * 10**6),
        ("hash", {"balanced": 1}),
        ("min_importance", -1.0),
    ],
)
def test_impossible_constant_is_refused_by_name(key: str, value: Any) -> None:
    refused(changed(("sketch", key), value), rf"^quantization_config\.sketch\.{key}=")


@pytest.mark.parametrize("value", [None, [], "absmaxmin", {}, MISSING])
def test_sketch_that_is_no_object(value: Any) -> None:
    refused(changed(("sketch",), value), r"^quantization_config\.sketch: keys are missing or unknown")


@pytest.mark.parametrize("key", ["price_list", "price_exponent"])
def test_folder_from_before_an_option_was_there_is_read(key: str) -> None:
    assert PackedConfig.from_dict(changed(("sketch", key), MISSING)) == CONFIG


def test_missing_and_unknown_keys_are_named() -> None:
    refused(changed(("sketch", "seed"), MISSING), "seed")
    refused(changed(("sketch", "speed"), 1), "speed")


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
    refused(changed(("blocks", LAYER[1]), [160, 64, 8]), "is among the sketched layers too")


@pytest.mark.parametrize("key", ["layers", "blocks"])
@pytest.mark.parametrize("value", [None, [], "x", 3, MISSING])
def test_tables_that_are_no_objects(key: str, value: Any) -> None:
    refused(changed((key,), value), rf"^quantization_config\.{key}=.*: must be an object")


def test_model_without_sketched_layers() -> None:
    refused(changed(("layers",), {}), "names no sketched layer")


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
