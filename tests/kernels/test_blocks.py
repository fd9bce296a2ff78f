"""Products with blocks of GGUF: every back end against the decoded weight."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from usllm.packed.blocks import pack_blocks
from usllm_kernels import block_linear
from usllm_kernels.blocks import unpack_blocks
from usllm_kernels.dispatch import installed

BACKENDS = ["torch", pytest.param("numba", marks=pytest.mark.skipif(not installed("numba"), reason="no numba"))]
numba = pytest.mark.skipif(not installed("numba"), reason="no numba")


def packed(rows: int, columns: int, bits: int, size: float = 1.0) -> torch.Tensor:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows * columns)) * size
    return pack_blocks(weight, bits)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 70),
    blocks=st.integers(1, 5),
    bits=st.sampled_from([8, 4]),
    tokens=st.sampled_from([0, 1, 2, 6, 7, 30]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    size=st.sampled_from([1.0, 1e-6, 1e3]),  # scales of normal numbers, of denormal ones, and large ones
)
def test_product_is_that_of_the_decoded_weight(
    backend: str, rows: int, blocks: int, bits: int, tokens: int, dtype: torch.dtype, size: float
) -> None:
    codes = packed(rows, 32 * blocks, bits, size)
    x = torch.randn(tokens, 32 * blocks, generator=torch.Generator().manual_seed(1)).to(dtype)
    found = block_linear(x, codes, bits, backend=backend)
    assert found.dtype == dtype and found.shape == (tokens, rows)
    weight = unpack_blocks(codes, bits).double()
    expected, largest = x.double() @ weight.t(), x.double().abs() @ weight.t().abs()
    # Four-bit codes are summed with the eight that is added to them.
    offset = 8 * x.double().abs() @ (weight.abs().amax(1, keepdim=True).expand_as(weight)).t() if bits == 4 else 0
    unit = torch.finfo(dtype).eps * largest + torch.finfo(torch.float32).eps * (largest + offset)
    if torch.isfinite(found).all():
        assert bool(((found.double() - expected).abs() <= 3 * unit + torch.finfo(dtype).tiny).all())
    else:  # beyond what fp16 holds
        assert dtype == torch.float16 and bool(expected.abs().amax() > 6e4)


@numba
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("bits", [8, 4])
def test_nothing_is_read_before_it_is_written(bits: int) -> None:
    codes, x, bias = packed(37, 96, bits), torch.randn(2, 3, 96).bfloat16(), torch.randn(37).bfloat16()
    found = block_linear(x, codes, bits, bias, backend="numba").float()
    expected = x.float() @ unpack_blocks(codes, bits).t() + bias.float()
    torch.testing.assert_close(found, expected.bfloat16().float(), rtol=2**-7, atol=1e-3)


@numba
@pytest.mark.parametrize("bits", [8, 4])
def test_every_number_of_threads_gives_the_same_bits(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from usllm_kernels.ops.block_linear import numba as driver

    monkeypatch.setattr(driver, "_LEAST_SHARED", 1)
    codes, x = packed(101, 96, bits), torch.randn(3, 96).bfloat16()
    threads, found = torch.get_num_threads(), []
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            found.append(block_linear(x, codes, bits, backend="numba"))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@pytest.mark.parametrize("bits", [8, 4])
def test_a_product_is_compiled_whole(bits: int) -> None:
    codes, x = packed(37, 96, bits), torch.randn(2, 3, 96).bfloat16()
    compiled = torch.compile(lambda x: block_linear(x, codes, bits), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), block_linear(x, codes, bits))
    torch.library.opcheck(torch.ops.usllm.block_linear.default, (x, codes, bits, None, "torch"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_input_or_bytes_that_do_not_fit_are_refused(dtype: torch.dtype) -> None:
    codes = packed(8, 64, 8)
    for width in (32, 65, 128):
        with pytest.raises(ValueError, match=f"the input has {width} channels, the weight 64"):
            block_linear(torch.randn(1, width).to(dtype), codes, 8)
    with pytest.raises(ValueError, match="whole Q4_0 blocks"):
        block_linear(torch.randn(1, 64).to(dtype), codes, 4)


@numba
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("size", [1.0, 1e-6, 1e3])
def test_weights_that_many_tokens_multiply_are_the_decoded_ones(
    bits: int, size: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    from usllm_kernels.ops.block_linear import numba as implementation

    monkeypatch.setattr(implementation, "_DECODED", 7 * 96)  # some rows at a time
    codes = packed(37, 96, bits, size)
    found = block_linear(torch.eye(96).bfloat16(), codes, bits, backend="numba")
    assert torch.equal(found.t(), unpack_blocks(codes, bits, torch.bfloat16))
