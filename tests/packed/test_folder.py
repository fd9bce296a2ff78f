"""A folder on disk: what is in it is accounted for to the byte, and what is wrong is named before it is read."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from packed_folders import CONFIG, LAYER, WEIGHTS, edit_json, refused
from safetensors.torch import load_file
from tiny_packed import rewrite, seal
from transformers import AutoModelForCausalLM

import usllm
from usllm.packed.folder import is_packed, open_folder
from usllm.packed.inspection import inspect_folder
from usllm.system.errors import PackedFormatError

# Accounting


@pytest.mark.parametrize("kind", ["one", "shards"])
def test_every_byte_is_accounted_for(made: Path, kind: str) -> None:
    folder = made / kind
    found = inspect_folder(folder)
    on_disk = sum(file.stat().st_size for file in folder.iterdir())
    assert found.accounted_bytes == found.disk_bytes == on_disk
    weights = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    assert found.weight_bytes == weights == found.sketched_bytes + found.rest_bytes + found.header_bytes
    assert found.sketched_bytes == sum(layer.bytes for layer in open_folder(folder).packed.layers.values())


def test_shards_hold_the_same_tensors_as_one_file(made: Path) -> None:
    assert len(list((made / "shards").glob("*.safetensors"))) > 2
    one, many = inspect_folder(made / "one"), inspect_folder(made / "shards")
    assert (one.layers, one.sketched_bytes, one.rest_bytes) == (many.layers, many.sketched_bytes, many.rest_bytes)
    assert sorted(tensor.name for tensor in one.rest) == sorted(tensor.name for tensor in many.rest)
    ids = torch.arange(12).view(1, 12)
    assert torch.equal(usllm.load(made / "one")(ids).logits, usllm.load(made / "shards")(ids).logits)


def test_other_files_are_accounted_for_and_change_nothing(folder: Path) -> None:
    before = inspect_folder(folder)
    (folder / "notes.txt").write_text("twelve bytes")
    (folder / "more").mkdir()
    (folder / "more" / "model.safetensors").write_bytes(b"123")
    (folder / "spare.safetensors").write_bytes(b"12345")
    after = inspect_folder(folder)
    added = {"notes.txt": 12, str(Path("more") / "model.safetensors"): 3, "spare.safetensors": 5}
    assert after.other_files == before.other_files | added
    assert after.weight_bytes == before.weight_bytes
    assert after.accounted_bytes == after.disk_bytes == before.disk_bytes + 20


# Files


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    refused(folder, rf"^{name}: is missing")


def test_folder_in_the_place_of_a_file(folder: Path) -> None:
    (folder / CONFIG).unlink()
    (folder / CONFIG).mkdir()
    refused(folder, r"^config\.json: is missing")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_pipe_in_the_place_of_a_file_does_not_hang(folder: Path) -> None:
    (folder / CONFIG).unlink()
    os.mkfifo(folder / CONFIG)
    refused(folder, r"^config\.json: is missing")


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("", "cannot be read"),
        ("{", "cannot be read"),
        ("[1]", "is not an object"),
        ("null", "is not an object"),
        ("\ufeff{}", "cannot be read"),
        ("[" * 200_000, "cannot be read"),
        ('{"a":' * 50_000 + "1" + "}" * 50_000, "cannot be read|not that of a packed"),
        ('{"a":' * 200 + "1" + "}" * 200, "nested deeper than 64 levels"),
        ('{"a":' + "[" * 100 + "]" * 100 + "}", "nested deeper than 64 levels"),
        ('{"quantization_config": ' + "9" * 10_000 + "}", "cannot be read"),
        ('{"quantization_config": NaN}', "not that of a packed usllm model"),
        (" " * (1 << 21), "has 2097152 bytes, too many for a description"),
    ],
)
def test_damaged_json_is_named(folder: Path, text: str, named: str) -> None:
    (folder / CONFIG).write_text(text, encoding="utf-8")
    refused(folder, rf"^(config\.json|quantization_config): .*({named})")
    assert not is_packed(folder)


def test_bytes_that_are_no_text(folder: Path) -> None:
    (folder / CONFIG).write_bytes(b"\xff\xfe{}")
    refused(folder, r"^config\.json: cannot be read")


def test_long_descriptions_need_long_weights(folder: Path) -> None:
    """JSON takes many times its size in memory, so its size is bounded by what it describes."""
    edit_json(folder / CONFIG, lambda content: content.update(padding="x" * (1 << 21)))
    refused(folder, r"^config\.json: has .* bytes, too many for a description")


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"", "cannot be read"),
        (b"\x00" * 7, "cannot be read"),
        (b"\x00" * 100, "cannot be read"),
        ((1 << 63).to_bytes(8, "little") + b"{}", "header of 9223372036854775808 bytes is too long"),
        ((1 << 22).to_bytes(8, "little") + b"{}", "header of 4194304 bytes is too long"),
        ((100).to_bytes(8, "little") + b"{}", "cannot be read"),
    ],
)
def test_damaged_weight_file_is_named(folder: Path, content: bytes, named: str) -> None:
    (folder / WEIGHTS).write_bytes(content)
    refused(folder, rf"^model\.safetensors: .*{named}")


@pytest.mark.parametrize("change", [-1, -5000, 1, 5000])
def test_weight_file_of_another_length(folder: Path, change: int) -> None:
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[:change] if change < 0 else data + b"\x00" * change)
    refused(folder, r"^model\.safetensors: cannot be read")


def test_tensor_names_that_a_terminal_would_obey(folder: Path) -> None:
    rewrite(folder, **{"\x1b[2J": torch.zeros(1)})
    refused(folder, r"^model\.safetensors: '\\x1b\[2J' is no name of a tensor$")


# Tensors


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({f"{LAYER}.packed": None}, rf"^{LAYER}\.packed: is missing"),
        ({"model.embed_tokens.weight": None}, r"^model\.embed_tokens\.weight: is missing"),
        ({f"{LAYER}.packed": torch.zeros(10, dtype=torch.uint8)}, rf"^{LAYER}\.packed: is U8 \[10\], expected U8 \["),
        ({f"{LAYER}.packed": torch.zeros(2558)}, rf"^{LAYER}\.packed: is F32"),
        ({f"{LAYER}.packed": torch.zeros(2558, 1, dtype=torch.uint8)}, rf"^{LAYER}\.packed: is U8 \[2558, 1\]"),
        ({"model.embed_tokens.weight": torch.zeros(264, 64)}, r"^model\.embed_tokens\.weight: is F32 \[264, 64\]"),
        (
            {"model.embed_tokens.weight": torch.zeros(264, 67, dtype=torch.uint8)},
            r"^model\.embed_tokens\.weight: is U8",
        ),
    ],
)
def test_missing_and_misshaped_tensors_are_named(
    folder: Path, changes: dict[str, torch.Tensor | None], named: str
) -> None:
    rewrite(folder, **changes)
    seal(folder)
    refused(folder, named)


def test_damaged_layer_is_named(folder: Path) -> None:
    packed = load_file(folder / WEIGHTS)[f"{LAYER}.packed"]
    packed[40] ^= 1
    rewrite(folder, **{f"{LAYER}.packed": packed})
    refused(folder, rf"^{LAYER}: its checksum is wrong")


@pytest.mark.parametrize("scale", [b"\x00\x7e", b"\x00\x7c", b"\x00\xfc"])
def test_block_scale_that_is_not_finite_is_named(folder: Path, scale: bytes) -> None:
    for name in ("model.embed_tokens", "model.layers.1.self_attn.o_proj"):
        weight = load_file(folder / WEIGHTS)[f"{name}.weight"]
        weight[-1, :2] = torch.tensor(list(scale), dtype=torch.uint8)
        rewrite(folder, **{f"{name}.weight": weight})
    seal(folder)
    refused(folder, r"^model\.embed_tokens(\.weight)?: 1 of 528 block scales are not finite")


def test_type_that_no_packed_model_uses(folder: Path) -> None:
    rewrite(folder, **{"model.norm.weight": torch.zeros(64, dtype=torch.complex64)})
    seal(folder)
    with pytest.raises(PackedFormatError, match=r"model\.norm\.weight: has the type C64|model\.safetensors: cannot be"):
        inspect_folder(folder)


# Nothing runs code


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("attn_implementation", "someone/kernels"),
        ("_attn_implementation", "someone/kernels:attention"),
        ("attn_implementation", "paged|someone/kernels"),
        ("attn_implementation", {"text_config": "someone/kernels"}),
        ("experts_implementation", "someone/kernels"),
        ("text_config", {"attn_implementation": "someone/kernels"}),
        ("auto_map", {"AutoModelForCausalLM": "modeling.Model"}),
        ("text_config", {"auto_map": {"AutoConfig": "modeling.Config"}}),
        ("transformers_weights", "spare.safetensors"),
        ("transformers_weights", "../elsewhere/model.safetensors"),
        ("fusion_config", {"patch": True}),
    ],
)
def test_configuration_that_would_fetch_code_or_other_weights(folder: Path, key: str, value: Any) -> None:
    edit_json(folder / CONFIG, lambda content: content.update({key: value}))
    refused(folder, r"^config\.json: .* could fetch and run code; it is refused")


@pytest.mark.parametrize("value", ["eager", "sdpa", None])
def test_built_in_attention_is_no_code(folder: Path, value: str | None) -> None:
    edit_json(folder / CONFIG, lambda content: content.update(attn_implementation=value))
    usllm.load(folder)


def test_adapter_beside_the_model_is_refused(folder: Path) -> None:
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "someone/else"}')
    refused(folder, r"^adapter_config\.json: ")


def test_code_beside_the_model_is_left_alone_or_refused(folder: Path, tmp_path: Path) -> None:
    trap = f"import pathlib; pathlib.Path({str(tmp_path / 'ran')!r}).touch()\n"
    for name in ("modeling_llama.py", "configuration_llama.py", "__init__.py"):
        (folder / name).write_text(trap)
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    usllm.load(folder)(torch.arange(4).view(1, 4))
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(trap)
    refused(folder, r"^custom_generate: holds code")
    with pytest.raises(PackedFormatError, match=r"^custom_generate: holds code"):
        AutoModelForCausalLM.from_pretrained(folder)
    assert not (tmp_path / "ran").exists()
