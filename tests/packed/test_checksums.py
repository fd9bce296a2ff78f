"""Nothing that is computed with is altered without a word: every tensor, and every key that gives them meaning."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from folder_files import header_of
from mutations import Files, with_header
from safetensors.torch import load_file
from tiny_packed import logits, pack, rewrite, sketched_model
from transformers import AutoModelForCausalLM

import usllm
from usllm.packed.export import RestStorage
from usllm.packed.folder import open_folder
from usllm.packed.inspection import inspect_folder
from usllm.packed.loading import check_against_model
from usllm.system.errors import PackedFormatError

UP, GATE = "model.layers.0.mlp.up_proj", "model.layers.0.mlp.gate_proj"
NORM, HEAD = "model.norm.weight", "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def valid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = sketched_model(output_scale=True)
    return pack(model, tmp_path_factory.mktemp("valid") / "packed", RestStorage("bfloat16", 8, 16))


@pytest.fixture
def folder(valid: Path, tmp_path: Path) -> Path:
    shutil.copytree(valid, tmp_path / "packed")
    return tmp_path / "packed"


def refused(folder: Path, named: str) -> None:
    """By ``usllm.load``, by what ``usllm-inspect`` checks, and by transformers alone; one message."""
    messages = []
    for read in (usllm.load, AutoModelForCausalLM.from_pretrained, _inspect):
        with pytest.raises(PackedFormatError, match=named) as raised:
            read(folder)
        messages.append(str(raised.value))
    assert len(set(messages)) == 1
    assert "\n" not in messages[0]


def _inspect(folder: Path) -> None:
    inspect_folder(folder)
    check_against_model(open_folder(folder))


# Tensors


def swapped(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {f"{UP}.packed": tensors[f"{GATE}.packed"], f"{GATE}.packed": tensors[f"{UP}.packed"]}


def flipped(name: str, bit: int) -> Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    def change(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        changed = tensors[name].flatten().view(torch.uint8).clone()
        changed[-1] ^= 1 << bit
        return {name: changed.view(tensors[name].dtype).view(tensors[name].shape)}

    return change


CHANGES: dict[str, tuple[Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]], str]] = {
    "swapped layers of one size": (swapped, GATE),
    "a bit of a layer": (flipped(f"{UP}.packed", 3), UP),
    "a bit of a norm": (flipped(NORM, 0), NORM),
    "a bit of a block": (flipped(HEAD, 0), HEAD),
    "a finite value": (lambda tensors: {NORM: tensors[NORM].index_fill(0, torch.tensor(5), 2.5)}, NORM),
    "minus zero for zero": (lambda tensors: {NORM: torch.zeros_like(tensors[NORM])}, NORM),
    "another type": (lambda tensors: {NORM: tensors[NORM].float()}, NORM),
    "another type of the same size": (lambda tensors: {NORM: tensors[NORM].view(torch.float16)}, NORM),
}


@pytest.mark.parametrize("change", CHANGES)
def test_altered_tensor_is_refused_by_name(change: str, folder: Path) -> None:
    alter, named = CHANGES[change]
    rewrite(folder, **alter(load_file(folder / "model.safetensors")))
    refused(folder, rf"^{named}: its checksum is wrong")


def test_tensor_without_a_checksum_is_refused_by_name(folder: Path) -> None:
    def forget(stored: dict[str, Any]) -> None:
        del stored["tensors"][NORM]

    edit_checksums(folder, forget)
    refused(folder, rf"^{NORM}: has no checksum in model\.safetensors")


def edit_checksums(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    files = Files.read(folder)
    header = json.loads(header_of(files))
    stored = json.loads(header["__metadata__"]["usllm"])
    change(stored)
    header["__metadata__"]["usllm"] = json.dumps(stored)
    Files(files.config, with_header(files.weights, json.dumps(header).encode())).write(folder)


@pytest.mark.parametrize("part", ["tensors", "keys", "meaning"])
def test_checksums_that_are_cut_are_refused(part: str, folder: Path) -> None:
    edit_checksums(folder, lambda stored: stored.pop(part))
    refused(folder, r"^model\.safetensors: its checksums cannot be read")


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 100_000, '{"tensors":1,"keys":2,"meaning":3}', "null"])
def test_checksums_that_are_none_are_refused(text: str, folder: Path) -> None:
    files = Files.read(folder)
    header = json.loads(header_of(files))
    header["__metadata__"]["usllm"] = text
    Files(files.config, with_header(files.weights, json.dumps(header).encode())).write(folder)
    refused(folder, r"^model\.safetensors: (its checksums cannot be read|its header of)")


def test_file_without_checksums_is_refused(folder: Path) -> None:
    files = Files.read(folder)
    header = json.loads(header_of(files))
    header["__metadata__"] = {"format": "pt"}
    Files(files.config, with_header(files.weights, json.dumps(header).encode())).write(folder)
    refused(folder, r"^model\.safetensors: has no checksums")


# Keys


FORMAT = [("seed", 1), ("hash", "uniform"), ("operator", "countmin"), ("query", "signed_max"), ("group_size", 65)]
MEANING = [
    ("rope_theta", 10001.0),
    ("rope_scaling", {"rope_type": "linear", "factor": 2.0}),
    ("partial_rotary_factor", 0.5),
    ("rms_norm_eps", 1.1e-6),
    ("hidden_act", "gelu"),
    ("attention_bias", True),
    ("max_position_embeddings", 4096),
    ("dtype", "float32"),
    ("architectures", ["LlamaModel"]),
    ("layer_types", ["full_attention", "sliding_attention"]),
]


@pytest.mark.parametrize(("key", "value"), FORMAT)
def test_altered_key_of_the_format_is_refused_by_name(key: str, value: Any, folder: Path) -> None:
    edit_config(folder, lambda content: content["quantization_config"]["format"].update({key: value}))
    refused(folder, rf"^quantization_config\.format\.{key}={value!r}: was changed")


@pytest.mark.parametrize(("key", "value"), MEANING)
def test_altered_key_of_the_configuration_is_refused_by_name(key: str, value: Any, folder: Path) -> None:
    edit_config(folder, lambda content: content.update({key: value}))
    refused(folder, rf"^config\.json: {key}=.*: was (changed|added)")


def test_removed_key_of_the_configuration_is_refused_by_name(folder: Path) -> None:
    edit_config(folder, lambda content: content.pop("rms_norm_eps"))
    refused(folder, r"^config\.json: rms_norm_eps: was removed")


@pytest.mark.parametrize(
    ("key", "value"),
    [("use_cache", False), ("transformers_version", "9.9"), ("pad_token_id", 3), ("attn_implementation", "eager")],
)
def test_keys_that_change_no_number_may_be_edited(key: str, value: Any, folder: Path, valid: Path) -> None:
    edit_config(folder, lambda content: content.update({key: value}))
    found, wanted = logits(usllm.load(folder, dtype=torch.float32)), logits(usllm.load(valid, dtype=torch.float32))
    assert torch.allclose(found, wanted, atol=1e-4) if key == "attn_implementation" else torch.equal(found, wanted)


def test_options_may_be_edited(folder: Path, valid: Path) -> None:
    edit_config(folder, lambda content: content["quantization_config"]["options"].update(note="mine", rows=99))
    assert torch.equal(logits(usllm.load(folder)), logits(usllm.load(valid)))


def edit_config(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads((folder / "config.json").read_text())
    change(content)
    (folder / "config.json").write_text(json.dumps(content))


def test_configuration_of_another_model_with_the_same_shapes_is_refused(folder: Path, tmp_path: Path) -> None:
    """Each is whole in itself, as after mixing two downloads."""
    model = sketched_model(output_scale=True)
    model.config.rms_norm_eps = 1e-5
    other = pack(model, tmp_path / "other", RestStorage("bfloat16", 8, 16))
    (folder / "config.json").write_bytes((other / "config.json").read_bytes())
    refused(folder, r"^config\.json: rms_norm_eps=1e-05: was changed")


def test_shard_of_another_model_with_the_same_shapes_is_refused(tmp_path: Path) -> None:
    model = sketched_model()
    pack(model, tmp_path / "one", max_shard_size=20_000)
    model.config.rms_norm_eps = 1e-5
    pack(model, tmp_path / "other", max_shard_size=20_000)
    shard = sorted((tmp_path / "one").glob("*.safetensors"))[1]
    shard.write_bytes((tmp_path / "other" / shard.name).read_bytes())
    refused(tmp_path / "one", r"^config\.json: rms_norm_eps=1e-06: was changed")
