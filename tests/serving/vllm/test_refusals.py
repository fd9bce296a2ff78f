"""What vLLM cannot serve is refused in one line, by vLLM itself started as users start it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from engines import attempt, needs_vllm
from packed_folders import copied
from tiny_packed import pack, sketched_model

from usllm.packed.export import RestStorage

pytestmark = [needs_vllm, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack(sketched_model(), tmp_path_factory.mktemp("served") / "packed", RestStorage("bfloat16", 8, 4))


def refusal(folder: Path, work: Path, **engine: Any) -> str:
    """What vLLM says when it does not start."""
    engine = {"model": str(folder), "enforce_eager": True, "skip_tokenizer_init": True, **engine}
    request = {"engine": engine, "prompts": [[1, 2, 3]], "sampling": {"max_tokens": 1, "detokenize": False}}
    done, _ = attempt(request, work)
    assert done.returncode != 0
    return done.stdout


def test_a_damaged_folder(folder: Path, tmp_path: Path) -> None:
    damaged = copied(folder, tmp_path / "packed")
    file = damaged / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert "its checksum is wrong; the file is damaged" in refusal(damaged, tmp_path)


def test_more_than_one_rank(folder: Path, tmp_path: Path) -> None:
    told = refusal(folder, tmp_path, tensor_parallel_size=2)
    assert "UserError: tensor_parallel_size=2: a packed layer is not cut into pieces; leave it at 1" in told
