from __future__ import annotations

import pytest
import torch
from tiny_run import load_model

from usllm.system.errors import UserError
from usllm.training.objectives import CrossEntropy, Distill, build_objective, next_token_loss


def test_names_of_the_configuration_build_their_objectives() -> None:
    assert isinstance(build_objective("cross_entropy"), CrossEntropy)
    objective = build_objective("distill", temperature=3.0, hidden_weight=2.0)
    assert isinstance(objective, Distill)
    assert (objective.temperature, objective.hidden_weight) == (3.0, 2.0)


def test_unknown_name_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UserError, match=r"objective\.name='mse'.*cross_entropy, distill"):
        build_objective("mse")


def test_argument_that_the_objective_does_not_take_is_refused() -> None:
    with pytest.raises(UserError, match="temperature"):
        build_objective("cross_entropy", temperature=2.0)


def test_cross_entropy_is_the_loss_on_the_text_and_has_no_parts() -> None:
    model, input_ids = load_model().eval(), torch.randint(0, 256, (2, 9))
    loss, parts = CrossEntropy().loss(model, {"input_ids": input_ids})
    torch.testing.assert_close(loss, next_token_loss(model(input_ids=input_ids).logits, input_ids))
    assert not parts
