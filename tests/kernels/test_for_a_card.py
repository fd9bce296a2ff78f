"""The Triton kernels compile for a card, without one: the interpreter accepts what the compiler does not.

States and decoded weights are to equal the reference bit for bit, so no kernel that makes them may round otherwise: the
instructions show it. Nor may a kernel run out of registers on layers of a real size: its stack shows that.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from usllm_kernels.dispatch import installed

pytestmark = pytest.mark.first  # one fixture of half a minute

# Compiles instead of launching: a driver that only names its target, and launches that stop behind the compiler.
SCRIPT = """
import json
import os
import re
import subprocess
import tempfile

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

class Target:
    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)
    def get_current_device(self):
        return 0
    def get_current_stream(self, device):
        return 0

driver.set_active(Target())
launch, instructions, stacks = JITFunction.run, {}, {}
reader = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")

def compile_only(self, *arguments, grid, warmup, **options):
    found, name = launch(self, *arguments, grid=grid, warmup=True, **options), self.__name__
    instructions.setdefault(name, set()).update(re.findall("(?:fma|div|sqrt|rcp)[.][a-z0-9.]+", found.asm["ptx"]))
    if os.path.exists(reader):
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(found.asm["cubin"])
            file.flush()
            command = [reader, "--dump-resource-usage", file.name]
            usage = subprocess.run(command, capture_output=True, text=True).stdout
        stacks[name] = max(stacks.get(name, 0), int(re.search("STACK:([0-9]+)", usage)[1]))
    return found

JITFunction.run = compile_only

from cases import case
from usllm.sketch import SketchConfig, build_plan
from usllm_kernels.ops.plane_linear import triton as plane_linear
from usllm_kernels.ops.plane_words import triton as plane_words
from usllm_kernels.ops.project import triton as projection
from usllm_kernels.ops.project_query.triton_sums import error_sums
from usllm_kernels.ops.query import triton as querying
from usllm_kernels.ops.sketch_linear import triton as products
from usllm_kernels.planes import Planes

for name in ("plain", "mean"):
    layer = case(name)
    winners = torch.zeros(layer.plan.num_states, dtype=torch.int16) if name == "plain" else None
    projection.project(layer.weight, layer.plan, layer.moment, winners)
importance = torch.rand(4096, generator=torch.Generator().manual_seed(0)) ** 8 + 1e-3
for fields in ({"rows": 3}, {"allocation": "waterfill", "output_scale": True}):
    plan = build_plan((1024, 4096), importance, SketchConfig(bits_per_weight=0.5, **fields), "layer")
    projection.project(torch.zeros(plan.shape), plan, importance)
    states = plan.state_tensors()
    states["codes"] = torch.zeros(plan.bit_breakdown()["states"] // 8, dtype=torch.uint8)
    querying.query(states, plan, torch.bfloat16)
    error_sums(torch.zeros(plan.shape), states, plan)
    for tokens, dtype in ((1, "bfloat16"), (8, "bfloat16"), (100, "bfloat16"), (200, "bfloat16"), (100, "float32")):
        x = torch.zeros(tokens, 4096, dtype=getattr(torch, dtype))
        products.sketch_linear(x, states, plan)
        products.input_gradient(x[:, :1024], states, plan)
bits = torch.zeros(1024, 4096, dtype=torch.uint8)
ones = torch.ones(4096)
words = plane_words.plane_words(bits)
whole = torch.arange(4097, dtype=torch.int32)
planes = Planes((1024, 4096), whole[:-1], whole, ones, ones, words, torch.ones(1, 1024))
for tokens, dtype in ((1, "bfloat16"), (8, "bfloat16"), (100, "bfloat16"), (100, "float32")):
    plane_linear.plane_linear(torch.zeros(tokens, 4096, dtype=getattr(torch, dtype)), planes)
print(json.dumps([{name: sorted(found) for name, found in instructions.items()}, stacks]))
"""

EXACT = {"div.s32", "div.u32", "div.rn.f32", "div.rn.f64", "sqrt.rn.f64"}
MAKING_STATES_OR_WEIGHTS = (
    "order_kernel",
    "output_sums_kernel",
    "quantize_kernel",
    "query_kernel",
    "reduce_kernel",
    "sums_kernel",
)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Instructions and bytes of stack of every kernel, by its name."""
    if not installed("triton"):
        pytest.skip("triton is not installed")
    folder = Path(__file__).parent
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    root = folder.parent.parent
    paths = os.pathsep.join(str(path) for path in (folder, root, root / "kernels"))
    environment |= {"TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton")), "PYTHONPATH": paths}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


def test_every_kernel_compiles(compiled: Any) -> None:
    products = {"error_sums_kernel", "few_tokens_kernel", "input_gradient_kernel", "many_tokens_kernel"}
    planes = {"plane_words_kernel", "plane_few_tokens_kernel", "plane_many_tokens_kernel"}
    assert set(compiled[0]) == {*MAKING_STATES_OR_WEIGHTS, *products, *planes}


@pytest.mark.parametrize("name", MAKING_STATES_OR_WEIGHTS)
def test_no_instruction_rounds_otherwise_than_the_reference(name: str, compiled: Any) -> None:
    assert set(compiled[0][name]) <= EXACT


def test_scales_are_chosen_with_exact_divisions_and_roots(compiled: Any) -> None:
    assert {"div.rn.f64", "sqrt.rn.f64", "div.rn.f32"} <= set(compiled[0]["quantize_kernel"])


def test_tiles_fit_into_registers(compiled: Any) -> None:
    if not compiled[1]:
        pytest.skip("this triton has no cuobjdump")
    assert {name: stack for name, stack in compiled[1].items() if stack > 64} == {}
