"""Low-rank adapters over packed models, as `peft` trains, saves and loads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from every_method import compressor_of
from tiny_packed import IDS, logits, pack
from torch import Tensor

import usllm
from usllm.compress import compress_
from usllm.models import ModelSpec
from usllm.models.loading import load_dense
from usllm.packed.linear import LAYOUTS, packed_layers

peft = pytest.importorskip("peft")

METHODS: dict[str, dict[str, Any]] = {
    "sketch": {"operator": "mean", "rows": 1, "state_bits": 1, "bits_per_weight": 1.0, "output_scale": True},
    "rounding": {"bits": 2},
    "littlebit": {"bits_per_weight": 2.0, "paths": 2},
}


@pytest.fixture(scope="module", params=list(METHODS))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A packed model of each method."""
    model = load_dense(ModelSpec(kind="random", name="llama"))
    compress_(model, compressor_of(request.param, METHODS[request.param]))
    return pack(model, tmp_path_factory.mktemp(request.param) / "packed")


def adapted(folder: Path, layout: str = "auto", dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """A packed model with fresh adapters."""
    torch.manual_seed(0)
    model = usllm.load(folder, layout=layout, dtype=dtype)
    chosen = {"r": 4, "target_modules": ["q_proj", "v_proj", "down_proj"], "task_type": "CAUSAL_LM"} | options
    return peft.get_peft_model(model, peft.LoraConfig(**chosen))


def train(model: Any, steps: int = 4) -> list[float]:
    optimizer = torch.optim.AdamW([part for part in model.parameters() if part.requires_grad], lr=1e-2)
    losses = []
    for _ in range(steps):
        loss: Tensor = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_adapters_learn_and_packed_bytes_stay(folder: Path, layout: str, dtype: torch.dtype) -> None:
    model = adapted(folder, layout, dtype)
    before = {name: layer.packed.clone() for name, layer in packed_layers(model).items()}
    losses = train(model)
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0]
    assert {name for name, part in model.named_parameters() if part.requires_grad} == {
        name for name, _ in model.named_parameters() if "lora_" in name
    }
    first = model.base_model.model.model.layers[0].self_attn.q_proj.lora_B["default"].weight
    assert first.abs().sum() > 0  # the loss reached the first layer through all packed ones
    assert all(torch.equal(layer.packed, before[name]) for name, layer in packed_layers(model).items())


def test_saved_adapter_gives_the_same_logits_on_a_packed_model_that_is_loaded_anew(
    folder: Path, tmp_path: Path
) -> None:
    model = adapted(folder)
    train(model)
    wanted = logits(model.eval())
    model.save_pretrained(tmp_path / "adapter")
    assert {file.name for file in (tmp_path / "adapter").iterdir()} >= {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    assert not any("packed" in name for name in peft.get_peft_model_state_dict(model))

    loaded = peft.PeftModel.from_pretrained(usllm.load(folder, dtype=torch.float32), tmp_path / "adapter")
    assert torch.equal(logits(loaded), wanted)
    plain = logits(usllm.load(folder, dtype=torch.float32))
    assert not torch.equal(wanted, plain)
    with loaded.disable_adapter():
        assert torch.equal(logits(loaded), plain)
    again = peft.PeftModel.from_pretrained(
        usllm.load(folder, dtype=torch.float32), tmp_path / "adapter", is_trainable=True
    )
    assert train(again, 1)[0] < train(adapted(folder), 1)[0]


def test_adapter_that_transformers_attaches_and_saves_itself(folder: Path, tmp_path: Path) -> None:
    model = usllm.load(folder, dtype=torch.float32)
    model.add_adapter(peft.LoraConfig(r=4, target_modules="all-linear"))
    adapters = {name for name, part in model.named_parameters() if part.requires_grad}
    assert {f"{name}.lora_B.default.weight" for name in packed_layers(model)} <= adapters
    train(model)
    model.save_pretrained(tmp_path / "adapter")
    loaded = usllm.load(folder, dtype=torch.float32)
    loaded.load_adapter(tmp_path / "adapter")
    assert torch.equal(logits(loaded), logits(model.eval()))


@pytest.mark.parametrize("safe", [False, True])
def test_merging_is_refused_and_changes_nothing(folder: Path, safe: bool) -> None:
    model = adapted(folder)
    train(model)
    wanted = logits(model.eval())
    with pytest.raises(AttributeError, match=r"q_proj: has no weight\.data, it is packed; .* cannot be merged"):
        model.merge_adapter(safe_merge=safe)
    assert torch.equal(logits(model), wanted)
    with pytest.raises(AttributeError, match="cannot be merged"):
        model.merge_and_unload(safe_merge=safe)


def test_taken_off_again_the_packed_model_is_what_it_was(folder: Path, tmp_path: Path) -> None:
    model = adapted(folder)
    train(model)
    model.unload().save_pretrained(tmp_path / "packed")
    plain = logits(usllm.load(folder, dtype=torch.float32))
    assert torch.equal(logits(usllm.load(tmp_path / "packed", dtype=torch.float32)), plain)


def test_trainer_of_transformers_trains_adapters_and_refuses_a_model_without(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    rows = [{"input_ids": ids, "labels": ids} for ids in IDS]
    settings = TrainingArguments(
        tmp_path, max_steps=2, per_device_train_batch_size=1, use_cpu=True, report_to=[], disable_tqdm=True
    )
    model = adapted(folder)
    Trainer(model, settings, train_dataset=rows).train()
    assert any(part.abs().sum() > 0 for name, part in model.named_parameters() if "lora_B" in name)
    saved = peft.PeftModel.from_pretrained(usllm.load(folder, dtype=torch.float32), tmp_path / "checkpoint-2")
    assert torch.equal(logits(saved), logits(model.eval()))
    with pytest.raises(ValueError, match="adapters"):
        Trainer(usllm.load(folder), settings, train_dataset=rows)
