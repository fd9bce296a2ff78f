"""Writing a packed folder: whole or not at all, shard by shard, and accounted for to the byte."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from model_families import config_of
from on_disk import most_held
from tiny_packed import SKETCH, logits, pack, random_config, sketched_model
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PretrainedConfig

import usllm
from usllm.compress import compress_, compression_report
from usllm.compress.methods.sketch import computing
from usllm.models import ModelSpec
from usllm.models.loading import load_tokenizer
from usllm.packed import sharded_files
from usllm.packed.export import ModelFiles, RestStorage, export, left_whole
from usllm.packed.inspection import inspect_folder
from usllm.packed.new_folder import new_folder
from usllm.packed.quantizer import can_be_blocks
from usllm.packed.source import PackingSource, from_model
from usllm.sketch import SketchConfig, build_plan
from usllm.system.errors import RunError, UserError

RESTS = [RestStorage(), RestStorage("float32"), RestStorage("bfloat16", 8, 4), RestStorage("float16", 4, 8)]


@pytest.mark.parametrize("rest", RESTS)
@pytest.mark.parametrize("shards", [4_000_000_000, 30_000])
def test_every_byte_on_disk_is_accounted_for(rest: RestStorage, shards: int, tmp_path: Path) -> None:
    model = sketched_model(allocation="waterfill", output_scale=True)
    folder = pack(model, tmp_path / "packed", rest, max_shard_size=shards)
    inspection = inspect_folder(folder)
    on_disk = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    assert inspection.accounted_bytes == inspection.disk_bytes == on_disk
    assert (len(list(folder.glob("*.safetensors"))) > 1) == (shards == 30_000)


def test_sketched_bytes_are_those_that_training_reported(tmp_path: Path) -> None:
    model = sketched_model(allocation="waterfill", output_scale=True)
    inspection = inspect_folder(pack(model, tmp_path / "packed"))
    report = compression_report(model)
    assert {layer.name: 8 * layer.bytes for layer in inspection.layers} == {r.name: r.bits for r in report.layers}
    assert inspection.bits_per_weight == report.bits_per_weight
    assert inspection.parameters == report.compressed_weights + report.other_parameters
    assert inspection.sketched_bytes + inspection.rest_bytes == report.model_bytes


@pytest.mark.parametrize("rest", RESTS[2:])
def test_block_storage_is_smaller_and_close(rest: RestStorage, tmp_path: Path) -> None:
    model = sketched_model()
    plain = inspect_folder(pack(model, tmp_path / "plain"))
    blocks = inspect_folder(pack(model, tmp_path / "blocks", rest))
    assert blocks.sketched_bytes == plain.sketched_bytes
    assert blocks.rest_bytes < 0.6 * plain.rest_bytes
    exact = logits(sketched_model())
    error = (logits(usllm.load(tmp_path / "blocks", dtype=torch.float32)) - exact).square().mean()
    assert error < 0.05 * exact.square().mean()


def test_existing_folder_is_kept_unless_told_otherwise(tmp_path: Path) -> None:
    folder = pack(sketched_model(), tmp_path / "packed")
    (folder / "mine.txt").write_text("x")
    with pytest.raises(UserError, match="overwrite=true"):
        pack(sketched_model(), folder)
    assert (folder / "mine.txt").exists()
    pack(sketched_model(), folder, overwrite=True)
    assert not (folder / "mine.txt").exists()
    assert list(tmp_path.iterdir()) == [folder]


def test_only_a_packed_model_is_ever_replaced(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "step.ckpt").write_text("x")
    with pytest.raises(UserError, match="not a packed model"):
        pack(sketched_model(), run, overwrite=True)
    with pytest.raises(UserError, match="a file or a link"):
        pack(sketched_model(), run / "step.ckpt", overwrite=True)
    (tmp_path / "link").symlink_to(run)
    with pytest.raises(UserError, match="a file or a link"):
        pack(sketched_model(), tmp_path / "link", overwrite=True)
    assert (run / "step.ckpt").read_text() == "x"
    (tmp_path / "empty").mkdir()
    pack(sketched_model(), tmp_path / "empty")


def test_folder_that_came_into_being_meanwhile_is_kept(tmp_path: Path) -> None:
    def export_beside_another() -> None:
        with new_folder(tmp_path / "packed", overwrite=False) as mine:
            (mine / "file").write_text("mine")
            pack(sketched_model(), tmp_path / "packed")

    with pytest.raises(UserError, match="overwrite=true"):
        export_beside_another()
    assert os.listdir(tmp_path) == ["packed"]
    inspect_folder(tmp_path / "packed")


def test_replacing_that_fails_gives_the_old_folder_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = pack(sketched_model(), tmp_path / "packed")
    (folder / "old.txt").write_text("old")
    rename = os.rename

    def failing(source: Path, target: Path) -> None:
        if str(source).endswith(".partial"):
            raise OSError(5, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(OSError, match="Input/output"):
        pack(sketched_model(), folder, overwrite=True)
    assert (folder / "old.txt").exists()
    assert os.listdir(tmp_path) == ["packed"]


def test_older_transformers_find_rotation_and_tokenizer_too(tmp_path: Path) -> None:
    """transformers 5 alone writes neither ``rope_theta`` nor a tokenizer class that 4.57 knows."""
    folder = pack(sketched_model(), tmp_path / "packed")
    config = json.loads((folder / "config.json").read_text())
    rope = config.get("rope_parameters", {"rope_theta": config["rope_theta"]})
    assert config["rope_theta"] == rope["rope_theta"]
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast"


def test_embedding_that_scales_what_it_looks_up_stays_out_of_blocks() -> None:
    class Scaled(torch.nn.Embedding):
        pass

    assert can_be_blocks(torch.nn.Embedding(8, 32))
    assert not can_be_blocks(Scaled(8, 32))
    assert not can_be_blocks(torch.nn.Embedding(8, 32, max_norm=1.0))


@pytest.mark.parametrize(
    ("value", "rest"), [(float("nan"), RestStorage()), (1e6, RestStorage("float16")), (float("inf"), RESTS[2])]
)
def test_numbers_that_do_not_fit_their_storage_are_named(value: float, rest: RestStorage, tmp_path: Path) -> None:
    model = sketched_model()
    with torch.no_grad():
        model.get_input_embeddings().weight[3, 5] = value
    with pytest.raises(UserError, match=r"^model\.embed_tokens\.weight: .*finite"):
        pack(model, tmp_path / "packed", rest)
    assert list(tmp_path.iterdir()) == []


def test_generation_settings_that_contradict_themselves_are_written_in_a_form_that_loads(tmp_path: Path) -> None:
    model = sketched_model()
    generation = GenerationConfig(temperature=0.2, top_p=0.9, do_sample=False)
    export(from_model(model), ModelFiles(model.config, None, generation), tmp_path / "packed")
    assert GenerationConfig.from_pretrained(tmp_path / "packed").temperature == 0.2


def test_error_half_way_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sharded_files, "write_tensors", full)
    with pytest.raises(RunError, match="No space left"):
        pack(sketched_model(), tmp_path / "packed")
    assert list(tmp_path.iterdir()) == []


def test_kill_half_way_leaves_no_folder_and_the_next_export_cleans_up(tmp_path: Path) -> None:
    script = f"""
