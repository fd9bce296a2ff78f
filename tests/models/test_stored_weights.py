"""Weights on disk: read as they are, refused where they are not those of their configuration."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from usllm.models import ModelSpec
from usllm.models.loading import load_config, load_dense
from usllm.models.random_model import byte_tokenizer, random_model
from usllm.models.stored_weights import open_weights
from usllm.system.errors import RunError, UserError

GATE, NORM, EMBEDDING = "model.layers.1.mlp.gate_proj.weight", "model.norm.weight", "model.embed_tokens.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    random_model("llama").save_pretrained(tmp_path, max_shard_size="150KB")
    byte_tokenizer().save_pretrained(tmp_path)
    return tmp_path


def spec(folder: Path) -> ModelSpec:
    return ModelSpec(kind="folder", name=str(folder))


def changed(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Write the weights anew, in one file."""
    tensors = {name: value for path in folder.glob("*.safetensors") for name, value in load_file(path).items()}
    for path in (*folder.glob("*.safetensors"), folder / "model.safetensors.index.json"):
        path.unlink(missing_ok=True)
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def test_tensors_of_all_shards_are_those_of_the_model(folder: Path) -> None:
    weights, model = open_weights(spec(folder)), load_dense(spec(folder))
    for name, value in model.state_dict().items():  # the head among them, which no file holds
        assert torch.equal(weights[name], value), name


def test_digest_is_of_the_content_not_of_the_files(folder: Path) -> None:
    before = open_weights(spec(folder)).checked_digest()
    changed(folder, lambda tensors: None)
    assert open_weights(spec(folder)).checked_digest() == before
    changed(folder, lambda tensors: tensors[GATE].view(-1)[3:4].add_(1e-3))
    assert open_weights(spec(folder)).checked_digest() != before


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda tensors: tensors.pop(GATE), f"1 tensor is missing ({GATE})"),
        (lambda tensors: tensors.update(x=torch.ones(2)), "1 tensor is not part of the model (x)"),
        (lambda tensors: tensors.update({NORM: torch.ones(3)}), f"({NORM} ([3] for [64]))"),
        (lambda tensors: tensors.update({"lm_head.weight": torch.ones(264, 64)}), "set tie_word_embeddings=false"),
    ],
    ids=["missing", "unexpected", "misshaped", "second head"],
)
def test_weights_of_another_model_are_refused(
    change: Callable[[dict[str, Tensor]], object], words: str, folder: Path
) -> None:
    changed(folder, change)
    with pytest.raises(UserError) as caught:
        open_weights(spec(folder))
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_head_that_is_the_embedding_may_be_stored_beside_it(folder: Path) -> None:
    changed(folder, lambda tensors: tensors.update({"lm_head.weight": tensors[EMBEDDING].clone()}))
    assert torch.equal(open_weights(spec(folder))["lm_head.weight"], load_dense(spec(folder)).lm_head.weight)


def test_weight_that_is_not_finite_is_named(folder: Path) -> None:
    changed(folder, lambda tensors: tensors[GATE].view(-1)[5:6].fill_(float("inf")))
    with pytest.raises(RunError, match=GATE):
        open_weights(spec(folder)).checked_digest()


def test_missing_shard_and_files_of_another_kind_are_refused(folder: Path) -> None:
    index = folder / "model.safetensors.index.json"
    shard = max(set(json.loads(index.read_text())["weight_map"].values()))
    (folder / shard).unlink()
    with pytest.raises(UserError, match=f"{shard} is missing"):
        open_weights(spec(folder))
    index.unlink()
    with pytest.raises(UserError, match="write them with save_pretrained"):
        open_weights(spec(folder))
    assert load_config(spec(folder)).num_hidden_layers == 2
