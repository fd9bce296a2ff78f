"""GGUF files that are written are read as the same model, or not written."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from gguf_of_model import MODELS, tiny_model, write_model
from transformers import AutoConfig, PreTrainedModel

from usllm.models import ModelSpec, gguf_plan
from usllm.models.gguf_contents import read_contents
from usllm.models.gguf_out import check_gguf_out
from usllm.models.gguf_plan import GgufPlan, plan_gguf
from usllm.models.gguf_writer import write_gguf
from usllm.models.loading import load_config, load_dense, load_generation_config, load_tokenizer
from usllm.models.random_model import byte_tokenizer, random_config
from usllm.system.errors import UserError

BEFORE_5 = int(transformers.__version__.partition(".")[0]) < 5
SENTENCEPIECE = [name for name in MODELS if name.startswith(("gemma", "phi3"))]  # which transformers 4 misreads
READ = [
    pytest.param(name, marks=pytest.mark.skipif(BEFORE_5 and name in SENTENCEPIECE, reason="needs transformers 5"))
    for name in MODELS
]


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("USLLM_CACHE", str(tmp_path / "cache"))


def of(path: Path) -> ModelSpec:
    return ModelSpec(kind="gguf", name=None, file=str(path))


def plan_of(spec: ModelSpec, **options: Any) -> GgufPlan:
    return plan_gguf(load_config(spec), load_tokenizer(spec), load_generation_config(spec), **options)


def write(folder: Path, name: str = "llama", **options: Any) -> tuple[PreTrainedModel, Path]:
    """One of the tiny models, and the file that the writer makes of it as the reader has it."""
    original = write_model(folder / "original.gguf", name)
    spec = of(folder / "original.gguf")
    path = folder / "written.gguf"
    write_gguf(plan_of(spec, **options), load_dense(spec).state_dict().__getitem__, path)
    return original, path


def logits(model: PreTrainedModel) -> torch.Tensor:
    ids = torch.randint(256, (2, 120), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


@pytest.mark.parametrize("name", READ)
def test_file_says_what_the_original_said(name: str, tmp_path: Path) -> None:
    _, path = write(tmp_path, name, kind="F32")
    wanted, found = read_contents(tmp_path / "original.gguf"), read_contents(path)
    rebuilt = ("tokens", "token_type", "scores", "merges")  # padded, and scored by rank
    if name == "qwen2":  # transformers 5 splits texts for a model of that kind as Qwen does, whatever its file says
        rebuilt = (*rebuilt, "pre")
    keys = [key for key in wanted.metadata if not key.startswith("GGUF.") and not key.endswith(rebuilt)]
    assert {key: found.metadata.get(key) for key in keys} == {key: wanted.metadata[key] for key in keys}
    assert found.shapes == wanted.shapes
    for tensor in wanted.shapes:
        torch.testing.assert_close(
            found.tensor(tensor), wanted.tensor(tensor), rtol=0, atol=1e-6
        )  # norms with an offset


@pytest.mark.parametrize(
    "name", [param for param in READ if param.values[0] in ("llama-tied", "llama3-scaled", "gemma3")]
)
def test_logits_are_those_of_the_model(name: str, tmp_path: Path) -> None:
    original, path = write(tmp_path, name, kind="F32")
    torch.testing.assert_close(logits(load_dense(of(path))), logits(original), rtol=1e-4, atol=1e-4)


def test_matrices_alone_are_rounded_to_bf16(tmp_path: Path) -> None:
    original, path = write(tmp_path, "llama")
    again = load_dense(of(path))
    for name, tensor in original.state_dict().items():
        wanted = tensor.to(torch.bfloat16).float() if tensor.dim() == 2 else tensor
        assert torch.equal(again.state_dict()[name], wanted), name
    original.load_state_dict(again.state_dict())
    assert torch.equal(logits(again), logits(original))


def test_texts_are_cut_into_the_same_tokens(tmp_path: Path) -> None:
    for name in ["llama", *([] if BEFORE_5 else ["gemma3"])]:
        (folder := tmp_path / name).mkdir()
        _, path = write(folder, name)
        wanted, found = load_tokenizer(of(folder / "original.gguf")), load_tokenizer(of(path))
        for text in ("ab ba abab", " a b", "b  aab\n", "é ab"):
            assert found(text).input_ids == wanted(text).input_ids, (name, text)


@pytest.mark.parametrize(
    ("kind", "embeddings", "kinds"),
    [
        ("F16", None, {"token_embd": "F16", "attn_q": "F16"}),
        ("Q8_0", None, {"token_embd": "Q8_0", "output.weight": "Q8_0", "attn_q": "Q8_0", "attn_norm": "F32"}),
        ("Q4_0", None, {"token_embd": "Q8_0", "output.weight": "Q8_0", "attn_q": "Q4_0", "output_norm": "F32"}),
        ("Q4_0", "BF16", {"token_embd": "BF16", "output.weight": "BF16", "ffn_up": "Q4_0"}),
        ("BF16", "Q8_0", {"token_embd": "Q8_0", "output.weight": "Q8_0", "ffn_up": "BF16"}),
    ],
)
def test_types_are_those_asked_for(kind: str, embeddings: str | None, kinds: dict[str, str], tmp_path: Path) -> None:
    original, path = write(tmp_path, "llama", kind=kind, embeddings=embeddings)
    reader = gguf.GGUFReader(path)
    stored = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    in_blocks = not {"Q8_0", "Q4_0"}.isdisjoint(stored.values())
    assert ("general.quantization_version" in reader.fields) == in_blocks
    for part, wanted in kinds.items():
        found = {stored[name] for name in stored if name.removeprefix("blk.0.").startswith(part)}
        assert found == {wanted}, part
    error = (logits(load_dense(of(path))) - logits(original)).square().mean() / logits(original).square().mean()
    assert error < (0.2 if kind == "Q4_0" else 0.001)


def test_rows_that_are_no_blocks_stay_at_16_bits(tmp_path: Path) -> None:
    config = random_config("llama")
    config.intermediate_size = 40
    write_model(tmp_path / "original.gguf", "llama")
    plan = plan_gguf(config, load_tokenizer(of(tmp_path / "original.gguf")), kind="Q8_0")
    assert plan.tensors["blk.0.ffn_down.weight"].kind == "BF16"
    assert plan.tensors["blk.0.ffn_up.weight"].kind == "Q8_0"


def test_bytes_that_are_said_before_are_those_written(tmp_path: Path) -> None:
    for kind in ("F32", "BF16", "Q8_0", "Q4_0"):
        write_model(tmp_path / "original.gguf", "llama")
        spec = of(tmp_path / "original.gguf")
        plan = plan_of(spec, kind=kind)
        write_gguf(plan, load_dense(spec).state_dict().__getitem__, tmp_path / "written.gguf")
        stored = sum(int(tensor.n_bytes) for tensor in gguf.GGUFReader(tmp_path / "written.gguf").tensors)
        assert plan.tensor_bytes == stored
        assert 0 < (tmp_path / "written.gguf").stat().st_size - stored < 30_000


class InF32:
    """An encoding of the tests' own."""

    number = gguf.GGMLQuantizationType.F32

    def __init__(self, fails: bool = False) -> None:
        self.fails = fails

    def bytes(self, shape: tuple[int, ...]) -> int:
        return 4 * int(np.prod(shape))

    def encode(self, values: np.ndarray) -> np.ndarray:
        if self.fails:
            raise ArithmeticError("does not encode")
        return values.view(np.uint8).reshape(-1)


