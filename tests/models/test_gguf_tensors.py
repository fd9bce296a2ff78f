"""Every tensor of a GGUF file is a parameter of the model, with the same values, and the other way round."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from damaged_gguf import TENSORS, Tensors
from gguf_of_model import write_model

from usllm.models import ModelSpec
from usllm.models.gguf_contents import read_contents
from usllm.models.gguf_families import configuration_of
from usllm.models.gguf_tensors import check_tensors, check_values
from usllm.models.loading import load_config, load_dense
from usllm.system.errors import UserError


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("USLLM_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize(("change", "message"), TENSORS)
def test_file_that_is_not_the_whole_model_is_refused(
    change: Callable[[Tensors], None], message: str, tmp_path: Path
) -> None:
    write_model(tmp_path / "model.gguf", "llama", tensors=change)
    with pytest.raises(UserError, match=message):
        load_config(ModelSpec(kind="gguf", name=None, file=str(tmp_path / "model.gguf")))


def test_number_of_layers_is_refused_before_they_are_built(tmp_path: Path) -> None:
    write_model(tmp_path / "model.gguf", "llama", metadata={"llama.block_count": 1_000_000_000})
    with pytest.raises(UserError, match="holds 2 layers, its metadata say 1000000000"):
        load_config(ModelSpec(kind="gguf", name=None, file=str(tmp_path / "model.gguf")))


def test_head_that_is_tied_may_be_missing(tmp_path: Path) -> None:
    write_model(tmp_path / "model.gguf", "llama-tied")
    contents = read_contents(tmp_path / "model.gguf")
    config = configuration_of(contents)
    assert config.tie_word_embeddings
    check_tensors(contents, config)


@pytest.mark.parametrize("name", ["attn_q", "attn_k", "ffn_down", "attn_norm"])
def test_value_that_was_read_otherwise_is_refused(name: str, tmp_path: Path) -> None:
    write_model(tmp_path / "model.gguf", "llama")
    model = load_dense(ModelSpec(kind="gguf", name=None, file=str(tmp_path / "model.gguf")))
    write_model(tmp_path / "other.gguf", "llama", tensors=lambda tensors: _swap(tensors[f"blk.1.{name}.weight"]))
    check_values(read_contents(tmp_path / "model.gguf"), model)
    with pytest.raises(UserError, match=rf"values of the tensor blk\.1\.{name}\.weight"):
        check_values(read_contents(tmp_path / "other.gguf"), model)


def _swap(tensor: np.ndarray) -> None:
    """Two rows (or numbers) of a tensor in each other's place: same values, other order."""
    tensor[[0, 1]] = tensor[[1, 0]]
