"""GGUF files are checked before they are decoded, and decoded once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_gguf import write_tiny_gguf
from transformers import AutoModelForCausalLM

from usllm.models import ModelSpec
from usllm.models.gguf_contents import read_contents
from usllm.models.gguf_file import decoded_folder
from usllm.models.loading import load_config, load_dense, load_tokenizer
from usllm.system.errors import UserError


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("USLLM_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def spec(tmp_path: Path) -> ModelSpec:
    write_tiny_gguf(tmp_path / "tiny.gguf")
    return ModelSpec(kind="gguf", name=None, file=str(tmp_path / "tiny.gguf"))


def test_weights_are_exact_and_plain_fp32(tmp_path: Path) -> None:
    tensors = write_tiny_gguf(tmp_path / "tiny.gguf")
    model = load_dense(ModelSpec(kind="gguf", name=None, file=str(tmp_path / "tiny.gguf")))
    up = model.get_parameter("model.layers.0.mlp.up_proj.weight")
    assert torch.equal(up, torch.from_numpy(tensors["blk.0.ffn_up.weight"]))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert not hasattr(model.config, "quantization_config")


def test_tokenizer_and_configuration_come_along(spec: ModelSpec) -> None:
    tokenizer = load_tokenizer(spec)
    ids = tokenizer("ab c", add_special_tokens=False).input_ids
    assert tokenizer.decode(ids) == "ab c"
    assert len(tokenizer("ab", add_special_tokens=False).input_ids) == 1
    assert tokenizer.name_or_path == spec.file
    assert load_config(spec).max_position_embeddings == 128


def test_decoding_happens_once(spec: ModelSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    first = decoded_folder(Path(str(spec.file)))
    monkeypatch.setattr("usllm.models.gguf_file.read_contents", lambda path: pytest.fail("decoded again"))
    assert decoded_folder(Path(str(spec.file))) == first


def test_other_content_under_the_same_name_is_decoded_anew(spec: ModelSpec) -> None:
    path = Path(str(spec.file))
    first = decoded_folder(path)
    path.write_bytes(path.read_bytes()[:-4] + b"\x00\x00\x80\x3f")
    assert decoded_folder(path) != first


def test_training_a_loaded_model_leaves_the_cache_alone(spec: ModelSpec) -> None:
    model = load_dense(spec)
    name = "model.layers.0.mlp.up_proj.weight"
    before = model.get_parameter(name).clone()
    with torch.no_grad():
        model.get_parameter(name).add_(1.0)
    assert torch.equal(load_dense(spec).get_parameter(name), before)


def test_decoded_folder_is_a_transformers_folder(spec: ModelSpec) -> None:
    model = AutoModelForCausalLM.from_pretrained(decoded_folder(Path(str(spec.file))))
    assert model.dtype == torch.float32


def test_other_architecture_is_refused_before_decoding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tiny_gguf(tmp_path / "bert.gguf", architecture="bert")
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *a, **k: pytest.fail("decoding began"))
    with pytest.raises(UserError, match=r"'bert' is not supported.*llama"):
        load_config(ModelSpec(kind="gguf", name=None, file=str(tmp_path / "bert.gguf")))


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere\.gguf"):
        load_config(ModelSpec(kind="gguf", name=None, file=str(tmp_path / "nowhere.gguf")))


def test_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.gguf").write_text("hello")
    with pytest.raises(UserError, match="not a GGUF file"):
        read_contents(tmp_path / "text.gguf")


def test_truncated_file_is_refused(tmp_path: Path) -> None:
    write_tiny_gguf(tmp_path / "tiny.gguf")
    content = (tmp_path / "tiny.gguf").read_bytes()
    (tmp_path / "cut.gguf").write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match="cut short"):
        read_contents(tmp_path / "cut.gguf")
