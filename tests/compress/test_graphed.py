"""Where no graph can be made, layers are projected launch by launch, and it is said once."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

from usllm.compress import CompressedLinear, compressed_layers, reproject_
from usllm.compress.graphed import graph_of, reproject_graphed
from usllm.compress.methods.sketch import computing
from usllm.sketch import SketchConfig, build_plan


def model() -> nn.ModuleList:
    layer = CompressedLinear(nn.Linear(24, 40), "layer")
    layer.set_plan(computing(build_plan((40, 24), None, SketchConfig(bits_per_weight=3.0, group_size=16), "layer")))
    return nn.ModuleList([layer])


@pytest.mark.skipif(torch.cuda.is_available(), reason="a card makes graphs: tests/kernels/test_graphed.py")
def test_states_follow_the_latents_all_the_same() -> None:
    made = model()
    layers = compressed_layers(made)
    said = []
    for _ in range(5):
        with torch.no_grad():
            layers["layer"].weight.normal_()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found = reproject_graphed(made, layers)
        said += [str(each.message) for each in caught]
        expected = model()
        expected.load_state_dict(made.state_dict())
        reproject_(expected)
        for name, state in compressed_layers(expected)["layer"].states.items():
            assert torch.equal(state, layers["layer"].states[name])
        assert found.keys() == {"layer"}
    known = graph_of(made)
    assert known is not None and not known.captured
    assert len(said) == 1 and "no CUDA graph could be made" in said[0]