def test_other_encodings_than_planned_are_written_in_the_same_file_whole_or_not_at_all(tmp_path: Path) -> None:
    original = write_model(tmp_path / "original.gguf", "llama")
    plan, read = plan_of(of(tmp_path / "original.gguf")), original.state_dict().__getitem__
    path, chosen = tmp_path / "written.gguf", "blk.0.ffn_down.weight"
    with pytest.raises(ArithmeticError, match="does not encode"):
        write_gguf(plan, read, path, {chosen: InF32(fails=True)})
    assert [file.name for file in tmp_path.glob("*written*")] == []
    write_gguf(plan, read, path, {chosen: InF32()})
    wanted, found = read_contents(tmp_path / "original.gguf"), read_contents(path)
    exact = [name for name in wanted.shapes if torch.equal(found.tensor(name), wanted.tensor(name))]
    assert chosen in exact and "blk.0.ffn_up.weight" not in exact
    torch.testing.assert_close(
        found.tensor("blk.0.ffn_up.weight"), wanted.tensor("blk.0.ffn_up.weight"), rtol=2**-8, atol=0
    )


def test_model_is_planned_from_one_skeleton_and_described_without_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_model(tmp_path / "original.gguf", "llama")
    made, skeleton = [], gguf_plan.skeleton
    monkeypatch.setattr(gguf_plan, "skeleton", lambda config: made.append(config) or skeleton(config))
    plan = plan_of(of(tmp_path / "original.gguf"))
    described = plan.described("a name", "how it was made")
    assert len(made) == 2  # of the model, and of what the reader makes of the file
    told = {"general.name": "a name", "general.description": "how it was made"}
    assert described.metadata == plan.metadata | told
    assert next(iter(described.metadata)) == "general.quantized_by"  # by which a file that may be replaced is known
    assert described.tensors == plan.tensors


