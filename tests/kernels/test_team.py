"""Parts on torch's own threads: the same bits as alone, with however many threads there are, and without them."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from usllm_kernels import block_linear
from usllm_kernels.blocks import BLOCK, BLOCK_BYTES
from usllm_kernels.dispatch import installed

if not installed("numba"):
    pytest.skip("numba is not installed", allow_module_level=True)

from cases import case
from test_planes import made

from usllm_kernels.cpu import linear as of_states
from usllm_kernels.cpu import parallel, team
from usllm_kernels.cpu import plane_linear as of_planes
from usllm_kernels.ops.block_linear import numba as of_blocks
from usllm_kernels.planes import SIGNS, Levels

pytestmark = pytest.mark.skipif(team.team_of_torch() is None, reason="torch computes without OpenMP here")


@pytest.fixture(autouse=True)
def every_product_is_shared(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Also small ones; torch's number of threads is put back."""
    for module in (of_planes, of_blocks):
        monkeypatch.setattr(module, "_LEAST_SHARED", 0)
    monkeypatch.setattr(of_planes, "_LEAST_WRITTEN", 0)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


LAYERS = ((1, 33, SIGNS, None), (200, 150, SIGNS, None), (65, 96, Levels(-3, 3, 2), 32))


def products(dtype: torch.dtype, *tokens: int) -> list[torch.Tensor]:
    """Of layers with codes in output order and in blocks."""
    found, draw = [], torch.Generator().manual_seed(0)
    for shape in LAYERS:
        planes, _ = made(*shape, backend="numba")
        for number in tokens:
            x = torch.randn(number, planes.shape[1], generator=draw).to(dtype)
            found.append(of_planes.plane_linear(x, planes))
    for bits in (8, 4) if dtype != torch.float32 else ():  # in fp32 it is torch that multiplies
        packed = torch.randint(0, 256, (77, 3 * BLOCK_BYTES[bits]), generator=draw, dtype=torch.uint8)
        packed.view(77, 3, -1)[..., 1] = 0x2C  # a scale that is a number
        for number in tokens:
            x = torch.randn(number, 3 * BLOCK, generator=draw).to(dtype)
            found.append(block_linear(x, packed, bits, backend="numba"))
    return found


@pytest.mark.parametrize("with_team", [True, False])
@pytest.mark.parametrize("threads", [2, 3, 64])
@pytest.mark.parametrize("name", ["mixed-widths", "mean", "16-bit", "two-group-sizes", "one-channel"])
def test_states_are_multiplied_part_by_part(
    name: str, threads: int, with_team: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In fp32 up to the order of their sums, which is that of the parts."""
    layer = case(name)
    monkeypatch.setattr(of_states, "_LEAST_SHARED", 0)
    if not with_team:
        monkeypatch.setattr(parallel, "team_of_torch", lambda: None)
    x = torch.randn(2, layer.plan.shape[1], generator=torch.Generator().manual_seed(0))
    for states in (layer.states, layer.packed):
        torch.set_num_threads(threads)
        found = of_states.sketch_linear(x, states, layer.plan)
        torch.set_num_threads(1)
        torch.testing.assert_close(found, of_states.sketch_linear(x, states, layer.plan), rtol=1e-5, atol=1e-5)


def decoded(dtype: torch.dtype) -> list[torch.Tensor]:
    """Weights of the layers with codes in output order."""
    return [of_planes.plane_weight(made(*shape, backend="numba")[0], dtype) for shape in LAYERS]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("threads", [2, 3, 64])
def test_bits_are_those_of_one_thread(threads: int, dtype: torch.dtype) -> None:
    torch.set_num_threads(1)
    alone, weights = products(dtype, 1, 5), decoded(dtype)
    torch.set_num_threads(threads)
    for one, many in zip([*alone, *weights], [*products(dtype, 1, 5), *decoded(dtype)], strict=True):
        assert torch.equal(one, many)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("threads", [2, 3, 64])
def test_many_tokens_are_torchs_products(threads: int, dtype: torch.dtype) -> None:
    torch.set_num_threads(1)
    alone = products(dtype, 40)
    torch.set_num_threads(threads)
    for one, many in zip(alone, products(dtype, 40), strict=True):  # whose order of summation is torch's
        torch.testing.assert_close(many, one, atol=1e-2, rtol=0.02)


@pytest.mark.parametrize("threads", [1, 2])
def test_without_torchs_threads_bits_are_the_same(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(threads)
    with_team = products(torch.bfloat16, 1, 5, 40)
    monkeypatch.setattr(parallel, "team_of_torch", lambda: None)
    monkeypatch.setattr(parallel.Pool, "_WAKING", 1)
    for one, other in zip(with_team, products(torch.bfloat16, 1, 5, 40), strict=True):
        assert torch.equal(one, other)


def test_what_a_task_raises_is_raised() -> None:
    torch.set_num_threads(2)
    done = []

    def work(task: int) -> None:
        if task == 3:
            raise KeyError(task)
        done.append(task)

    with pytest.raises(KeyError, match="3"):
        parallel.side_by_side(work, range(1000))
    parallel.side_by_side(done.append, range(1000, 1010))
    assert sorted(done)[-10:] == list(range(1000, 1010))


def test_forked_process_does_without_them() -> None:
    torch.set_num_threads(2)
    expected = products(torch.bfloat16, 1, 5)
    child = os.fork()
    if not child:
        torch.set_num_threads(1)  # torch's own operations hang there on more
        same = team.team_of_torch() is None
        same = same and all(torch.equal(*pair) for pair in zip(expected, products(torch.bfloat16, 1, 5), strict=True))
        os._exit(0 if same else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
