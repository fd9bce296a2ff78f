"""What is held of packed layers: every layout computes the same, within the memory that it was given."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from tiny_packed import logits, pack, sketched_model

import usllm
from usllm.compress import Statistics
from usllm.compress.methods.rounding import RoundingCompressor
from usllm.packed.config import PackedLayerEntry
from usllm.packed.export import RestStorage
from usllm.packed.layouts import MOST_BITS, choose_layouts_
from usllm.packed.linear import PackedLinear, packed_layers
from usllm.rounding import RoundingConfig
from usllm.system.errors import UserError


def held(model: torch.nn.Module) -> int:
    """Bytes besides what is stored."""
    found = 0
    for layer in packed_layers(model).values():
        found += 0 if layer._decoded is None else layer._decoded.nbytes
        found += 0 if layer._expanded is None else layer._expanded.nbytes
    return found


@pytest.fixture(scope="module", params=["mixed widths", "signs"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A packed model whose codes take more than 1.5 bits in output order, and one whose codes take one."""
    signs = {"operator": "mean", "rows": 1, "state_bits": 1, "bits_per_weight": 1.0, "output_scale": True}
    sketch = signs if request.param == "signs" else {"allocation": "waterfill"}
    model = sketched_model(**sketch)
    return pack(model, tmp_path_factory.mktemp("layouts") / "packed", RestStorage("float32"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_layout_computes_the_same(folder: Path, dtype: torch.dtype) -> None:
    wanted = logits(usllm.load(folder, dtype=dtype, layout="compact")).float()
    for layout in ("expanded", "decoded"):
        found = logits(usllm.load(folder, dtype=dtype, layout=layout)).float()
        tolerance = 1e-4 if dtype == torch.float32 else 0.05
        assert (found - wanted).abs().max() <= tolerance * wanted.abs().max()


def test_codes_in_output_order_decode_to_the_same_bits(folder: Path) -> None:
    for layer in packed_layers(usllm.load(folder, layout="expanded")).values():
        assert layer.layout == "expanded"
        for dtype in (torch.float32, torch.bfloat16):
            assert torch.equal(layer.expanded.weight(dtype), layer.decoded_weight(dtype))


@pytest.mark.parametrize("layout", ["expanded", "decoded"])
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_what_is_held_stays_inside_the_memory_that_is_given(folder: Path, layout: str, share: float) -> None:
    model = usllm.load(folder, dtype=torch.bfloat16, layout=layout)
    logits(model)
    everything = held(model)
    memory = int(share * everything)
    found = choose_layouts_(model, layout, memory)
    logits(model)
    assert held(model) <= memory
    assert (set(found.values()) == {layout}) == (share == 1.0)
    assert (held(model) > 0) == (share > 0)
    choose_layouts_(model, "compact")
    logits(model)
    assert held(model) == 0


def test_auto_never_expands_where_bits_are_those_of_training(folder: Path) -> None:
    model = usllm.load(folder, dtype=torch.bfloat16)
    choose_layouts_(model, "expanded")
    for layer in packed_layers(model).values():
        layer.automatic = True
    exact = usllm.load(folder, dtype=torch.float32)
    assert {layer.layout for layer in packed_layers(exact).values()} == {"compact"}
    for layer in packed_layers(model).values():  # computing in float32 after all
        x = torch.randn(2, layer.in_features)
        assert torch.equal(layer(x), torch.nn.functional.linear(x, layer.decoded_weight(), layer.bias))


def rounded(*widths: tuple[int, int]) -> torch.nn.Module:
    """Packed layers of 512 inputs, each of so many outputs and bits a weight."""
    layers = []
    for number, (outputs, bits) in enumerate(widths):
        compressor = RoundingCompressor(RoundingConfig(bits=bits))
        plan = compressor.plan((outputs, 512), str(number), Statistics(energy=None), 1 << 30)
        packed = plan.pack(plan.encode({"weight": torch.randn(outputs, 512)}).states)
        entry = PackedLayerEntry((outputs, 512), packed.numel())
        layers.append(PackedLinear(entry, compressor, str(number), dtype=torch.bfloat16))
        layers[-1].packed.copy_(packed)
    model = torch.nn.Sequential(*layers)
    model.dtype = torch.bfloat16  # as transformers' models tell it
    return model


@pytest.mark.parametrize(
    ("widths", "expanded"),
    [
        ([(512, 1)], "0"),
        ([(512, 2)], ""),
        ([(2048, 1), (256, 2)], "01"),  # 1.3 bits together
        ([(512, 1), (512, 2)], "0"),  # 1.7 bits together
    ],
)
def test_auto_expands_all_that_together_stay_small_or_what_does_by_itself(
    widths: list[tuple[int, int]], expanded: str
) -> None:
    model = rounded(*widths)
    found = choose_layouts_(model)
    assert "".join(name for name, layout in found.items() if layout == "expanded") == expanded
    taken, weights = held(model), sum(512 * outputs for outputs, _ in widths)
    assert 8 * taken <= MOST_BITS * weights
    assert set(choose_layouts_(model, "auto", 1000).values()) == {"compact"}


def test_what_was_asked_for_is_made_once_and_nothing_else(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    whole = PackedLinear.set_layout

    def counting(layer: PackedLinear, layout: str, automatic: bool = False) -> None:
        made.append(layout)
        whole(layer, layout, automatic)

    monkeypatch.setattr(PackedLinear, "set_layout", counting)
    for layout in ("compact", "expanded", "decoded"):
        made.clear()
        model = usllm.load(folder, dtype=torch.bfloat16, layout=layout)
        assert made == [layout] * len(packed_layers(model))


def test_transformers_own_loader_chooses_too(folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    ours = packed_layers(usllm.load(folder, dtype=torch.bfloat16))
    theirs = packed_layers(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16))
    assert {name: layer.layout for name, layer in theirs.items()} == {n: layer.layout for n, layer in ours.items()}


def test_layers_that_are_copied_or_loaded_anew_forget_what_they_held(folder: Path) -> None:
    model = usllm.load(folder, dtype=torch.bfloat16, layout="expanded")
    wanted, before = logits(model), held(model)
    stored = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.to("cpu")
    assert held(model) == before > 0
    twin = copy.deepcopy(model)
    assert (held(twin), held(model)) == (0, before)
    assert torch.equal(logits(twin), wanted)
    model.load_state_dict(stored)
    assert held(model) == 0
    assert torch.equal(logits(model), wanted)


@pytest.mark.parametrize("layout", ["expanded", "decoded"])
def test_every_layout_is_compiled_whole(folder: Path, layout: str) -> None:
    layer = next(iter(packed_layers(usllm.load(folder, dtype=torch.bfloat16, layout=layout)).values()))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, layer.in_features, dtype=torch.bfloat16)
    with torch.no_grad():
        assert torch.equal(compiled(x), layer(x))


def test_gradient_of_the_input_is_that_of_the_decoded_weight(folder: Path) -> None:
    for layer in packed_layers(usllm.load(folder, dtype=torch.float32, layout="expanded")).values():
        x = torch.randn(2, 5, layer.in_features, requires_grad=True)
        gradient = torch.randn(2, 5, layer.out_features)
        layer(x).backward(gradient)
        assert x.grad is not None
        torch.testing.assert_close(x.grad, gradient @ layer.decoded_weight(), rtol=1e-4, atol=1e-4)


def test_a_layout_that_does_not_exist_is_refused(folder: Path) -> None:
    model = usllm.load(folder)
    with pytest.raises(UserError, match="layout='dense': is unknown; choose one of auto, compact, expanded, decoded"):
        choose_layouts_(model, "dense")
    layer: PackedLinear = next(iter(packed_layers(model).values()))
    with pytest.raises(ValueError, match="has no layout 'dense'"):
        layer.set_layout("dense")
