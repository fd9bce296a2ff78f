"""Codes in output order: every back end against the reference, on shapes that fill no word and no block."""

from __future__ import annotations

import pytest
import torch
from backends import unusable
from hypothesis import given, settings
from hypothesis import strategies as st

from usllm_kernels import Codes, make_planes, plane_linear, plane_weight
from usllm_kernels.dispatch import installed, interpreted
from usllm_kernels.planes import OUTPUTS, SIGNS, Levels, Planes, planes_bytes

ALL = [SIGNS, Levels(-3, 3, 2), Levels(-1, 1, 1), Levels(-7, 7, 1), Levels(-3, 3, 1), Levels(-255, 255, 2)]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
layers = st.tuples(
    st.integers(1, 140), st.integers(1, 150), st.sampled_from(ALL), st.sampled_from([None, 1, 7, 32, 50])
)


def made(
    outputs: int, columns: int, levels: Levels, group_size: int | None, backend: str = "torch", extra: int = 9
) -> tuple[Planes, torch.Tensor]:
    """Planes of random codes, and the weight that they stand for."""
    generator = torch.Generator().manual_seed(outputs * columns)
    choices = (levels.most - levels.least) // levels.stride + 1
    codes = torch.randint(0, choices, (outputs, columns), generator=generator) * levels.stride + levels.least
    channels = torch.randperm(columns + extra, generator=generator)[:columns]
    scales = torch.randint(8, 16, (columns,), generator=generator) / 64  # four bits, as stored ones have
    groups = 1 if group_size is None else -(-columns // group_size)
    factors = torch.rand(outputs, groups, generator=generator) + 0.1
    weight = torch.zeros(outputs, columns + extra)
    wide = factors if group_size is None else factors.repeat_interleave(group_size, 1)[:, :columns]
    weight[:, channels] = (codes.float() * scales) * wide
    device = place(backend)
    given = [Codes(codes.to(device), levels, channels.to(device), scales.to(device))]
    planes = make_planes(given, columns + extra, factors.to(device), group_size, backend=backend)
    return planes, weight.to(device)


BACKENDS = [
    pytest.param(name, marks=pytest.mark.skipif(unusable(name) is not None, reason=str(unusable(name))))
    for name in ("torch", "numba", "triton")
]


def place(backend: str) -> torch.device:
    """Where a back end is tested."""
    return torch.device("cuda" if backend == "triton" and not interpreted() else "cpu")


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=8 if interpreted() else 60, deadline=None)  # 60 are 12 seconds there
@given(layer=layers, tokens=st.sampled_from([0, 1, 2, 5, 24, 25, 40]), dtype=st.sampled_from(DTYPES))
def test_planes_hold_the_weight_and_multiply_with_it(
    backend: str, layer: tuple[int, int, Levels, int | None], tokens: int, dtype: torch.dtype
) -> None:
    planes, weight = made(*layer, backend=backend)
    outputs, columns, levels, group_size = layer
    assert planes.nbytes == planes_bytes(outputs, [(columns, levels)], group_size)
    for kind in DTYPES:
        assert torch.equal(plane_weight(planes, kind, backend=backend), weight.to(kind))
    x = torch.randn(tokens, weight.shape[1], generator=torch.Generator().manual_seed(1)).to(weight.device, dtype)
    found = plane_linear(x, planes, backend=backend)
    assert found.dtype == dtype and found.shape == (tokens, outputs)
    expected = x.double() @ weight.t().double()
    # A sum of rounded numbers: in units of the last place of what is added up.
    most = weight.t().double().abs()
    if levels.bits > 1 and backend != "torch" and tokens <= 24:  # signs of a wide code, which may cancel, are added up
        added = torch.zeros(weight.shape[1], device=weight.device, dtype=torch.float64)
        added.index_add_(0, planes.channels.long(), (planes.scales.abs() + planes.offsets.abs()).double())
        most = most.maximum(added[:, None] * planes.factors.max())
    unit = torch.finfo(dtype).eps * (x.double().abs() @ most)
    assert bool(((found.double() - expected).abs() <= 3 * unit + 1e-30).all())


