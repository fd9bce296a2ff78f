"""vLLM finds the entry point by itself: a plug-in that fails is only logged, and the model would be unknown."""

from __future__ import annotations

import subprocess
import sys

import pytest
from engines import environment, needs_vllm

pytestmark = [needs_vllm, pytest.mark.timeout(900)]

CODE = """
from vllm.plugins import load_general_plugins
load_general_plugins()
from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, get_quantization_config
from usllm.serving.vllm.plugin import register
register()
assert QUANTIZATION_METHODS.count("usllm") == 1
print(get_quantization_config("usllm").__module__)
"""


def test_registered_by_vllm_and_once() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.splitlines()[-1] == "usllm.serving.vllm.quantization"


ROOM = """
from vllm.v1.worker.worker_base import WorkerWrapperBase
before = WorkerWrapperBase.execute_model
from usllm.serving.vllm.quantization import step_with_room
step_with_room()
step_with_room()
assert WorkerWrapperBase.execute_model is not before
print(WorkerWrapperBase.execute_model.__wrapped__ is before)
"""


def test_steps_find_room_for_frames_once() -> None:
    done = subprocess.run([sys.executable, "-c", ROOM], env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.splitlines()[-1] == "True"
