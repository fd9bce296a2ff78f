"""Strategies by name, and the parts that FSDP2 gathers one at a time."""

from __future__ import annotations

import pytest
from composing import composed
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from transformers import AutoModelForCausalLM

from usllm.config import check_train
from usllm.models.random_model import random_config
from usllm.training import Fsdp2Strategy, build_strategy
from usllm.training.sharding import units


def test_names_stand_for_strategies_made_for_sketched_models() -> None:
    ddp = build_strategy("ddp")
    assert isinstance(ddp, DDPStrategy)
    assert ddp._ddp_kwargs["broadcast_buffers"] is False
    sharded, offloaded = build_strategy("fsdp2"), build_strategy("fsdp2_cpu_offload")
    assert isinstance(sharded, Fsdp2Strategy)
    assert isinstance(offloaded, Fsdp2Strategy)
    assert (sharded.cpu_offload, offloaded.cpu_offload) == (False, True)


def test_offloading_command_of_the_scaling_page_composes() -> None:
    config = check_train(composed("model=llama31_8b", "trainer=fsdp2", "trainer.strategy=fsdp2_cpu_offload"))
    strategy = build_strategy(config.trainer["strategy"])
    assert isinstance(strategy, Fsdp2Strategy)
    assert strategy.cpu_offload


@pytest.mark.parametrize("strategy", ["auto", "ddp_spawn", DDPStrategy()])
def test_other_strategies_are_left_to_lightning(strategy: object) -> None:
    assert build_strategy(strategy) is strategy


@pytest.mark.parametrize("tied", [True, False])
def test_tied_embeddings_and_head_stay_in_one_unit(tied: bool) -> None:
    config = random_config("llama")
    config.tie_word_embeddings = tied
    model = AutoModelForCausalLM.from_config(config)
    layers = list(model.model.layers)
    ends = [] if tied else [model.model.embed_tokens, model.lm_head]
    assert units(model) == [*layers, *ends]


def test_model_that_names_no_parts_is_one_unit() -> None:
    assert units(nn.Linear(2, 2)) == []
