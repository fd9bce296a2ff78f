"""A dense folder that does not hold the model of its configuration is refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from damaged_folders import DAMAGED, WHOLE, write_folder
from safetensors.torch import load_file

from usllm.models import ModelSpec
from usllm.models.completeness import incompleteness
from usllm.models.loading import load_dense
from usllm.system.errors import UserError


@pytest.mark.parametrize("name", DAMAGED)
def test_folder_that_is_not_the_whole_model_is_refused(name: str, tmp_path: Path) -> None:
    arguments, change, message = DAMAGED[name]
    write_folder(tmp_path / "model", **arguments)
    change(tmp_path / "model")
    with pytest.raises(UserError, match=message) as caught:
        load_dense(ModelSpec(kind="folder", name=str(tmp_path / "model")))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", WHOLE)
def test_whole_folder_loads_with_the_values_stored(name: str, tmp_path: Path) -> None:
    arguments, change = WHOLE[name]
    write_folder(tmp_path / "model", **arguments)
    change(tmp_path / "model")
    model = load_dense(ModelSpec(kind="folder", name=str(tmp_path / "model")))
    stored = {name: t for path in (tmp_path / "model").glob("*.safetensors") for name, t in load_file(path).items()}
    loaded = model.state_dict()
    assert all(torch.equal(loaded[name], tensor.float()) for name, tensor in stored.items())
    assert set(loaded) - set(stored) <= {"lm_head.weight"}


def test_message_names_the_first_tensors_and_their_number() -> None:
    assert incompleteness() is None
    assert incompleteness(missing=["a"]) == "1 tensor is missing (a)"
    assert incompleteness(missing=list("abcd"), unexpected=["e"]) == (
        "4 tensors are missing (a, b, c, …); 1 tensor is not part of the model (e)"
    )
