"""What benchmarks measure against decodes as the sketch does."""

from __future__ import annotations

import torch
from cases import case, every_case

from benchmarks.baselines import matrix_query
from usllm import sketch


@every_case
def test_matrix_form_decodes_alike(name: str) -> None:
    layer = case(name)
    if not layer.plan.config.output_scale:
        assert torch.equal(matrix_query(layer.states, layer.plan), sketch.query(layer.states, layer.plan))
