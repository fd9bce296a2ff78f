"""Files cut in parts and joined again, and the inputs of the finetuning part made of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import gpu_inputs
from benchmarks.gpu_parts.pieces import cut, cut_all, joined_file, joined_folder
from benchmarks.gpu_parts.results import Refused
from usllm.data.sources import SourceSpec
from usllm.models import ModelSpec
from usllm.models.loading import load_dense
from usllm.models.random_model import byte_tokenizer, random_model


@pytest.mark.parametrize("size", [0, 1, 99, 100, 101, 200, 250])
def test_what_is_cut_is_joined_again(size: int, tmp_path: Path) -> None:
    content = bytes(range(256))[:size]
    path = tmp_path / "file.bin"
    path.write_bytes(content)
    parts = cut(path, 100)
    assert all(part.stat().st_size <= 100 for part in parts)
    assert len(parts) == max(-(-size // 100), 1)
    assert path.exists() == (size <= 100)
    assert joined_file(path, tmp_path / "scratch").read_bytes() == content


def test_a_missing_or_a_wrong_part_is_named(tmp_path: Path) -> None:
    path = tmp_path / "file.bin"
    path.write_bytes(b"abcdefgh")
    first, second, *_ = cut(path, 3)
    second.write_bytes(b"xyz")
    with pytest.raises(Refused, match="not those of one file"):
        joined_file(path, tmp_path / "scratch")
    second.unlink()
    with pytest.raises(Refused, match=r"part 2 of 3 is missing: copy file\.bin\.part-002-of-003"):
        joined_file(path, tmp_path / "scratch")
    first.unlink()
    with pytest.raises(Refused, match=r"other\.bin is not there"):
        joined_file(tmp_path / "other.bin", tmp_path / "scratch")


def test_a_folder_without_parts_is_taken_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "small").write_bytes(b"ab")
    assert cut_all(tmp_path, 3) == [tmp_path / "small"]
    assert joined_folder(tmp_path, tmp_path / "scratch") == tmp_path


def test_inputs_of_a_model_and_a_text(tmp_path: Path, tiny_text: Path) -> None:
    dense = random_model("llama")
    dense.save_pretrained(tmp_path / "dense")
    byte_tokenizer().save_pretrained(tmp_path / "dense")
    spec = ModelSpec(kind="folder", name=str(tmp_path / "dense"))
    source = SourceSpec(kind="text", path=str(tiny_text))
    out = tmp_path / "out"
    made = gpu_inputs.make(out, spec, source, dtype="float32", most_tokens=1000, part_bytes=50_000)
    assert made["tokens"] == 1000 and made["documents"] == 40
    assert max(path.stat().st_size for path in out.rglob("*")) <= 50_000
    assert not (out / "model" / "model.safetensors").exists()
    assert gpu_inputs.main(["join", str(out / "model"), str(tmp_path / "joined")]) == 0
    again = load_dense(ModelSpec(kind="folder", name=str(tmp_path / "joined")))
    assert all(torch.equal(one, other) for one, other in zip(dense.parameters(), again.parameters(), strict=True))
    ids = np.load(out / "tokens.npy")
    text = tiny_text.read_text(encoding="utf-8").split("\n\n")[0]
    assert ids.dtype == np.uint16
    assert ids[: len(text) + 1].tolist() == [*byte_tokenizer()(text).input_ids, 256]
    with pytest.raises(Refused, match="is not empty"):
        gpu_inputs.make(out, spec, source, most_tokens=1, part_bytes=1)
