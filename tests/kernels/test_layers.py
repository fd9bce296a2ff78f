"""Layers whose products are made straight from the states, as those of shards are on a card, on every backend."""

from __future__ import annotations

import copy

import pytest
import torch
from cases import slow_interpreted
from torch import Tensor, nn

from usllm.compress import CompressedLinear
from usllm.compress.methods.sketch import SketchCompressor, SketchPlan, computing
from usllm.packed.config import PackedLayerEntry
from usllm.packed.linear import PackedLinear
from usllm.sketch import SketchConfig, build_plan
from usllm.sketch.layer_bytes import pack_layer

SHAPE = (40, 24)
CONFIG = SketchConfig(bits_per_weight=3.0, allocation="waterfill", output_scale=True, group_size=16)


@pytest.fixture(autouse=True)
def _chosen(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("USLLM_KERNELS", backend)


def layer(device: torch.device) -> CompressedLinear:
    torch.manual_seed(0)
    made = CompressedLinear(nn.Linear(SHAPE[1], SHAPE[0]), "layer").to(device)
    importance = torch.rand(SHAPE[1]) ** 4
    made.set_plan(computing(build_plan(SHAPE, importance, CONFIG, "layer")), importance)
    made.reproject()
    return made


def step(made: CompressedLinear, x: Tensor, autocast: bool) -> list[Tensor]:
    x = x.clone().requires_grad_()
    with torch.autocast(x.device.type, torch.bfloat16, enabled=autocast):
        y = made(x)
    y.float().square().sum().backward()
    assert made.weight.grad is not None and made.bias is not None and made.bias.grad is not None and x.grad is not None
    return [y.detach(), x.grad, made.weight.grad, made.bias.grad]


@pytest.mark.parametrize("autocast", [False, *slow_interpreted(True)], ids=["float32", "autocast"])
@pytest.mark.parametrize("tokens", [2, *slow_interpreted(20)])
def test_fused_training_is_that_with_a_decoded_copy(
    tokens: int, autocast: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = layer(device)
    x = torch.randn(1, tokens, SHAPE[1], generator=torch.Generator().manual_seed(tokens)).to(device)
    monkeypatch.setattr(SketchPlan, "decodes_on", frozenset({device.type}))
    expected = step(copy.deepcopy(made), x, autocast)
    monkeypatch.setattr(SketchPlan, "decodes_on", frozenset())
    fused = copy.deepcopy(made)
    found = step(fused, x, autocast)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        scale = float(other.float().abs().max())
        torch.testing.assert_close(one, other, rtol=0, atol=scale * (3e-2 if autocast else 1e-5))


def test_fused_layers_keep_no_decoded_weight(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SketchPlan, "decodes_on", frozenset())
    made = layer(device)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda value: kept.append(value) or value, lambda value: value):
        made(torch.randn(2, SHAPE[1], device=device).requires_grad_()).sum().backward()
    made.reproject()
    assert made._decoded is None
    assert not any(value.shape == SHAPE and value.data_ptr() != made.weight.data_ptr() for value in kept)


@pytest.mark.parametrize("dtype", [*slow_interpreted(torch.float32), torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [*slow_interpreted(1), 20])
def test_packed_layers_compute_straight_from_their_bytes(
    tokens: int, dtype: torch.dtype, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = layer(device)
    assert made.plan is not None
    packed = pack_layer(made.plan, {name: value.cpu() for name, value in made.states.items()})
    entry = PackedLayerEntry(shape=SHAPE, bytes=packed.numel())
    inference = PackedLinear(entry, SketchCompressor(CONFIG), "layer", bias=True, dtype=dtype).to(device)
    inference.packed.copy_(packed)
    assert made.bias is not None and inference.bias is not None
    inference.bias.data.copy_(made.bias)
    monkeypatch.setattr(SketchPlan, "decodes_on", frozenset())
    monkeypatch.setattr(inference, "decoded_weight", None)  # calling it would raise
    x = torch.randn(1, tokens, SHAPE[1], generator=torch.Generator().manual_seed(1)).to(device, dtype)
    with torch.no_grad():
        y = inference(x)
        expected = made.decoded_weight().to(dtype).double() @ x[0].double().t()
    assert y.dtype == dtype and y.shape == (1, tokens, SHAPE[0])
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    expected = expected.t() + inference.bias.double()
    torch.testing.assert_close(y[0].double(), expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))
