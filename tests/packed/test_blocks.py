"""GGUF's 8- and 4-bit blocks: packed by the gguf package, read by torch alone to the same bits."""

from __future__ import annotations

import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize, quantize
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from usllm.packed import blocks
from usllm.packed.blocks import (
    BLOCK,
    BLOCK_BYTES,
    SCHEMES,
    bytes_per_row,
    check_blocks,
    chunk_rows,
    fits,
    pack_blocks,
    unpack_blocks,
)

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
bits_of_a_scheme = pytest.mark.parametrize("bits", sorted(SCHEMES))


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equality to the bit, so that -0 is not 0 and a NaN equals itself; fp32."""
    return torch.equal(a.contiguous().view(torch.int32), b.contiguous().view(torch.int32))


def by_gguf(packed: torch.Tensor, bits: int) -> torch.Tensor:
    with np.errstate(all="ignore"):
        return torch.from_numpy(dequantize(packed.cpu().numpy(), GGMLQuantizationType[SCHEMES[bits]]))


@bits_of_a_scheme
def test_sizes_are_those_of_gguf(bits: int) -> None:
    assert GGML_QUANT_SIZES[GGMLQuantizationType[SCHEMES[bits]]] == (BLOCK, BLOCK_BYTES[bits])


@pytest.mark.parametrize("device", DEVICES)
@settings(max_examples=60, deadline=None)
@given(data=st.data(), bits=st.sampled_from(sorted(SCHEMES)), rows=st.integers(1, 5), count=st.integers(1, 4))
def test_any_bytes_decode_as_gguf_decodes_them(
    device: str, data: st.DataObject, bits: int, rows: int, count: int
) -> None:
    packed = torch.from_numpy(data.draw(arrays.arrays(np.uint8, (rows, count * BLOCK_BYTES[bits]))))
    broken = False
    try:
        check_blocks(packed, bits, "w")
    except ValueError:
        broken = True
    expected = by_gguf(packed, bits)
    assert broken or bool(expected.isfinite().all())  # what passes the check decodes to numbers
    if not broken:
        assert same_bits(unpack_blocks(packed.to(device), bits).cpu(), expected)


@bits_of_a_scheme
def test_every_scale_times_every_code_is_that_of_gguf(bits: int) -> None:
    scales = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.uint8).view(-1, 2)
    for row in torch.arange(256, dtype=torch.uint8).view(-1, BLOCK_BYTES[bits] - 2):
        packed = torch.cat([scales, row.expand(len(scales), -1)], 1)
        finite = scales.view(torch.float16).isfinite()[:, 0]
        assert same_bits(unpack_blocks(packed[finite], bits), by_gguf(packed[finite], bits))


@bits_of_a_scheme
def test_packing_is_that_of_gguf_whatever_the_chunks(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(37, 96, generator=torch.Generator().manual_seed(1))
    expected = torch.from_numpy(quantize(weight.numpy(), GGMLQuantizationType[SCHEMES[bits]]))
    for rows in (1, 5, 36, 37, 100):
        monkeypatch.setattr(blocks, "chunk_rows", lambda *_, rows=rows: rows)
        assert torch.equal(pack_blocks(weight, bits), expected)


@bits_of_a_scheme
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_pack_as_their_fp32_values(bits: int, dtype: torch.dtype) -> None:
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(2)).to(dtype)
    assert torch.equal(pack_blocks(weight, bits), pack_blocks(weight.float(), bits))


@settings(max_examples=60, deadline=None)
@given(
    weight=arrays.arrays(
        np.float32,
        st.tuples(st.integers(1, 4), st.sampled_from([32, 96])),
        elements=st.floats(-65536, 65536, width=32, allow_subnormal=True),
    ),
    bits=st.sampled_from(sorted(SCHEMES)),
)
def test_error_is_bounded_by_the_step(weight: np.ndarray, bits: int) -> None:
    dense = torch.from_numpy(weight)
    decoded = unpack_blocks(pack_blocks(dense, bits), bits)
    largest = dense.unflatten(1, (-1, BLOCK)).abs().amax(-1, keepdim=True)
    # Half a step of rounding; of Q4_0 a whole one at the end of the scale's sign that has no code 8; the scale is fp16.
    step = largest / (127 if bits == 8 else 8)
    bound = step * (0.5 if bits == 8 else 1) + largest * 2.0**-10 + 128 * 2.0**-24
    assert bool(((decoded - dense).unflatten(1, (-1, BLOCK)).abs() <= bound).all())


@bits_of_a_scheme
def test_decoding_works_on_any_leading_shape_and_on_no_rows(bits: int) -> None:
    packed = pack_blocks(torch.randn(6, 64, generator=torch.Generator().manual_seed(3)), bits)
    decoded = unpack_blocks(packed, bits)
    assert torch.equal(unpack_blocks(packed[4], bits), decoded[4])
    assert torch.equal(unpack_blocks(packed.view(2, 3, -1), bits), decoded.view(2, 3, 64))
    assert unpack_blocks(packed[:0], bits).shape == (0, 64)


@bits_of_a_scheme
def test_decoding_works_at_odd_addresses_and_on_strided_rows(bits: int) -> None:
    packed = pack_blocks(torch.randn(4, 64, generator=torch.Generator().manual_seed(4)), bits)
    moved = torch.empty(packed.numel() + 1, dtype=torch.uint8)[1:].view_as(packed).copy_(packed)
    assert torch.equal(unpack_blocks(moved, bits), unpack_blocks(packed, bits))
    assert torch.equal(unpack_blocks(packed[::2], bits), unpack_blocks(packed, bits)[::2])


@bits_of_a_scheme
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_are_the_rounded_fp32_values(bits: int, dtype: torch.dtype) -> None:
    packed = pack_blocks(torch.randn(4, 64, generator=torch.Generator().manual_seed(5)), bits)
    decoded = unpack_blocks(packed, bits, dtype)
    assert decoded.dtype == dtype
    assert torch.equal(decoded, unpack_blocks(packed, bits).to(dtype))


@bits_of_a_scheme
def test_bytes_per_row_is_what_packing_makes(bits: int) -> None:
    for columns in (32, 96, 576):
        assert pack_blocks(torch.zeros(2, columns), bits).shape == (2, bytes_per_row(columns, bits))
    assert 8 * bytes_per_row(64, bits) / 64 == {8: 8.5, 4: 4.5}[bits]


def test_rows_that_do_not_fit_are_told_and_refused_by_name() -> None:
    assert [fits(columns) for columns in (0, 16, 32, 33, 64)] == [False, False, True, False, True]
    with pytest.raises(ValueError, match="lm_head: 48 columns"):
        pack_blocks(torch.zeros(2, 48), 8, "lm_head")
    with pytest.raises(ValueError, match="lm_head: 5 bits"):
        pack_blocks(torch.zeros(2, 64), 5, "lm_head")
    with pytest.raises(ValueError, match=r"lm_head: must be a matrix of floats, is torch\.int64"):
        pack_blocks(torch.zeros(2, 64, dtype=torch.int64), 8, "lm_head")


@bits_of_a_scheme
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e38])
def test_values_that_no_scale_can_hold_are_refused_by_name(bits: int, value: float) -> None:
    weight = torch.zeros(3, 64)
    weight[1, 40] = value
    with pytest.raises(ValueError, match=r"lm_head: .*not finite"):
        pack_blocks(weight, bits, "lm_head")


@bits_of_a_scheme
@pytest.mark.parametrize("scale", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("block", [0, 5])
def test_scale_that_is_not_finite_is_found(bits: int, scale: float, block: int) -> None:
    packed = pack_blocks(torch.ones(3, 64), bits)
    check_blocks(packed, bits, "embed")
    broken = packed.view(6, -1)
    broken[block, :2] = torch.tensor([scale], dtype=torch.float16).view(torch.uint8)
    with pytest.raises(ValueError, match="embed: 1 of 6 block scales are not finite"):
        check_blocks(packed, bits, "embed")


@bits_of_a_scheme
def test_what_is_no_row_of_blocks_is_refused(bits: int) -> None:
    for wrong in (
        torch.zeros(2, BLOCK_BYTES[bits] + 1, dtype=torch.uint8),
        torch.zeros(2, BLOCK_BYTES[bits]),
        torch.zeros((), dtype=torch.uint8),
    ):
        with pytest.raises(ValueError, match="embed: rows must be whole"):
            check_blocks(wrong, bits, "embed")
        with pytest.raises(ValueError, match="rows must be whole"):
            unpack_blocks(wrong, bits)


def test_memory_of_packing_does_not_grow_with_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "chunk_rows", lambda columns, _: chunk_rows(columns, 1 << 16))
    peaks = []
    for rows in (2048, 8192):
        weight = torch.ones(rows, 64)
        tracemalloc.start()  # sees NumPy's memory, where the copies are made
        pack_blocks(weight, 8)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0]


def test_reading_needs_torch_alone() -> None:
    code = (
        "import sys, torch; from usllm.packed.blocks import unpack_blocks; "
        "unpack_blocks(torch.zeros(1, 34, dtype=torch.uint8), 8); print('gguf' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False"]
