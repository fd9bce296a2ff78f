"""The Triton kernels compile for a card, without one: the interpreter accepts what the compiler does not.

States and decoded weights are to equal the reference bit for bit, so no kernel that makes them may round otherwise: the
instructions show it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from usllm_kernels.dispatch import installed

# Compiles instead of launching: a driver that only names its target, and launches that stop behind the compiler.
SCRIPT = """
import json
import re
import torch
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
launch, compiled = JITFunction.run, {}

def compile_only(self, *arguments, grid, warmup, **options):
    found = launch(self, *arguments, grid=grid, warmup=True, **options)
    compiled.setdefault(self.__name__, set()).update(re.findall("(?:fma|div|sqrt|rcp)[.][a-z0-9.]+", found.asm["ptx"]))
    return found

JITFunction.run = compile_only

from cases import case
from usllm_kernels.project import triton as projection
from usllm_kernels.query import triton as querying
from usllm_kernels.sketch_linear import triton as products

for name in ("plain", "mean"):
    layer = case(name)
    winners = torch.zeros(layer.plan.num_states, dtype=torch.int16) if name == "plain" else None
    projection.project(layer.weight, layer.plan, layer.moment, winners)
layer = case("mixed-widths")
projection.project(layer.weight, layer.plan, layer.moment)
querying.query(layer.packed, layer.plan, torch.bfloat16)
out, width = layer.plan.shape
for tokens in (1, 100):
    products.sketch_linear(torch.zeros(tokens, width, dtype=torch.bfloat16), layer.packed, layer.plan)
products.input_gradient(torch.zeros(100, out, dtype=torch.bfloat16), layer.packed, layer.plan)
print(json.dumps({name: sorted(found) for name, found in compiled.items()}))
"""


@pytest.mark.skipif(not installed("triton"), reason="triton is not installed")
def test_every_kernel_compiles_for_a_card(tmp_path: Path) -> None:
    folder = Path(__file__).parent
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    root = folder.parent.parent
    paths = os.pathsep.join(str(path) for path in (folder, root, root / "kernels"))
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": paths}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout)
    assert set(found) == {
        "few_tokens_kernel",
        "input_gradient_kernel",
        "many_tokens_kernel",
        "order_kernel",
        "output_sums_kernel",
        "quantize_kernel",
        "query_kernel",
        "reduce_kernel",
        "sums_kernel",
    }
    exact = {"div.s32", "div.u32", "div.rn.f32", "div.rn.f64", "sqrt.rn.f64"}
    for name in ("order_kernel", "query_kernel", "quantize_kernel", "reduce_kernel", "sums_kernel"):
        assert set(found[name]) <= exact, name
    assert {"div.rn.f64", "sqrt.rn.f64", "div.rn.f32"} <= set(found["quantize_kernel"])
