"""When projections become a graph, when it is given up, and what is left where none can be made."""

from __future__ import annotations

import copy
import gc
import sys
import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import nn

from usllm.compress import CompressedLinear, compressed_layers, reproject_
from usllm.compress.graphed import graph_of, reproject_graphed
from usllm.compress.methods.sketch import computing
from usllm.sketch import SketchConfig, build_plan

SHAPES = {"first": (40, 24), "second": (24, 40)}


def model() -> nn.ModuleList:
    made = nn.ModuleList()
    for name, (rows, columns) in SHAPES.items():
        layer = CompressedLinear(nn.Linear(columns, rows), name)
        plan = build_plan((rows, columns), None, SketchConfig(bits_per_weight=3.0, group_size=16), name)
        layer.set_plan(computing(plan))
        made.append(layer)
    return made


class Graph:
    """A card's graph, of which replaying is all that can be told."""

    replays = 0

    def replay(self) -> None:
        type(self).replays += 1


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A card whose graphs are made as torch makes them; what happened to streams, in order."""
    happened: list[str] = []

    @contextmanager
    def capturing(graph: Graph, capture_error_mode: str) -> Iterator[None]:
        happened.append("stream of the capture")
        try:
            yield
        finally:  # as its end does, where anything has failed
            if sys.exc_info()[0] is not None:
                raise RuntimeError("operation failed due to a previous error during capture")
        happened.append("stream of before")

    monkeypatch.setattr(Graph, "replays", 0)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", capturing)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: "stream of before")
    monkeypatch.setattr(torch.cuda, "set_stream", happened.append)
    return happened


def projected_often(made: nn.ModuleList, times: int) -> list[str]:
    """New latents each time; what was said."""
    layers, said = compressed_layers(made), []
    for _ in range(times):
        with torch.no_grad():
            for layer in layers.values():
                layer.weight.normal_()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found = reproject_graphed(made, layers)
        assert found.keys() == layers.keys()
        said += [str(each.message) for each in caught]
    return said


def test_a_graph_is_made_after_two_projections_that_found_all_in_place(card: list[str]) -> None:
    made = model()
    projected_often(made, 2)
    assert card == [] and Graph.replays == 0
    projected_often(made, 2)
    known = graph_of(made)
    assert known is not None and known.captured and Graph.replays == 2
    assert card == ["stream of the capture", "stream of before", "stream of before"]


@pytest.mark.parametrize("what", ["latent", "state", "plan", "type"])
def test_a_graph_is_given_up_when_anything_is_elsewhere(what: str, card: list[str]) -> None:
    made = model()
    projected_often(made, 3)
    before, layer = graph_of(made), compressed_layers(made)["second"]
    assert before is not None and before.captured
    if what == "latent":
        layer.weight.data = layer.weight.detach().clone()
    elif what == "state":
        layer.state_codes = layer.state_codes.clone()
    elif what == "plan":
        layer.set_plan(copy.deepcopy(layer.plan))
    else:
        with torch.autocast("cpu", torch.bfloat16):
            layer(torch.ones(1, 40))
    projected_often(made, 1)
    assert Graph.replays == 1  # this one was launched
    projected_often(made, 2)
    assert Graph.replays == 2
    assert graph_of(made) is not before


def test_a_capture_that_fails_leaves_all_as_launches_leave_it(card: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    made = model()
    layers = compressed_layers(made)
    projected_often(made, 2)
    plan, failing = layers["second"].plan, [True]
    assert plan is not None
    encode = plan.encode

    def fails_once(*args: Any, **kwargs: Any) -> Any:
        if failing:
            failing.clear()
            raise ValueError("nothing is copied while a stream is captured")
        return encode(*args, **kwargs)

    object.__setattr__(plan, "encode", fails_once)
    said = projected_often(made, 1)
    assert len(said) == 1 and "nothing is copied while a stream is captured" in said[0]
    assert card[-1] == "stream of before"
    assert projected_often(made, 2) == [] and Graph.replays == 0
    expected = model()
    expected.load_state_dict(made.state_dict())
    reproject_(expected)
    for name, layer in layers.items():
        for state, value in layer.states.items():
            assert torch.equal(value, compressed_layers(expected)[name].states[state])
        assert layer.kept_decoded is not None
        assert torch.equal(layer.kept_decoded, layer.decoded_weight())


def test_no_model_outlives_its_graph(card: list[str]) -> None:
    layer = model()[0]
    for _ in range(4):
        reproject_graphed(layer, {"first": layer})  # the model is the layer itself
    gone = weakref.ref(layer)
    del layer
    gc.collect()
    assert gone() is None


def test_backward_sees_that_a_replay_has_written(card: list[str]) -> None:
    made = model()
    projected_often(made, 2)
    layer = compressed_layers(made)["first"]
    projected_often(made, 1)
    y = layer(torch.ones(2, 24, requires_grad=True))
    projected_often(made, 1)
    with pytest.raises(RuntimeError, match=r"modified (by an )?inplace"):
        y.sum().backward()


def test_where_no_graph_can_be_made_it_is_said_once(card: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> Graph:
        raise RuntimeError("this card makes no graphs")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", none)
    said = projected_often(model(), 5)
    assert len(said) == 1 and "this card makes no graphs" in said[0]
