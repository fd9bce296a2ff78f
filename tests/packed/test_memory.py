"""Loading and running a packed model never holds its dense weights: peak resident memory of a fresh process."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from usllm.compress import compress_
from usllm.packed.export import ModelFiles, export
from usllm.packed.source import from_model
from usllm.sketch import SketchConfig

LAYERS, WIDTH, INNER = 16, 512, 1536

SCRIPT = """
import json, resource, sys
import torch, usllm
from transformers import LlamaForCausalLM
from usllm.packed import linear
import usllm_kernels
ids = torch.arange(8)[None]

def run(folder):
    model = usllm.load(folder, dtype=torch.float32)
    with torch.no_grad():
        model(ids)

def resident(key):
    return 1024 * int(next(l for l in open('/proc/self/status') if l.startswith(key)).split()[1])

run(sys.argv[1])  # what is compiled and allocated once, on a small model
before = resident('VmRSS')
open('/proc/self/clear_refs', 'w').write('5')  # the high-water mark starts anew
run(sys.argv[2])
print(json.dumps(resident('VmHWM') - before))
"""


def packed(layers: int, out: Path) -> tuple[Path, int, int]:
    """A packed Llama of random weights; bytes of its weight files, and of its dense form in fp32."""
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=8,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    patterns = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    compress_(model, SketchConfig(bits_per_weight=1.0, rows=1, allocation="uniform"), patterns=patterns)
    inspection = export(from_model(model), ModelFiles(config), out)
    return out, inspection.weight_bytes, 4 * inspection.parameters


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
def test_peak_memory_is_that_of_the_packed_form_and_one_layer(tmp_path: Path) -> None:
    small, _, _ = packed(1, tmp_path / "small")
    large, stored, dense = packed(LAYERS, tmp_path / "large")
    command = [sys.executable, "-c", SCRIPT, str(small), str(large)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=200)
    peak = json.loads(done.stdout.splitlines()[-1])
    one_layer = 4 * WIDTH * INNER
    activations_and_plans = 24 << 20
    # The file is mapped and read: its pages and the tensors made from them may be resident together.
    assert peak <= 2 * stored + 3 * one_layer + activations_and_plans
    assert peak < dense / 2
