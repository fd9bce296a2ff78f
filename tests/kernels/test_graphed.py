"""Projection replayed as a CUDA graph, on a card: states and decoded weights are those of launches, bit for bit."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from torch import nn

from usllm.compress import CompressedLinear, Reprojection, compressed_layers, reproject_
from usllm.compress.graphed import graph_of
from usllm.compress.methods.sketch import SketchCompressor
from usllm.compress.values import Statistics
from usllm.sketch import SketchConfig

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA: there are no graphs without it"),
]

SHAPES = [(320, 192), (129, 257)]
CONFIGS = {
    "sign": SketchConfig(
        bits_per_weight=1.0,
        operator="mean",
        state_bits=1,
        rows=1,
        allocation="waterfill",
        output_scale=True,
        train_output_scale=True,
        rounding="nearest",
        group_size=64,
    ),
    "keeps members": SketchConfig(bits_per_weight=4.0, rows=2, group_size=64),
}


def model(config: SketchConfig) -> nn.ModuleList:
    torch.manual_seed(0)
    made = nn.ModuleList()
    for number, (rows, columns) in enumerate(SHAPES):
        layer = CompressedLinear(nn.Linear(columns, rows), f"layer{number}").cuda()
        energy = (torch.rand(columns) ** 4 + 1e-4).cuda()
        compressor = SketchCompressor(config)
        bits = int(config.bits_per_weight * rows * columns)
        plan = compressor.plan((rows, columns), layer.name, Statistics(energy=energy.cpu()), bits)
        latents = plan.start(layer.latent_weight(), Statistics(energy=energy))
        layer.set_plan(plan, energy, latents)
        made.append(layer)
    return made


def use(layers: nn.ModuleList) -> None:
    with torch.autocast("cuda", torch.bfloat16):
        for layer in compressed_layers(layers).values():
            layer(torch.ones(4, layer.in_features, device="cuda"))


def compare(one: nn.ModuleList, other: nn.ModuleList) -> None:
    for mine, theirs in zip(compressed_layers(one).values(), compressed_layers(other).values(), strict=True):
        for name, state in mine.states.items():
            assert torch.equal(state, theirs.states[name]), name
        assert mine.kept_decoded is not None and theirs.kept_decoded is not None
        assert mine.kept_decoded.dtype == theirs.kept_decoded.dtype
        assert torch.equal(mine.kept_decoded, theirs.kept_decoded)


@pytest.mark.parametrize("name", list(CONFIGS))
def test_replays_are_what_launches_one_by_one_give(name: str) -> None:
    graphed = model(CONFIGS[name])
    plain = copy.deepcopy(graphed)
    generator = torch.Generator("cuda").manual_seed(1)
    for _ in range(7):
        for mine, theirs in zip(graphed.parameters(), plain.parameters(), strict=True):
            noise = torch.randn(mine.shape, generator=generator, device="cuda")
            with torch.no_grad():
                mine.add_(noise, alpha=0.02)
                theirs.add_(noise, alpha=0.02)
        found = reproject_(graphed)
        expected = {name: layer.reproject() for name, layer in compressed_layers(plain).items()}
        for layer, change in found.items():
            assert isinstance(change, Reprojection)
            torch.testing.assert_close(torch.stack(list(change)), torch.stack(list(expected[layer])), rtol=1e-5, atol=0)
        compare(graphed, plain)
        use(graphed)
        use(plain)
    known = graph_of(graphed)
    assert known is not None and known.captured


def test_a_graph_is_made_anew_when_a_tensor_moves() -> None:
    graphed = model(CONFIGS["sign"])
    for _ in range(4):
        reproject_(graphed)
        use(graphed)
    before = graph_of(graphed)
    assert before is not None and before.captured
    layer = next(iter(compressed_layers(graphed).values()))
    layer.weight.data = layer.weight.detach().clone()
    plain = copy.deepcopy(graphed)
    copied = next(iter(compressed_layers(plain).values()))
    for _ in range(4):
        with torch.no_grad():
            layer.weight.mul_(-1.1)
            copied.weight.mul_(-1.1)
        reproject_(graphed)
        for each in compressed_layers(plain).values():
            each.reproject()
        compare(graphed, plain)
    known = graph_of(graphed)
    assert known is not None and known is not before and known.captured


def test_a_graph_holds_the_tables_that_its_kernels_read() -> None:
    graphed = model(CONFIGS["sign"])
    reproject_(graphed)
    copied = copy.deepcopy(graphed)  # plans of equal content: the first ones that were seen are those of the original
    for _ in range(3):
        reproject_(copied)
    del graphed
    gc.collect()
    torch.empty(1 << 24, device="cuda").fill_(float("nan"))  # where freed tables were
    plain = copy.deepcopy(copied)
    for _ in range(2):
        reproject_(copied)
        for layer in compressed_layers(plain).values():
            layer.reproject()
        compare(copied, plain)
