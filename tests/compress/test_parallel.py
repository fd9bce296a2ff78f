"""Layers side by side on several threads give what one thread gives."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from usllm.compress import CompressedLinear, compress_, compressed_layers
from usllm.compress.parallel import over_layers
from usllm.models.random_model import random_model
from usllm.sketch import SketchConfig


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """Number of threads that torch computes with during the test."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture
def layers() -> dict[str, CompressedLinear]:
    model = random_model("llama")
    compress_(model, SketchConfig(bits_per_weight=2.0, rows=2, group_size=32))
    return compressed_layers(model)


def test_results_come_by_name_in_the_order_of_the_layers(layers: dict[str, CompressedLinear], threads: int) -> None:
    assert list(over_layers(lambda layer: layer.name, layers).items()) == [(name, name) for name in layers]


def test_projection_on_threads_equals_one_layer_after_the_other(
    layers: dict[str, CompressedLinear], threads: int
) -> None:
    with torch.no_grad():
        for layer in layers.values():
            layer.weight.copy_(layer.weight.roll(1, 0))
    changes = over_layers(CompressedLinear.reproject, layers)
    states = {name: {key: value.clone() for key, value in layer.states.items()} for name, layer in layers.items()}
    assert all(float(change.winner_change) > 0 for change in changes.values())
    for name, layer in layers.items():
        assert float(layer.reproject().winner_change) == 0
        assert all(torch.equal(states[name][key], value) for key, value in layer.states.items())


def test_thread_count_is_as_before(layers: dict[str, CompressedLinear], threads: int) -> None:
    over_layers(CompressedLinear.reproject, layers)
    assert torch.get_num_threads() == threads


def test_error_of_a_layer_is_raised_and_the_thread_count_is_as_before(
    layers: dict[str, CompressedLinear], threads: int
) -> None:
    def fail(layer: CompressedLinear) -> None:
        raise ValueError(layer.name)

    with pytest.raises(ValueError, match=next(iter(layers))):
        over_layers(fail, layers)
    assert torch.get_num_threads() == threads


def test_no_graph_is_recorded_on_the_threads(layers: dict[str, CompressedLinear], threads: int) -> None:
    over_layers(CompressedLinear.reproject, layers)
    assert not any(state.requires_grad for layer in layers.values() for state in layer.states.values())


def test_no_layers_give_no_results(threads: int) -> None:
    assert over_layers(CompressedLinear.reproject, {}) == {}
