"""Decoded folders: the compressed model's logits in a folder that needs no usllm, written whole or not at all."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from every_method import compressor_of
from on_disk import most_held
from tiny_packed import IDS, logits, pack, random_config, sketched_model
from transformers import AutoModelForCausalLM, PretrainedConfig

import usllm
from usllm.compress import compress_
from usllm.models import ModelSpec
from usllm.models.loading import load_dense, load_tokenizer
from usllm.packed.decoded import DecodedModel, decode_folder, decode_source
from usllm.packed.dense import DecodedSize, export_dense
from usllm.packed.description import ModelFiles
from usllm.packed.export import RestStorage
from usllm.packed.new_folder import is_decoded
from usllm.packed.source import PackingSource, from_model
from usllm.system.errors import PackedFormatError, UserError


def files(config: Any = None) -> ModelFiles:
    return ModelFiles(config or random_config(), load_tokenizer(ModelSpec(kind="random", name="llama")))


def decode(model: DecodedModel, out: Path, dtype: str = "float32", **options: Any) -> DecodedSize:
    return export_dense(model, files(options.pop("config", None)), out, dtype=dtype, **options)


def read(folder: Path, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return logits(AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval())


@pytest.mark.parametrize("operator", ["absmaxmin", "mean"])
def test_logits_in_fp32_are_those_of_the_compressed_model_to_the_last_bit(operator: str, tmp_path: Path) -> None:
    model = sketched_model(operator=operator)
    decode(decode_source(from_model(model)), tmp_path / "dense")
    assert torch.equal(read(tmp_path / "dense"), logits(model))


@pytest.mark.parametrize("name, options", [("rounding", {"bits": 2}), ("littlebit", {"bits_per_weight": 1.5})])
def test_other_methods_decode_too(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    model = load_dense(ModelSpec(kind="random", name="llama"))
    compress_(model, compressor_of(name, options))
    decode(decode_source(from_model(model.eval())), tmp_path / "dense")
    torch.testing.assert_close(read(tmp_path / "dense"), logits(model), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rest", [RestStorage("float32"), RestStorage(), RestStorage("bfloat16", 8, 4)])
def test_packed_folder_decodes_to_the_model_that_it_is(rest: RestStorage, tmp_path: Path) -> None:
    packed = pack(sketched_model(), tmp_path / "packed", rest)
    with decode_folder(packed) as model:
        decode(model, tmp_path / "dense")
    # Products with blocks of 8 and 4 bits add up in another order than those of decoded weights.
    wanted = logits(usllm.load(packed, dtype=torch.float32))
    torch.testing.assert_close(read(tmp_path / "dense"), wanted, rtol=1e-5, atol=1e-5)
    if rest.embeddings == 16:
        assert torch.equal(read(tmp_path / "dense"), wanted)


def test_shards_hold_the_same_model_as_one_file(tmp_path: Path) -> None:
    model = decode_source(from_model(sketched_model()))
    decode(model, tmp_path / "one")
    decode(model, tmp_path / "shards", max_shard_size=40_000)
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 3
    assert torch.equal(read(tmp_path / "shards"), read(tmp_path / "one"))


def test_decoded_weights_are_rounded_once(tmp_path: Path) -> None:
    model = sketched_model()
    decode(decode_source(from_model(model)), tmp_path / "exact")
    decode(decode_source(from_model(model)), tmp_path / "rounded", "bfloat16")
    exact, rounded = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("exact", "rounded"))
    for name, tensor in exact.state_dict().items():
        assert torch.equal(rounded.state_dict()[name], tensor.to(torch.bfloat16)), name


def test_folder_is_read_without_usllm_and_says_that_it_is_dense(tmp_path: Path) -> None:
    size = decode(decode_source(from_model(sketched_model())), tmp_path / "dense", card=lambda path, size: "card")
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())
    assert {"generation_config.json", "tokenizer.json", "README.md"} <= {f.name for f in (tmp_path / "dense").iterdir()}
    script = (
        "import sys, torch\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1])\nAutoTokenizer.from_pretrained(sys.argv[1])\n"
        "assert 'usllm' not in sys.modules\ntorch.save(model(torch.arange(40).view(2, 20)).logits, sys.argv[2])\n"
    )
    result = tmp_path / "logits.pt"
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "dense"), str(result)], check=True, timeout=200)
    assert torch.equal(torch.load(result, weights_only=True), read(tmp_path / "dense"))
    assert IDS.shape == (2, 20)
    assert size.weight_bytes == (tmp_path / "dense" / "model.safetensors").stat().st_size


def test_size_compares_with_the_packed_folder_that_is_read(tmp_path: Path) -> None:
    model = sketched_model()
    packed = pack(model, tmp_path / "packed")
    with decode_folder(packed) as decoded:
        from_folder = decode(decoded, tmp_path / "a")
    unwritten = decode(decode_source(from_model(model)), tmp_path / "b")
    assert from_folder.packed_bytes == (packed / "model.safetensors").stat().st_size
    header = from_folder.packed_bytes - unwritten.packed_bytes  # only a written file has one
    assert 0 < header < 20_000
    assert f"{from_folder.packed_bytes:,} of the packed form" in from_folder.sentence()
    assert "bits per weight are gone" in from_folder.sentence()


def test_memory_does_not_grow_with_the_number_of_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shard = 80_000  # bytes

    def written(source: PackingSource, config: PretrainedConfig) -> None:
        out = tmp_path / str(config.num_hidden_layers)
        decode(decode_source(source), out, config=config, max_shard_size=shard)

    few, many = (most_held(layers, written, monkeypatch) for layers in (2, 8))
    assert many[0] <= few[0]
    assert few[1] <= shard
    assert many[1] <= shard


def test_only_a_folder_decoded_here_is_ever_replaced(tmp_path: Path) -> None:
    model = decode_source(from_model(sketched_model()))
    theirs = tmp_path / "theirs"
    load_dense(ModelSpec(kind="random", name="llama")).save_pretrained(theirs)
    packed = pack(sketched_model(), tmp_path / "packed")
    for place in (theirs, packed):
        with pytest.raises(UserError, match="is not a dense model written by usllm-export: it is never replaced"):
            decode(model, place, overwrite=True)
    decode(model, tmp_path / "dense")
    assert is_decoded(tmp_path / "dense")
    assert not is_decoded(theirs)
    with pytest.raises(UserError, match="overwrite=true"):
        decode(model, tmp_path / "dense")
    decode(model, tmp_path / "dense", overwrite=True)
    with pytest.raises(UserError, match="is not a packed model"):
        pack(sketched_model(), tmp_path / "dense", overwrite=True)


def test_nothing_stays_where_a_tensor_is_missing(tmp_path: Path) -> None:
    source = from_model(sketched_model())
    tensors = {name: tensor for name, tensor in source.tensors.items() if name != "model.norm.weight"}
    with pytest.raises(UserError, match=r"model\.norm\.weight: is in the model's configuration"):
        decode(decode_source(PackingSource(tensors, source.plans, source.compressor)), tmp_path / "dense")
    assert list(tmp_path.iterdir()) == []


def test_damaged_packed_folder_is_not_decoded(tmp_path: Path) -> None:
    packed = pack(sketched_model(), tmp_path / "packed")
    content = bytearray((packed / "model.safetensors").read_bytes())
    content[-5] ^= 1
    (packed / "model.safetensors").write_bytes(content)
    with pytest.raises(PackedFormatError), decode_folder(packed) as model:
        decode(model, tmp_path / "dense")
    assert not (tmp_path / "dense").exists()
