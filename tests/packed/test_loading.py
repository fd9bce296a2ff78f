"""``usllm.load``: the model, or one clear error."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny_packed import logits, pack, rewrite, seal, sketched_model

import usllm
from usllm.packed.export import RestStorage
from usllm.packed.linear import packed_layers
from usllm.system.errors import PackedFormatError, UserError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A packed model at full precision outside its sketch."""
    return pack(sketched_model(), tmp_path / "packed", RestStorage("float32"))


def test_load_gives_the_model_that_was_packed(folder: Path) -> None:
    assert torch.equal(logits(usllm.load(folder, dtype=torch.float32)), logits(sketched_model()))


def test_loaded_layers_are_compiled_whole_before_they_are_used(folder: Path) -> None:
    layer = next(iter(packed_layers(usllm.load(folder, dtype=torch.bfloat16)).values()))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, layer.in_features, dtype=torch.bfloat16)
    with torch.no_grad():
        assert torch.equal(compiled(x), layer(x))


def test_gradients_pass_through_layers_that_were_used_without(folder: Path) -> None:
    model = usllm.load(folder, dtype=torch.bfloat16)
    layer = next(iter(packed_layers(model).values()))
    x = torch.randn(3, layer.in_features, dtype=torch.bfloat16)
    with torch.inference_mode():
        y = layer(x)
    x.requires_grad_()
    again = layer(x)
    again.sum().backward()
    assert torch.equal(again, y)
    assert x.grad is not None


def test_dtype_is_the_stored_one_unless_asked(tmp_path: Path) -> None:
    stored = pack(sketched_model(), tmp_path / "bf16")
    assert usllm.load(stored).dtype == torch.bfloat16
    assert usllm.load(stored, dtype=torch.float32).dtype == torch.float32


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model.norm.weight": None}, r"^model\.norm\.weight: is missing"),
        ({"extra.weight": torch.zeros(2)}, r"^extra\.weight: is in the weight files, but not in the model"),
        ({"model.norm.weight": torch.zeros(65)}, r"^model\.norm\.weight: is \[65\], the model's is \[64\]"),
        (
            {"model.norm.weight": torch.full((64,), float("nan"))},
            r"^model\.norm\.weight: holds numbers that are not fin",
        ),
        ({"model.layers.0.mlp.up_proj.packed": None}, r"^model\.layers\.0\.mlp\.up_proj\.packed: is missing"),
    ],
)
def test_tensor_that_is_missing_unexpected_or_misshaped_is_named(
    folder: Path, changes: dict[str, torch.Tensor | None], named: str
) -> None:
    rewrite(folder, **changes)
    seal(folder)
    with pytest.raises(PackedFormatError, match=named):
        usllm.load(folder)


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("num_hidden_layers", 10**9, "num_hidden_layers=1000000000 is impossible"),
        ("num_hidden_layers", 3, r"model\.layers\.2\..*missing"),
        ("hidden_size", 10**12, "is 64x160 in the file, 1000000000000x160 in the model"),
        ("vocab_size", 10**15, "model.embed_tokens.weight"),
        ("model_type", "no_such_model", "config.json: describes no model"),
        ("attn_implementation", "someone/kernels", "refused"),
    ],
)
def test_configuration_that_does_not_fit_the_tensors_is_refused(
    folder: Path, key: str, value: object, named: str
) -> None:
    config = json.loads((folder / "config.json").read_text())
    config[key] = value
    (folder / "config.json").write_text(json.dumps(config))
    seal(folder)
    with pytest.raises(PackedFormatError, match=named):
        usllm.load(folder)


def test_folder_that_is_not_there_or_not_packed(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        usllm.load(tmp_path / "nowhere")
    with pytest.raises(UserError, match="Hugging Face hub did not give it"):
        usllm.load("nobody/nothing")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(PackedFormatError, match="not that of a packed usllm model"):
        usllm.load(tmp_path)


def test_callers_mistake_is_not_blamed_on_the_folder(folder: Path) -> None:
    with pytest.raises(Exception, match="devicemap") as raised:
        usllm.load(folder, devicemap="auto")
    assert not isinstance(raised.value, PackedFormatError)


def test_old_name_of_what_is_held_is_answered_with_the_new_one(folder: Path) -> None:
    with pytest.raises(UserError, match="keep_decoded=7: is layout='decoded', layout_memory=7 now"):
        usllm.load(folder, keep_decoded=7)
    with pytest.raises(UserError, match="layout='fast': is unknown; choose one of auto, compact"):
        usllm.load(folder, layout="fast")


def test_nothing_decoded_stays_without_a_budget(folder: Path) -> None:
    model = usllm.load(folder, dtype=torch.float32)
    logits(model)
    assert all(layer._decoded is None for layer in packed_layers(model).values())
