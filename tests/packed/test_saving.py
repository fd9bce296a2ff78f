"""``from_pretrained`` then ``save_pretrained`` writes a folder that is whole again, under either transformers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from packaging.version import Version
from safetensors import safe_open
from test_quantizer import tensors_of
from tiny_packed import logits, pack, sketched_model
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

import usllm
from usllm.compress import compress_
from usllm.packed.checksums import Checksums
from usllm.packed.export import ModelFiles, RestStorage, export
from usllm.packed.folder import open_folder
from usllm.packed.inspection import inspect_folder
from usllm.packed.linear import packed_layers
from usllm.packed.loading import check_against_model
from usllm.packed.source import from_model
from usllm.sketch import SketchConfig

OLD = Version(transformers.__version__).major < 5
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """Folders with embeddings in blocks of 8 bits, by whether the head is tied to them."""
    root = tmp_path_factory.mktemp("packed")
    rest = RestStorage("bfloat16", 8, 16)
    return {tied: pack(sketched_model(tied=tied), root / str(tied), rest) for tied in (True, False)}


def whole(folder: Path) -> Path:
    """As ``usllm-inspect`` checks it."""
    found = inspect_folder(folder)
    check_against_model(open_folder(folder))
    assert found.accounted_bytes == found.disk_bytes
    return folder


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("shard", ["5GB", "30KB"])
def test_saved_folder_is_whole_and_computes_the_same(
    dtype: torch.dtype, tied: bool, shard: str, packed: dict[bool, Path], tmp_path: Path
) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(packed[tied], dtype=dtype)
    loaded.save_pretrained(tmp_path / "again", max_shard_size=shard)
    assert (len(list((tmp_path / "again").glob("*.safetensors"))) > 1) == (shard == "30KB")
    again = usllm.load(whole(tmp_path / "again"))
    assert again.dtype == dtype
    assert torch.equal(logits(again), logits(loaded))


def test_every_shard_carries_the_checksums_of_its_tensors(packed: dict[bool, Path], tmp_path: Path) -> None:
    loaded = usllm.load(packed[True])
    loaded.save_pretrained(tmp_path / "again", max_shard_size="30KB")
    for file in (tmp_path / "again").glob("*.safetensors"):
        with safe_open(file, framework="pt") as content:
            assert set(content.keys()) <= set(Checksums.from_metadata(content.metadata(), file.name).tensors)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_exported_and_saved_folders_hold_the_same_checksums(architecture: str, tmp_path: Path) -> None:
    """What is worked out before saving is what an export reads from the files that it wrote."""
    folder = pack(sketched_model(architecture), tmp_path / "packed", RestStorage("float32"))
    usllm.load(folder).save_pretrained(tmp_path / "again")
    ours, theirs = (open_folder(place).checksums["model.safetensors"] for place in (folder, tmp_path / "again"))
    assert {name: theirs.tensors[name] for name in ours.tensors} == dict(ours.tensors)
    assert ours.meaning["rotary"] == theirs.meaning["rotary"]
    assert tensors_of(folder).keys() == tensors_of(tmp_path / "again").keys()


def test_changed_weights_and_configuration_are_saved_with_checksums_of_their_own(tmp_path: Path) -> None:
    loaded = usllm.load(pack(sketched_model(), tmp_path / "packed", RestStorage("float32")))
    with torch.no_grad():
        loaded.model.norm.weight.mul_(2.0)
    loaded.config.rms_norm_eps = 1e-3  # of the next load
    loaded.save_pretrained(tmp_path / "again")
    again = usllm.load(whole(tmp_path / "again"))
    assert again.model.norm.variance_epsilon == 1e-3
    assert torch.equal(again.model.norm.weight, loaded.model.norm.weight)


def test_settings_of_the_caller_are_no_damage(packed: dict[bool, Path]) -> None:
    """What is asked of ``from_pretrained`` on top of a whole folder has its effect."""
    folder = packed[True]
    asked = AutoModelForCausalLM.from_pretrained(folder, rms_norm_eps=1e-3)
    assert asked.model.norm.variance_epsilon == 1e-3
    assert not torch.equal(logits(asked), logits(AutoModelForCausalLM.from_pretrained(folder)))


def test_older_forms_of_rotary_parameters_are_saved_too(packed: dict[bool, Path], tmp_path: Path) -> None:
    usllm.load(packed[True]).save_pretrained(tmp_path / "again")
    content = json.loads((tmp_path / "again" / "config.json").read_text())
    assert content["rope_theta"] == 10000.0


@pytest.mark.skipif(OLD, reason="transformers 4 cannot save buffers that are offloaded")
def test_offloaded_layers_are_saved_with_their_checksums(tmp_path: Path) -> None:
    folder = pack(sketched_model(), tmp_path / "packed", RestStorage("float32"))
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    places |= {"model.layers.0": "cpu", "model.layers.1": "disk"}
    loaded = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, device_map=places, offload_folder=tmp_path / "offload", offload_buffers=True
    )
    loaded.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(usllm.load(whole(tmp_path / "again"))), logits(sketched_model()))


def test_pickles_are_not_written(packed: dict[bool, Path]) -> None:
    """They have no header for checksums, and run code when they are read."""
    quantizer = usllm.load(packed[True]).hf_quantizer
    assert not quantizer.is_serializable(safe_serialization=False)
    assert quantizer.is_serializable(safe_serialization=True)
    assert quantizer.is_serializable()


def test_mixture_of_experts_is_saved_under_the_names_it_was_stored_under(tmp_path: Path) -> None:
    """transformers 5 renames experts when it saves; the folder's names are the model's own."""
    sizes = {"vocab_size": 264, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4, "head_dim": 16}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = MixtralForCausalLM(MixtralConfig(**sizes, **heads)).eval()
    compress_(model, SketchConfig(bits_per_weight=2.0, rows=2, group_size=64))
    export(from_model(model), ModelFiles(model.config), tmp_path / "packed", rest=RestStorage("float32"))
    loaded = usllm.load(tmp_path / "packed")
    assert packed_layers(loaded)
    loaded.save_pretrained(tmp_path / "again")
    assert tensors_of(tmp_path / "again").keys() == tensors_of(tmp_path / "packed").keys()
    assert torch.equal(logits(usllm.load(whole(tmp_path / "again"))), logits(loaded))