import os, signal, sys
sys.path[:0] = {[str(Path(__file__).parent)]!r}
from pathlib import Path
from tiny_packed import pack, sketched_model
from usllm.packed import sharded_files
save, calls = sharded_files.write_tensors, []
def killed(*args, **kwargs):
    save(*args, **kwargs)
    calls.append(1)
    if len(calls) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
sharded_files.write_tensors = killed
pack(sketched_model(), Path({str(tmp_path)!r}) / "packed", max_shard_size=30_000)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, timeout=120)
    assert done.returncode == -signal.SIGKILL
    assert not (tmp_path / "packed").exists()
    assert len(list(tmp_path.iterdir())) == 1  # hidden, and of another name
    pack(sketched_model(), tmp_path / "packed")
    assert os.listdir(tmp_path) == ["packed"]


def test_memory_of_an_export_does_not_grow_with_the_number_of_layers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard = 40_000  # bytes: the embedding alone takes 34 kB

    def written(source: PackingSource, config: PretrainedConfig) -> None:
        tokenizer = load_tokenizer(ModelSpec(kind="random", name="llama"))
        export(source, ModelFiles(config, tokenizer), tmp_path / str(config.num_hidden_layers), max_shard_size=shard)

    few, many = (most_held(layers, written, monkeypatch) for layers in (2, 12))
    assert many[0] <= few[0]
    assert few[1] <= shard
    assert many[1] <= shard


def test_plan_of_a_layer_that_the_model_does_not_have_is_refused(tmp_path: Path) -> None:
    model = sketched_model()
    source = from_model(model)
    other = build_plan((64, 64), None, source.compressor.options, "model.layers.9.mlp.up_proj")
    odd = PackingSource(source.tensors, {**source.plans, other.name: computing(other)}, source.compressor)
    with pytest.raises(UserError, match=r"model\.layers\.9"):
        export(odd, ModelFiles(model.config), tmp_path / "packed")
    assert not (tmp_path / "packed").exists()


@pytest.mark.parametrize(("key", "value"), [("dtype", "int8"), ("embeddings", 5), ("linears", 2)])
def test_unknown_storage_is_refused(key: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"rest.{key}"):
        RestStorage(**{key: value})  # type: ignore[arg-type]


def test_rest_that_is_not_stored_as_asked_is_named() -> None:
    config = random_config()
    config.hidden_size, config.head_dim = 48, 16
    source = from_model(sketched_model())
    assert left_whole(source, random_config(), RestStorage("bfloat16", 4, 16)) == []
    assert left_whole(source, config, RestStorage()) == []
    (line,) = left_whole(source, config, RestStorage("bfloat16", 4, 16))
    assert line == "rest.embeddings=4: model.embed_tokens stays at 16 bits: rows are no whole blocks of 32"


def test_embedding_that_blocks_cannot_stand_in_for_stays_tied(tmp_path: Path) -> None:
    config = AutoConfig.for_model(**config_of("gemma3_text"))
    model = AutoModelForCausalLM.from_config(config)
    compress_(model, SketchConfig(**SKETCH))
    asked = RestStorage("bfloat16", 4, 16)
    (line,) = left_whole(from_model(model), model.config, asked)
    assert line == "rest.embeddings=4: model.embed_tokens stays at 16 bits: no plain embedding or linear"
    smaller, plain = (inspect_folder(pack(model, tmp_path / str(at), rest)) for at, rest in enumerate((asked, None)))
    assert smaller.rest_bytes == plain.rest_bytes
