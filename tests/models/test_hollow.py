"""A model without its weights: blocks are made as they are stored, and what stands around them computes the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from usllm.models import ModelSpec
from usllm.models.hollow import Surroundings, filled, hollow_model
from usllm.models.loading import load_config, load_dense
from usllm.models.random_model import byte_tokenizer, random_model
from usllm.models.stored_weights import open_weights
from usllm.system.errors import UserError

CPU = torch.device("cpu")


@pytest.fixture(params=["llama", "qwen3"])
def spec(request: pytest.FixtureRequest, tmp_path: Path) -> ModelSpec:
    random_model(request.param).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    return ModelSpec(kind="folder", name=str(tmp_path))


def test_nothing_is_held_and_blocks_are_those_of_the_model(spec: ModelSpec) -> None:
    model: Any = hollow_model(load_config(spec))
    assert all(parameter.is_meta for parameter in model.parameters())
    assert not any(buffer.is_meta for buffer in model.buffers())
    weights, dense = open_weights(spec), load_dense(spec)
    block = filled(model.model.layers[1], "model.layers.1", weights, CPU)
    theirs = dict(dense.model.layers[1].named_parameters())
    assert all(torch.equal(value, theirs[name]) for name, value in block.named_parameters())
    assert not block.training and all(parameter.is_meta for parameter in model.model.layers[1].parameters())
    with torch.no_grad():
        next(block.parameters()).add_(1)  # never the file
    again = filled(model.model.layers[1], "model.layers.1", weights, CPU)
    assert all(torch.equal(value, theirs[name]) for name, value in again.named_parameters())


@pytest.mark.parametrize("in_tuple", [False, True])
def test_what_stands_around_the_blocks_computes_as_in_the_model(spec: ModelSpec, in_tuple: bool) -> None:
    model: Any = hollow_model(load_config(spec))
    dense: Any = load_dense(spec)
    around = Surroundings(model, list(model.model.layers), open_weights(spec), CPU)

    class First(nn.Module):
        """Answers as families of old do, or of today."""

        def forward(self, hidden: torch.Tensor, **kwargs: Any) -> Any:
            return (hidden,) if in_tuple else hidden

    around.look_at(First())
    assert around._in_tuple is in_tuple
    ids, stream = torch.randint(0, 250, (2, 9)), torch.randn(2, 9, 64)
    assert torch.equal(model.get_input_embeddings()(ids), dense.get_input_embeddings()(ids))
    if not in_tuple:  # the installed family gives tensors
        with torch.no_grad():
            hidden = around.before_head(ids, stream)
            assert torch.equal(hidden, dense.model.norm(stream))
            weight, bias = around.head_rows(slice(10, 30))
        assert torch.equal(weight, dense.lm_head.weight[10:30]) and bias is None


def test_logits_that_are_changed_behind_the_head_are_refused(spec: ModelSpec) -> None:
    config = load_config(spec)
    config.final_logit_softcapping = 30.0
    model: Any = hollow_model(config)
    with pytest.raises(UserError, match=r"block_by_block=true: .* changes its logits"):
        Surroundings(model, list(model.model.layers), open_weights(spec), CPU)
