"""Packed models through transformers' own functions, on whichever version is installed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_packed import IDS, logits, pack, rewrite, sketched_model
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, pipeline

from usllm.models import ModelSpec
from usllm.models.loading import load_dense
from usllm.packed.block_layers import BlockLinear
from usllm.packed.export import RestStorage
from usllm.packed.linear import PackedLinear, packed_layers
from usllm.system.errors import PackedFormatError

EXACT = RestStorage("float32")
STORAGES = [EXACT, RestStorage(), RestStorage("bfloat16", 8, 8), RestStorage("float16", 4, 16)]


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder, of whichever shards."""
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [True, False])
def test_logits_are_those_of_the_sketched_model_bit_for_bit(architecture: str, tied: bool, tmp_path: Path) -> None:
    model = sketched_model(architecture, tied)
    folder = pack(model, tmp_path / "packed", EXACT)
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert torch.equal(logits(loaded), logits(model))


def test_logits_survive_two_processes_that_load_and_save(tmp_path: Path) -> None:
    model = sketched_model()
    folder = pack(model, tmp_path / "packed", EXACT)
    script = (
        "import sys, torch, usllm\n"
        "from transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)\n"
        "model.save_pretrained(sys.argv[2])\n"
    )
    for source, target in (("packed", "second"), ("second", "third")):
        arguments = [sys.executable, "-c", script, str(tmp_path / source), str(tmp_path / target)]
        subprocess.run(arguments, check=True, capture_output=True, timeout=120)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "third", dtype=torch.float32)
    assert torch.equal(logits(loaded), logits(model))
    first, third = tensors_of(folder), tensors_of(tmp_path / "third")
    assert first.keys() == third.keys()
    assert all(torch.equal(first[name], third[name]) and first[name].dtype == third[name].dtype for name in first)


@pytest.mark.parametrize("rest", STORAGES)
@pytest.mark.parametrize("tied", [True, False])
def test_saving_a_loaded_model_writes_the_same_tensors(rest: RestStorage, tied: bool, tmp_path: Path) -> None:
    folder = pack(sketched_model(tied=tied), tmp_path / "packed", rest)
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    loaded.save_pretrained(tmp_path / "again")
    first, again = tensors_of(folder), tensors_of(tmp_path / "again")
    assert first.keys() == again.keys()
    assert all(torch.equal(first[name], again[name]) and first[name].dtype == again[name].dtype for name in first)
    second = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype="auto")
    assert torch.equal(logits(second), logits(loaded))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cast", ["at load", "to", "by name"])
def test_casts_leave_the_decoded_weights_alone(dtype: torch.dtype, cast: str, tmp_path: Path) -> None:
    folder = pack(sketched_model(output_scale=True), tmp_path / "packed", RestStorage(embeddings=8, linears=8))
    exact = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    at_load = dtype if cast == "at load" else torch.float32
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=at_load)
    if cast == "to":
        loaded = loaded.to(dtype)
    elif cast == "by name":
        loaded = loaded.half().float().half() if dtype == torch.float16 else loaded.float().bfloat16()
    for name, layer in packed_layers(loaded).items():
        assert torch.equal(layer.decoded_weight(), packed_layers(exact)[name].decoded_weight())
    blocks = [module for module in loaded.modules() if isinstance(module, BlockLinear)]
    originals = [module for module in exact.modules() if isinstance(module, BlockLinear)]
    assert blocks
    assert all(torch.equal(a.decoded_weight(), b.decoded_weight()) for a, b in zip(blocks, originals, strict=True))
    assert logits(loaded).dtype == dtype


def test_generate_and_pipeline_continue_as_the_sketched_model_does(tmp_path: Path) -> None:
    model = sketched_model()
    folder = pack(model, tmp_path / "packed", EXACT)
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    mask = torch.ones_like(IDS)
    wanted = model.generate(IDS, attention_mask=mask, max_new_tokens=5, do_sample=False)
    assert torch.equal(loaded.generate(IDS, attention_mask=mask, max_new_tokens=5, do_sample=False), wanted)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    answer = pipeline("text-generation", model=loaded, tokenizer=tokenizer)("a cat", max_new_tokens=4, do_sample=False)
    assert answer[0]["generated_text"].startswith("a cat")


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}])
def test_device_maps(device_map: str | dict[str, str], tmp_path: Path) -> None:
    model = sketched_model()
    folder = pack(model, tmp_path / "packed", EXACT)
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, device_map=device_map)
    assert torch.equal(logits(loaded), logits(model))


def test_base_model_without_head_finds_its_layers_too(tmp_path: Path) -> None:
    model = sketched_model()
    folder = pack(model, tmp_path / "packed", EXACT)
    base = AutoModel.from_pretrained(folder, dtype=torch.float32)
    assert any(isinstance(module, PackedLinear) for module in base.modules())
    with torch.no_grad():
        assert torch.equal(base(IDS).last_hidden_state, model.model(IDS).last_hidden_state)


def test_tied_embeddings_are_stored_and_held_once(tmp_path: Path) -> None:
    folder = pack(sketched_model(), tmp_path / "packed", RestStorage(embeddings=8))
    assert "lm_head.weight" not in tensors_of(folder)
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight


def test_compressing_while_loading_is_refused(tmp_path: Path) -> None:
    config = AutoModelForCausalLM.from_pretrained(pack(sketched_model(), tmp_path / "packed")).hf_quantizer
    dense = tmp_path / "dense"
    load_dense(ModelSpec(kind="random", name="llama")).save_pretrained(dense)
    with pytest.raises(ValueError, match="pre-quantized"):
        AutoModelForCausalLM.from_pretrained(dense, quantization_config=config.quantization_config)


@pytest.mark.parametrize("damage", ["flipped", "missing"])
def test_damaged_layer_raises_from_pretrained_and_is_named(damage: str, tmp_path: Path) -> None:
    folder = pack(sketched_model(), tmp_path / "packed")
    name = "model.layers.1.mlp.up_proj.packed"
    packed = load_file(folder / "model.safetensors")[name]
    packed[200] ^= 4
    rewrite(folder, **{name: packed if damage == "flipped" else None})
    with pytest.raises(PackedFormatError, match=r"^(model\.)?layers\.1\.mlp\.up_proj"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_without_import_usllm_transformers_returns_random_layers_as_the_card_warns(tmp_path: Path) -> None:
    """Not our behaviour: what transformers does, and why card and README name the line to add."""
    folder = pack(sketched_model(), tmp_path / "packed")
    script = (
        "import sys\nfrom transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "print(type(model.model.layers[0].mlp.up_proj).__name__)"
    )
    command = [sys.executable, "-c", script, str(folder)]
    spoken = {key: value for key, value in os.environ.items() if key != "TRANSFORMERS_VERBOSITY"}  # commands quieten it
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=spoken)
    assert "PackedLinear" not in done.stdout
    assert "Unknown quantization type" in done.stderr + done.stdout


def test_import_usllm_loads_no_transformers_and_registers_when_transformers_comes() -> None:
    script = (
        "import sys, usllm\n"
        "assert 'transformers' not in sys.modules and 'torch' not in sys.modules\n"
        "from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as table\n"
        "assert 'usllm' in table\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, timeout=120)