@pytest.mark.parametrize("levels", [SIGNS, Levels(-7, 7, 1)])
def test_planes_are_the_same_whatever_type_is_the_default_one(levels: Levels) -> None:
    """Servers make the model's type the default one while they load."""
    numbers = torch.randint(2, (70, 45)) * levels.stride + levels.least
    given = [Codes(numbers, levels, torch.arange(45), torch.rand(45))]
    factors, planes = torch.rand(70, 2), []
    for default in (torch.float32, torch.bfloat16):
        try:
            torch.set_default_dtype(default)
            planes.append(make_planes(given, 45, factors, 32, backend="torch"))
        finally:
            torch.set_default_dtype(torch.float32)
    for found, wanted in zip(planes[1].tensors, planes[0].tensors, strict=True):
        assert found.dtype == wanted.dtype
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tokens", [1, 30])
@pytest.mark.parametrize("wide", [3, 60])
def test_channels_of_several_widths_are_one_matrix(backend: str, tokens: int, wide: int) -> None:
    generator, inputs, device = torch.Generator().manual_seed(0), 40 + wide + 5, place(backend)
    channels = torch.randperm(inputs, generator=generator)
    weight, widths = torch.zeros(70, inputs), []
    for levels, mine in ((SIGNS, channels[:40]), (Levels(-7, 7, 1), channels[40 : 40 + wide])):
        choices = (levels.most - levels.least) // levels.stride + 1
        codes = torch.randint(0, choices, (70, len(mine)), generator=generator) * levels.stride + levels.least
        scales = torch.randint(8, 16, (len(mine),), generator=generator) / 64
        widths.append(Codes(codes.to(device), levels, mine.to(device), scales.to(device)))
        weight[:, mine] = codes * scales
    weight = weight.to(device)
    planes = make_planes(widths, inputs, backend=backend)
    assert planes.nbytes == planes_bytes(70, [(40, SIGNS), (wide, Levels(-7, 7, 1))])
    assert torch.equal(plane_weight(planes, backend=backend), weight)
    x = torch.randn(tokens, inputs, generator=generator).to(device)
    torch.testing.assert_close(plane_linear(x, planes, backend=backend), x @ weight.t(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_words_are_the_same_bits_on_every_back_end(backend: str) -> None:
    for levels in ALL:
        words = [made(130, 70, levels, 50, each)[0].words.cpu() for each in ("torch", backend)]
        assert torch.equal(*words)


@pytest.mark.parametrize("backend", BACKENDS[1:])
@pytest.mark.parametrize("tokens", [1, 7, 30])
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("levels", [SIGNS, Levels(-7, 7, 1)], ids=["signs", "four bits"])
def test_nothing_is_read_before_it_is_written(backend: str, tokens: int, levels: Levels) -> None:
    planes, weight = made(100, 90, levels, None, backend)
    x = torch.randn(tokens, weight.shape[1]).to(weight.device)
    found = plane_linear(x, planes, backend=backend)
    torch.testing.assert_close(found, x @ weight.t(), rtol=1e-4, atol=1e-3)


@pytest.mark.skipif(not installed("numba"), reason="no numba")
@pytest.mark.parametrize("levels", [SIGNS, Levels(-7, 7, 1)], ids=["signs", "four bits"])
def test_every_number_of_threads_gives_the_same_bits(levels: Levels, monkeypatch: pytest.MonkeyPatch) -> None:
    from usllm_kernels.cpu import plane_linear as driver

    planes, _ = made(5 * OUTPUTS + 3, 200, levels, None, "numba")
    x = torch.randn(3, planes.shape[1])
    monkeypatch.setattr(driver, "_LEAST_SHARED", 1)
    threads, found = torch.get_num_threads(), []
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            found.append(plane_linear(x, planes, backend="numba"))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@pytest.mark.skipif(not installed("numba"), reason="no numba")
def test_every_set_of_instructions_adds_up_in_the_same_order() -> None:
    import numpy as np
    from llvmlite import binding
    from numba import njit

    from usllm_kernels.cpu.lookup import INSTRUCTIONS, TABLE, TABLES, table_sums

    generator = np.random.default_rng(0)
    words = generator.integers(-(2**31), 2**31, (3, OUTPUTS), dtype=np.int64).astype(np.int32)
    tables = generator.standard_normal((3, TABLES, TABLE)).astype(np.float32)
    expected = np.zeros(OUTPUTS, np.float32)
    for row in range(3):
        for number in range(TABLES):
            expected += tables[row, number][(words[row].view(np.uint32) >> np.uint32(4 * number)) & 15]
    has, tried = binding.get_host_cpu_features(), 0
    for feature in INSTRUCTIONS:
        if feature and not has.get(feature):
            continue
        sums = table_sums(feature)
        found = np.full(OUTPUTS, np.nan, np.float32)
        njit(lambda words, tables, found, sums=sums: sums(words, 0, tables, 0, 3, found, 0))(words, tables, found)
        assert np.array_equal(found, expected), feature
        tried += 1
    assert tried


def test_a_product_is_compiled_whole() -> None:
    planes, weight = made(70, 40, SIGNS, None)
    compiled = torch.compile(lambda x: plane_linear(x, planes), fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 3, weight.shape[1])
    torch.testing.assert_close(compiled(x), plane_linear(x, planes), rtol=0, atol=0)
    torch.library.opcheck(torch.ops.usllm.plane_linear.default, (x, list(planes.tensors), 70, "torch"))


def test_an_input_of_another_width_is_refused() -> None:
    planes, _ = made(70, 40, SIGNS, None)
    with pytest.raises(ValueError, match="the input has 5 channels, the layer 49"):
        plane_linear(torch.randn(2, 5), planes)


def test_a_layer_without_columns_gives_zeros() -> None:
    nothing = make_planes([Codes(torch.zeros(70, 0), SIGNS, torch.zeros(0), torch.zeros(0))], 9)
    for backend in ("torch", "auto"):
        assert not plane_linear(torch.randn(2, 9), nothing, backend=backend).any()
        assert not plane_weight(nothing, backend=backend).any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tokens", [2, 40])
def test_sizes_that_fp16_does_not_hold_on_the_way_are_right_in_the_end(backend: str, tokens: int) -> None:
    device = place(backend)
    codes, channels = torch.ones(64, 1024, device=device), torch.arange(1024, device=device)
    for scale, factor, size in ((1.0, 1e-3, 100.0), (1e-6, 1e3, 0.01)):
        given = [Codes(codes, SIGNS, channels, torch.full((1024,), scale, device=device))]
        planes = make_planes(given, 1024, torch.full((64, 1), factor, device=device), backend=backend)
        x = torch.full((tokens, 1024), size, dtype=torch.float16, device=device)
        found = plane_linear(x, planes, backend=backend)
        torch.testing.assert_close(
            found.float().cpu(), torch.full((tokens, 64), 1024 * scale * factor * size), rtol=0.02, atol=0
        )


@pytest.mark.skipif(not installed("numba"), reason="no numba")
@pytest.mark.parametrize("tokens", [2, 40])
def test_an_infinite_input_that_no_channel_stores_reaches_no_output(tokens: int) -> None:
    codes = torch.ones(64, 40)
    given = [Codes(codes, SIGNS, torch.arange(1, 41), torch.ones(40))]  # the first input is read by nobody
    x = torch.ones(tokens, 41)
    x[:, 0] = torch.inf
    found = plane_linear(x, make_planes(given, 41, backend="numba"), backend="numba")
    assert torch.equal(found, torch.full((tokens, 64), 40.0))  # where the reference multiplies with zeros


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_product_of_doubles_and_one_with_a_graph(backend: str) -> None:
    planes, weight = made(70, 40, SIGNS, None, backend)
    x = torch.randn(3, 49, dtype=torch.float64, device=weight.device)
    torch.testing.assert_close(plane_linear(x, planes, backend=backend), x @ weight.double().t())
    x = torch.randn(3, 49, requires_grad=True, device=weight.device)
    found = plane_linear(x, planes, backend=backend)
    assert found.is_contiguous() and not found.requires_grad
