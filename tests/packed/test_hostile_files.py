"""A packed folder comes from strangers: whatever is in it, it is read or refused, and nothing else happens."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import subprocess
import sys
import tracemalloc
from pathlib import Path

import fuzzing
import pytest
import torch
from folder_files import Files, tensor_places, with_header
from fuzzing import Cases
from mutations import DAMAGE, MUTATIONS, edited_json, mutated
from safetensors.torch import load_file
from tiny_packed import pack, rewrite, seal, sketched_model
from transformers import AutoModel, AutoModelForCausalLM

import usllm
from usllm.packed.export import RestStorage
from usllm.packed.inspection import inspect_folder
from usllm.system.errors import PackedFormatError

LAYER = "model.layers.0.mlp.up_proj"
# Of a process whose address space is bounded: each thread that allocates would reserve 64 MiB of it for itself.
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}


@pytest.fixture(scope="module")
def valid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with everything a format can hold: classes of several widths, output scales, blocks of 8 and 4 bits."""
    model = sketched_model(tied=False, allocation="waterfill", output_scale=True)
    return pack(model, tmp_path_factory.mktemp("valid") / "packed", RestStorage("bfloat16", 8, 4))


@pytest.fixture
def folder(valid: Path, tmp_path: Path) -> Path:
    shutil.copytree(valid, tmp_path / "packed")
    return tmp_path / "packed"


@pytest.fixture(scope="module")
def cases(valid: Path, tmp_path_factory: pytest.TempPathFactory) -> Cases:
    return Cases(valid, tmp_path_factory.mktemp("damaged"))


# Mutations, without and with a fitting checksum


def test_mutations_are_the_same_every_time_and_damage_something(valid: Path) -> None:
    files = Files.read(valid)
    kinds = {number: mutated(files, number) for number in range(3 * len(MUTATIONS))}
    assert kinds == {number: mutated(files, number) for number in kinds}
    assert {kind for kind, _ in kinds.values()} == set(MUTATIONS)
    assert sum(damaged != files for _, damaged in kinds.values()) > 0.9 * len(kinds)


def test_damaged_layers_are_refused_or_decode_to_finite_weights(cases: Cases) -> None:
    outcomes = {cases.layer(number) for number in range(300)}
    assert outcomes == {"layer alone: accepted", "layer alone: refused"}


def test_damaged_folders_are_inspected_or_refused(cases: Cases) -> None:
    outcomes = {cases.inspect(number) for number in range(20 * len(MUTATIONS))}
    assert {f"{kind}, inspected: refused" for kind in DAMAGE} <= outcomes
    assert {f"{kind}, forged, inspected: accepted" for kind in ("layer", "format", "rest bits")} <= outcomes


def test_damaged_folders_are_loaded_or_refused(cases: Cases) -> None:
    outcomes = {cases.load(number) for number in range(1000, 1000 + 2 * len(MUTATIONS))}
    assert any(outcome.endswith("accepted") for outcome in outcomes)
    assert any(outcome.endswith("refused") for outcome in outcomes)


@pytest.mark.parametrize("kind", sorted(DAMAGE))
def test_damaged_folder_is_refused_or_computes_the_same(kind: str, cases: Cases) -> None:
    """Whatever was altered; :class:`Cases` raises where logits differ without a word."""
    first = sorted(MUTATIONS).index(kind)
    outcomes = {cases.load(number) for number in range(first, 6 * len(MUTATIONS), len(MUTATIONS))}
    assert outcomes <= {f"{kind}, loaded: refused", f"{kind}, loaded: accepted"}