def test_more_ends_of_a_text_come_along(tmp_path: Path) -> None:
    write_model(tmp_path / "original.gguf", "llama", metadata={"tokenizer.ggml.eot_token_id": 258})
    spec = of(tmp_path / "original.gguf")
    write_gguf(plan_of(spec), load_dense(spec).state_dict().__getitem__, tmp_path / "written.gguf")
    generation = load_generation_config(of(tmp_path / "written.gguf"))
    assert generation is not None
    assert generation.eos_token_id == [256, 258]


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("llama", {"hidden_act": "gelu"}, r"of this llama: layers\.\*\.mlp\.act_fn differs;"),
        (
            "llama",
            {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
            "rope_type=yarn of a llama has no form in GGUF;",
        ),
        ("qwen3", {"attention_bias": True}, r"of this qwen3: attention_bias differs \(True is read as False\);"),
        (
            "gemma2",
            {"query_pre_attn_scalar": 7},
            r"of this gemma2: layers\.\*\.self_attn\.scaling differs \(0\.3779\d* is read as 0\.0625\);",
        ),
    ],
)
def test_what_the_file_could_not_say_is_refused(
    kind: str, settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    write_model(tmp_path / "original.gguf", "llama")
    tokenizer = load_tokenizer(of(tmp_path / "original.gguf"))
    config = tiny_model("llama").config.to_dict()
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    shared = {key: config[key] for key in (*sizes, "num_key_value_heads", "max_position_embeddings")}
    assert plan_gguf(AutoConfig.for_model(kind, **shared), tokenizer).tensors
    with pytest.raises(UserError, match=message) as caught:
        plan_gguf(AutoConfig.for_model(kind, **(shared | settings)), tokenizer)
    assert "\n" not in str(caught.value)
    assert "form=dense" in str(caught.value)


def test_family_without_a_form_in_gguf_is_refused() -> None:
    with pytest.raises(UserError, match=r"a gpt2 cannot be written; those that can are llama, qwen2.*pass form=dense"):
        plan_gguf(AutoConfig.for_model("gpt2"), byte_tokenizer())


def test_tokenizer_without_merges_is_refused() -> None:
    with pytest.raises(UserError, match="the tokenizer has no merges"):
        plan_gguf(random_config("llama"), byte_tokenizer())


@pytest.mark.parametrize(
    ("name", "types", "way_out"),
    [
        ("model.layers.0.mlp.up_proj.weight", {"kind": "F16"}, "gguf.type=F32"),
        ("model.embed_tokens.weight", {"kind": "F32", "embeddings": "F16"}, "gguf.embeddings=F32"),
        ("lm_head.weight", {"kind": "F16"}, "gguf.embeddings=F32"),
    ],
)
def test_number_that_is_not_finite_in_its_type_is_named_and_leaves_no_file(
    name: str, types: dict[str, str], way_out: str, tmp_path: Path
) -> None:
    write_model(tmp_path / "original.gguf", "llama")
    spec = of(tmp_path / "original.gguf")
    weights = load_dense(spec).state_dict()
    weights[name][0, 0] = 1e30
    told = f"{name}: holds values that are not finite as F16; pass {way_out}"
    with pytest.raises(UserError, match=f"^{re.escape(told)}$"):
        write_gguf(plan_of(spec, **types), weights.__getitem__, tmp_path / "written.gguf")
    assert not list(tmp_path.glob("*written*"))


def test_one_tensor_is_read_at_a_time(tmp_path: Path) -> None:
    write_model(tmp_path / "original.gguf", "llama")
    spec = of(tmp_path / "original.gguf")
    weights, asked = load_dense(spec).state_dict(), []

    def read(name: str) -> torch.Tensor:
        asked.append(name)
        return weights[name]

    write_gguf(plan_of(spec), read, tmp_path / "written.gguf")
    assert sorted(asked) == sorted(weights)


def test_only_a_file_written_here_is_ever_replaced(tmp_path: Path) -> None:
    _, path = write(tmp_path)
    (tmp_path / "text.gguf").write_text("mine")
    (tmp_path / "folder.gguf").mkdir()
    (tmp_path / "link.gguf").symlink_to(path)
    for name, message in (
        ("original.gguf", "was not written by usllm-export: it is never replaced"),
        ("text.gguf", "was not written by usllm-export: it is never replaced"),
        ("link.gguf", "was not written by usllm-export: it is never replaced"),
        ("folder.gguf", "is a folder"),
        ("model.bin", "ends in .gguf"),
    ):
        with pytest.raises(UserError, match=message):
            check_gguf_out(tmp_path / name, overwrite=True)
    with pytest.raises(UserError, match="overwrite=true"):
        check_gguf_out(path, overwrite=False)
    check_gguf_out(path, overwrite=True)
    check_gguf_out(tmp_path / "new.gguf", overwrite=False)
