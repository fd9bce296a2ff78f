"""What vLLM may be started with: read, or refused in one line that names the key."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from usllm.serving.vllm.settings import Settings
from usllm.system.errors import UserError


def engine(**changes: Any) -> Any:
    """The part of vLLM's configuration that is read."""
    parallel = {"tensor_parallel_size": 1, "pipeline_parallel_size": 1}
    return SimpleNamespace(
        parallel_config=SimpleNamespace(**{key: changes.get(key, value) for key, value in parallel.items()}),
        lora_config=changes.get("lora_config"),
        load_config=SimpleNamespace(load_format=changes.get("load_format", "auto")),
        model_config=SimpleNamespace(dtype=torch.bfloat16),
        additional_config=changes.get("additional_config", {}),
    )


def test_layouts_are_asked_for_in_additional_config() -> None:
    assert Settings.of(engine()) == Settings(torch.bfloat16, "auto", None)
    asked = {"usllm": {"layout": "decoded", "layout_memory": 1000}, "others": 1}
    assert Settings.of(engine(additional_config=asked)) == Settings(torch.bfloat16, "decoded", 1000)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"tensor_parallel_size": 2}, "tensor_parallel_size=2: a packed layer is not cut into pieces; leave it at 1"),
        ({"pipeline_parallel_size": 2}, "pipeline_parallel_size=2: "),
        ({"lora_config": object()}, "enable_lora=True: "),
        ({"load_format": "dummy"}, "load_format=dummy: "),
        ({"additional_config": {"usllm": 1}}, "additional_config.usllm=1: "),
        ({"additional_config": {"usllm": {"layuot": "auto"}}}, "additional_config.usllm.layuot: is unknown"),
        ({"additional_config": {"usllm": {"layout": "fast"}}}, "additional_config.usllm.layout='fast': "),
        ({"additional_config": {"usllm": {"layout_memory": "1GB"}}}, "additional_config.usllm.layout_memory='1GB': "),
        (
            {"additional_config": {"usllm": {"layout": "compact", "layout_memory": 1000}}},
            "additional_config.usllm.layout_memory=1000: nothing is held with layout=compact; leave it out",
        ),
    ],
)
def test_what_packed_models_do_not_have_is_refused_in_one_line(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as refused:
        Settings.of(engine(**changes))
    assert str(refused.value).startswith(message) and "\n" not in str(refused.value)


def test_layers_that_vllm_did_not_ask_for_are_refused() -> None:
    Settings.refuse_left_over(set())
    with pytest.raises(UserError, match=r"^model\.layers\.0\.a: is in the folder, .* 2 in all"):
        Settings.refuse_left_over({"model.layers.0.b", "model.layers.0.a"})
