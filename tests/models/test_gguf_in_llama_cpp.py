"""What llama.cpp itself makes of the files that are written; `make test-llamacpp` installs it beside the others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf_of_model import MODELS, tiny_model, write_model
from transformers import AutoModelForCausalLM

from usllm.compress import compress_
from usllm.data import SourceSpec
from usllm.data.sources import read_text
from usllm.models import ModelSpec
from usllm.models.gguf_plan import plan_gguf
from usllm.models.gguf_writer import write_gguf
from usllm.models.loading import load_config, load_dense, load_generation_config, load_tokenizer
from usllm.packed.decoded import DecodedModel, decode_source
from usllm.packed.dense import export_dense
from usllm.packed.description import ModelFiles
from usllm.packed.source import from_model
from usllm.rounding import RoundingConfig

pytest.importorskip("xllamacpp", reason="llama.cpp is not installed; make test-llamacpp")

from benchmarks.llama_cpp import LlamaCpp

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]
PROMPTS = [
    "The capital of France is",
    "In 1969, two men walked",
    "def factorial(n):\n    ",
    "The list method append",
    "Once upon a time there was a",
    "Water boils at 100 degrees",
    "Dear Sir or Madam,\n\nI am",
    "The three primary colours are",
]
WINDOW, WINDOWS, TOKENS = 512, 6, 24


@pytest.mark.parametrize("name", MODELS)
def test_llama_cpp_computes_what_transformers_does(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("USLLM_CACHE", str(tmp_path / "cache"))
    original = write_model(tmp_path / "original.gguf", name)
    spec = ModelSpec(kind="gguf", name=None, file=str(tmp_path / "original.gguf"))
    plan = plan_gguf(load_config(spec), load_tokenizer(spec), kind="F32")
    write_gguf(plan, original.state_dict().__getitem__, tmp_path / "written.gguf")
    # Longer than the first context of Phi-3's: llama.cpp takes the factors of long texts where its own context is long.
    ids = torch.randint(4, 256, (100,), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = tiny_model(name)(ids[None], use_cache=False).logits[0].numpy()
    with LlamaCpp(tmp_path / "written.gguf", 1, context=256) as model:
        found = model.logits(ids.tolist())
    # llama.cpp keeps keys and values in fp16.
    assert np.square(found - wanted).mean() < 1e-4 * np.square(wanted).mean()


@pytest.fixture(scope="module")
def decoded() -> DecodedModel:
    """SmolLM2 at 8 bits, which breaks nothing: of a broken model the noise of Q8_0 moves perplexity by percents."""
    model = load_dense(ModelSpec())
    compress_(model, RoundingConfig(bits=8, group_size=64))
    return decode_source(from_model(model))


@pytest.fixture(scope="module")
def files() -> ModelFiles:
    spec = ModelSpec()
    return ModelFiles(load_config(spec), load_tokenizer(spec), load_generation_config(spec))


@pytest.fixture(scope="module")
def dense(decoded: DecodedModel, files: ModelFiles, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Its decoded folder, read by transformers in fp32."""
    folder = tmp_path_factory.mktemp("dense") / "dense"
    export_dense(decoded, files, folder, dtype="float32")
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def written(decoded: DecodedModel, files: ModelFiles, kind: str, path: Path) -> Path:
    assert files.tokenizer is not None
    plan = plan_gguf(files.config, files.tokenizer, files.generation, kind=kind)
    write_gguf(plan, decoded.read, path)
    return path


def test_greedy_texts_of_smollm2_are_those_of_transformers(
    decoded: DecodedModel, files: ModelFiles, dense: Any, tmp_path: Path
) -> None:
    with LlamaCpp(written(decoded, files, "F32", tmp_path / "model.gguf"), 1) as model:
        for prompt in PROMPTS:
            assert files.tokenizer is not None
            ids = files.tokenizer(prompt).input_ids
            assert model.tokenize(prompt) == ids, prompt
            given = torch.tensor([ids])
            output = dense.generate(
                given,
                attention_mask=torch.ones_like(given),
                do_sample=False,
                min_new_tokens=TOKENS,
                max_new_tokens=TOKENS,
                pad_token_id=0,
            )
            wanted = output[0, len(ids) :].tolist()
            found = model.greedy(ids, TOKENS)
            at = next((at for at in range(TOKENS) if found[at] != wanted[at]), None)
            if at is not None:  # the first difference may be a tie: then its gap says so
                model.forget()
                row = model.logits([*ids, *wanted[:at]], last=True)[0]
                gap = float(row[found[at]] - row[wanted[at]])
                raise AssertionError(f"{prompt!r}: token {at} is {found[at]}, not {wanted[at]}; logits {gap:.2g} apart")


def test_perplexity_of_smollm2_in_8_bits_is_that_of_the_dense_folder(
    decoded: DecodedModel, files: ModelFiles, dense: Any, tmp_path: Path
) -> None:
    assert files.tokenizer is not None
    text = read_text(SourceSpec(kind="pydoc"), "text")[: 12 * WINDOW * WINDOWS]
    ids = torch.tensor(files.tokenizer(text, verbose=False).input_ids[: WINDOW * WINDOWS]).view(WINDOWS, WINDOW)
    with torch.no_grad():
        losses = [
            torch.nn.functional.cross_entropy(dense(window[None], use_cache=False).logits[0, :-1], window[1:]).item()
            for window in ids
        ]
    with LlamaCpp(written(decoded, files, "Q8_0", tmp_path / "model.gguf"), 1) as model:
        found = [float(model.losses(window.tolist()).mean()) for window in ids]
    ratio = float(np.exp(np.mean(found) - np.mean(losses)))
    assert ratio == pytest.approx(1.0, abs=0.01)