def test_silent_change_would_be_told(cases: Cases, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("usllm.packed.weight_files.check_tensors", lambda *arguments: None)
    first = sorted(MUTATIONS).index("layers swapped")
    with pytest.raises(AssertionError, match="other numbers than the healthy folder's"):
        cases.load(first)


def test_damaged_folders_of_version_1_are_loaded_or_refused(tmp_path: Path) -> None:
    cases = Cases(Path(__file__).parents[1] / "fixtures" / "version_1" / "packed", tmp_path)
    outcomes = {cases.load(number) for number in range(4 * len(MUTATIONS))}
    assert any(outcome.endswith("accepted") for outcome in outcomes)
    assert any(outcome.endswith("refused") for outcome in outcomes)


def test_python_and_numpy_allocate_no_more_than_the_files_are_worth(cases: Cases) -> None:
    cases.inspect(0)
    tracemalloc.start()
    try:
        for number in range(5000, 5000 + 3 * len(MUTATIONS)):
            tracemalloc.reset_peak()
            before = tracemalloc.get_traced_memory()[0]
            cases.inspect(number)
            used = tracemalloc.get_traced_memory()[1] - before
            assert used <= 2 * cases.files.size + (8 << 20), f"number {number} took {used} bytes"
    finally:
        tracemalloc.stop()


def test_damaged_index_is_read_or_refused(valid: Path, tmp_path: Path) -> None:
    files, index = Files.read(valid), "model.safetensors.index.json"
    table = {"weight_map": dict.fromkeys(tensor_places(files.weights), "model-00001-of-00001.safetensors")}
    (tmp_path / "config.json").write_bytes(files.config)
    (tmp_path / "model-00001-of-00001.safetensors").write_bytes(files.weights)
    (tmp_path / index).write_text(json.dumps(table))
    inspect_folder(tmp_path)
    refused = 0
    for number in range(60):
        (tmp_path / index).write_bytes(edited_json(json.dumps(table).encode(), random.Random(number)))
        try:
            inspect_folder(tmp_path)
        except PackedFormatError:
            refused += 1
    assert refused > 40


@pytest.mark.parametrize(
    "text", ["", "{", "[1]", "null", "[" * 100_000, '{"max_new_tokens": "x"}', '{"eos_token_id": [[-1]]}', '{"a": NaN}']
)
def test_damaged_generation_settings_are_read_or_refused(folder: Path, text: str) -> None:
    (folder / "generation_config.json").write_text(text)
    inspect_folder(folder)
    with contextlib.suppress(PackedFormatError):
        usllm.load(folder)


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="bounds memory by RLIMIT_AS and /proc")
def test_twenty_thousand_mutations(valid: Path, tmp_path: Path) -> None:
    """In a process of its own: a crash, a hang, an allocation beyond the bound or a silent change would be told."""
    counts = {"layers": 16_000, "folders": 2_600, "loads": 5_200}
    arguments = [sys.executable, fuzzing.__file__, str(valid), str(tmp_path), *map(str, counts.values()), "0"]
    environment = os.environ | ONE_THREAD
    done = subprocess.run(arguments, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert not found["failures"]
    assert sum(found["outcomes"].values()) == sum(counts.values()) >= 20_000
    print(json.dumps(found["outcomes"], indent=1))


# The bound itself works


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="bounds memory by RLIMIT_AS and /proc")
def test_allocation_beyond_the_bound_would_be_told(valid: Path, tmp_path: Path) -> None:
    script = (
        "import sys, torch, fuzzing, usllm.packed.inspection as inspection\n"
        "def greedy(*arguments):\n"
        "    torch.zeros(1 << 28)\n"
        "real, calls = inspection.inspect_folder, []\n"
        "inspection.inspect_folder = lambda path: greedy() if calls else calls.append(real(path))\n"
        "fuzzing.main(sys.argv[1], sys.argv[2], 0, 2, 0, 0)\n"
    )
    path = os.pathsep.join([str(Path(fuzzing.__file__).parent), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | ONE_THREAD | {"PYTHONPATH": path}
    arguments = [sys.executable, "-c", script, str(valid), str(tmp_path)]
    done = subprocess.run(arguments, capture_output=True, text=True, env=environment, timeout=250)
    failures = json.loads(done.stdout.splitlines()[-1])["failures"]
    assert [number for _, number, _ in failures] == [0, 1]
    assert all("allocate memory" in text for _, _, text in failures)


# Bombs: few bytes that ask for many


def test_descriptions_that_would_unpack_to_gigabytes(folder: Path) -> None:
    text = '{"quantization_config": [' + "[]," * (1 << 20) + "[]]}"
    (folder / "config.json").write_text(text)
    tracemalloc.start()
    try:
        with pytest.raises(PackedFormatError, match="too many for a description"):
            inspect_folder(folder)
        assert tracemalloc.get_traced_memory()[1] < 2 << 20
    finally:
        tracemalloc.stop()


def test_header_of_a_million_empty_tensors(folder: Path) -> None:
    entry = '{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
    header = ("{" + ",".join(f'"a{number}":{entry}' for number in range(50_000)) + "}").encode()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(PackedFormatError, match=r"^model\.safetensors: its header of \d+ bytes is too long"):
        inspect_folder(folder)


def test_layer_whose_few_bytes_decode_to_gigabytes(folder: Path) -> None:
    """An empty layer takes 11 bytes whatever its shape; a model of such layers would decode to any size."""
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["layers"][LAYER] = [1 << 20, 1 << 16, 11]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(PackedFormatError, match=rf"{LAYER}: 11 bytes for .* are impossible"):
        inspect_folder(folder)


def test_tensors_that_a_model_would_compute_for_itself(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as masks of positions times positions: no file accounts for them."""
    monkeypatch.setattr("usllm.packed.loading._COMPUTED_BYTES", 16)
    with pytest.raises(
        PackedFormatError, match=r"^config\.json: describes a model with \d+ bytes of tensors that are not stored"
    ):
        usllm.load(folder)


# transformers alone, without the checks of usllm.load: no model with random layers


PACKED = [f"{LAYER}.packed", "model.embed_tokens.weight", "lm_head.weight", "model.layers.1.self_attn.o_proj.weight"]


@pytest.mark.parametrize("name", PACKED)
def test_from_pretrained_names_a_packed_tensor_that_is_missing(folder: Path, name: str) -> None:
    rewrite(folder, **{name: None})
    with pytest.raises(PackedFormatError, match=rf"^{name}: is missing from the weight files"):
        AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("name", PACKED)
def test_from_pretrained_refuses_a_packed_tensor_of_another_shape(folder: Path, name: str) -> None:
    rewrite(folder, **{name: load_file(folder / "model.safetensors")[name][:-1].clone()})
    with pytest.raises((PackedFormatError, RuntimeError)):
        AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("byte", [0, 3, 5, 9, 40, -1])
def test_from_pretrained_names_a_damaged_layer(folder: Path, byte: int) -> None:
    packed = load_file(folder / "model.safetensors")[f"{LAYER}.packed"]
    packed[byte] ^= 4
    rewrite(folder, **{f"{LAYER}.packed": packed})
    with pytest.raises(PackedFormatError, match=rf"^{LAYER}: its checksum is wrong"):
        AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("name", PACKED[1:])
def test_from_pretrained_names_block_scales_that_are_not_finite(folder: Path, name: str) -> None:
    weight = load_file(folder / "model.safetensors")[name]
    weight[0, 1] = 0x7C
    rewrite(folder, **{name: weight})
    seal(folder)
    with pytest.raises(PackedFormatError, match=rf"^{name.removesuffix('.weight')}: 1 of .* scales are not finite"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_base_model_loads_alone_from_a_model_with_a_packed_head(folder: Path, tmp_path: Path) -> None:
    ids = torch.tensor([[1, 2, 3]])
    expected = usllm.load(folder, dtype=torch.float32).model(ids).last_hidden_state
    alone = AutoModel.from_pretrained(folder, dtype=torch.float32)
    assert torch.equal(alone(ids).last_hidden_state, expected)
    alone.save_pretrained(tmp_path / "alone")
    again = AutoModel.from_pretrained(tmp_path / "alone", dtype=torch.float32)
    assert torch.equal(again(ids).last_hidden_state, expected)


def test_helpers_reach_what_they_damage(valid: Path) -> None:
    """The places that mutations write to are those of the tensors."""
    files = Files.read(valid)
    first, end = tensor_places(files.weights)[f"{LAYER}.packed"]
    expected = load_file(valid / "model.safetensors")[f"{LAYER}.packed"]
    assert files.weights[first:end] == expected.numpy().tobytes()
    length = int.from_bytes(files.weights[:8], "little")
    assert with_header(files.weights, files.weights[8 : 8 + length]) == files.weights
    changed = [edited_json(files.config, random.Random(number), "quantization_config") for number in range(50)]
    assert sum(text != json.dumps(json.loads(files.config)).encode() for text in changed) > 45
