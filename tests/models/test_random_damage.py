"""Model files that something was done to at random: refused in one line, or exactly the logits of the whole one."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
import transformers
from random_damage import damaged_folder, damaged_gguf, logits
from transformers import PreTrainedModel

from usllm.models import ModelSpec
from usllm.models.loading import load_config, load_dense, load_tokenizer
from usllm.system.errors import UserError

BEFORE_5 = int(transformers.__version__.partition(".")[0]) < 5


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("USLLM_CACHE", str(tmp_path / "cache"))


def refusal(spec: ModelSpec, whole: PreTrainedModel) -> str | None:
    """What refuses the files; ``None`` where they are the whole model.

    Raises:
        AssertionError: they are loaded as another one.
    """
    try:
        load_config(spec)
        load_tokenizer(spec)
        model = load_dense(spec)
    except UserError as error:
        return str(error)
    assert torch.equal(logits(model), logits(whole)), "another model without a word"
    return None


def check(spec: ModelSpec, whole: PreTrainedModel) -> None:
    """The files are refused in one line that names them, or are the whole model."""
    message = refusal(spec, whole)
    assert message is None or ("\n" not in message and str(spec.file or spec.name) in message), message


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(200))
def test_folder(seed: int, tmp_path: Path) -> None:
    whole = damaged_folder(random.Random(seed), tmp_path)
    check(ModelSpec(kind="folder", name=str(tmp_path / "model")), whole)


@pytest.mark.slow
@pytest.mark.skipif(BEFORE_5, reason="transformers 4 misreads some of the whole files")
@pytest.mark.parametrize("seed", range(200))
def test_gguf(seed: int, tmp_path: Path) -> None:
    whole = damaged_gguf(random.Random(seed), tmp_path)
    check(ModelSpec(kind="gguf", name=None, file=str(tmp_path / "model.gguf")), whole)


def test_both_outcomes_are_met(tmp_path: Path) -> None:
    found = set()
    for seed in range(12):
        place = tmp_path / str(seed)
        place.mkdir()
        whole = damaged_folder(random.Random(seed), place)
        found.add(refusal(ModelSpec(kind="folder", name=str(place / "model")), whole) is None)
    assert found == {True, False}
