"""What a configuration means is the same to every reader, or the reader refuses and says what differs."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
import transformers
from model_families import FAMILIES, STORED, config_of, understood
from packaging.version import Version

from usllm.packed.meaning import difference, meaning_of
from usllm.packed.rotary import refuse_unread_rope
from usllm.system.errors import PackedFormatError

WRITERS = sorted(file.stem for file in STORED.glob("*.json"))
OLD = Version(transformers.__version__).major < 5
NEW_WRITER = next(writer for writer in WRITERS if Version(writer).major >= 5)
# The keys in which transformers 4.57 finds what transformers 5 keeps in `rope_parameters`.
OLDER_KEYS = ("rope_theta", "rope_scaling", "partial_rotary_factor", "rope_local_base_freq", "rotary_pct")


def stored(writer: str) -> dict[str, dict[str, Any]]:
    content: dict[str, dict[str, Any]] = json.loads((STORED / f"{writer}.json").read_text())
    return content


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("writer", WRITERS)
def test_what_either_version_exports_means_the_same_here(writer: str, family: str) -> None:
    written = stored(writer)[family]
    assert difference(written["meaning"], understood(written["config"])) is None


@pytest.mark.parametrize("family", FAMILIES)
def test_meaning_survives_json_and_the_type_that_is_loaded_with(family: str) -> None:
    model = understood(config_of(family))
    meaning = json.loads(json.dumps(meaning_of(model)))
    torch.set_default_dtype(torch.bfloat16)  # as transformers does while it loads
    try:
        with torch.device("meta"):
            assert difference(meaning, model) is None
    finally:
        torch.set_default_dtype(torch.float32)


# What transformers 5 saves by itself has no older keys: to 4.57 such a model has other rotary tables.
NAMED = {
    "llama, llama3": "rotary table differs",
    "gemma3_text": "rotary table of layer type sliding_attention differs",
    "gemma3_text, linear": "rotary table differs",
    "phi": "rotary table differs",
    "qwen3": "rotary table differs",
    "glm": None,  # its default is the value that was written
}


@pytest.mark.parametrize("family", NAMED)
def test_rotary_parameters_that_this_version_does_not_read_are_refused(family: str) -> None:
    written = stored(NEW_WRITER)[family]
    alone = {key: value for key, value in written["config"].items() if key not in OLDER_KEYS}
    model = understood(alone)
    found = difference(written["meaning"], model)
    if not OLD or NAMED[family] is None:
        assert found is None
        return
    versions = f"written by transformers {NEW_WRITER}, read by {transformers.__version__}"
    assert found == f"{NAMED[family]}: {versions}; upgrade transformers"
    with pytest.raises(PackedFormatError, match=r"^config\.json: rope_parameters: .*; upgrade transformers$"):
        refuse_unread_rope(model.config)  # of folders that store no meaning


@pytest.mark.parametrize("family", FAMILIES)
def test_rotary_parameters_that_are_read_are_not_refused_without_a_meaning(family: str) -> None:
    refuse_unread_rope(understood(stored(NEW_WRITER)[family]["config"]).config)


CHANGES: list[tuple[str, dict[str, Any], str]] = [
    ("llama", {"rope_theta": 10100.0}, "rotary table differs"),
    ("llama", {"hidden_act": "gelu"}, r"layers\.\*\.mlp\.act_fn differs"),
    ("llama", {"rms_norm_eps": 1e-5}, r"layers\.\*\.input_layernorm\.variance_epsilon differs"),
    ("llama", {"tie_word_embeddings": True}, r"tie_word_embeddings differs \(False is read as True\)"),
    ("llama, dynamic", {"rope_scaling": {"rope_type": "dynamic", "factor": 3.0}}, "rotary table differs"),
    ("phi3, longrope", {"rope_scaling": {"type": "longrope", "short_factor": [1.0] * 8, "long_factor": [9.0] * 8}},
     "rotary table differs"),
    ("mistral", {"sliding_window": 65}, "sliding_window differs"),
    ("qwen2", {"layer_types": ["full_attention"] * 4}, r"sliding.* differs \(True is read as False\)"),
    ("gemma2", {"final_logit_softcapping": 30.0}, "final_logit_softcapping differs"),
    ("gemma2", {"attn_logit_softcapping": 40.0}, "attn_logit_softcapping differs"),
    ("gemma2", {"query_pre_attn_scalar": 16}, r"self_attn\.scaling differs|query_pre_attn_scalar differs"),
    ("gemma3_text", {"sliding_window": 16}, "sliding_window differs"),
    ("granite", {"residual_multiplier": 0.5}, "residual_multiplier differs"),
    ("cohere2", {"logit_scale": 0.25}, "logit_scale differs"),
    ("stablelm", {"layer_norm_eps": 1e-3}, r"layernorm\.eps differs"),
]  # fmt: skip


@pytest.mark.parametrize(("family", "change", "named"), CHANGES)
def test_each_kind_of_fact_is_compared(family: str, change: dict[str, Any], named: str) -> None:
    content = config_of(family)
    meaning = json.loads(json.dumps(meaning_of(understood(content))))
    changed = understood(_without_new_rope(content, change) | change)
    found = difference(meaning, changed)
    assert found is not None
    with pytest.raises(AssertionError, match=named):
        raise AssertionError(found)
    assert "download it again" in found  # the same version: no other reason


def _without_new_rope(content: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    """transformers 5 reads the new form first."""
    rope = any(key.startswith("rope") for key in change)
    return {key: value for key, value in content.items() if not (rope and key == "rope_parameters")}


def test_older_writer_is_named_with_the_version_to_install() -> None:
    model = understood(config_of("llama"))
    meaning = meaning_of(model) | {"transformers": "4.50.0"}
    meaning["rotary"]["*"]["scaling"] = 2.0
    versions = f"written by transformers 4.50.0, read by {transformers.__version__}; install transformers 4.50.0"
    assert versions in str(difference(meaning, model))


def test_last_digits_of_another_machine_are_no_difference() -> None:
    model = understood(config_of("llama"))
    meaning = meaning_of(model)
    near, far = copy.deepcopy(meaning), copy.deepcopy(meaning)
    near["rotary"]["*"]["frequencies"][3] *= 1 + 1e-6
    far["rotary"]["*"]["frequencies"][3] *= 1 + 1e-4
    assert difference(near, model) is None
    assert difference(far, model) is not None


WRONG: list[Any] = [None, 0, "x", [], {}, [1, "a"], [[]], float("nan"), 10**400, {"*": 1}, {"*": {"frequencies": "x"}}]


@pytest.mark.parametrize("part", ["transformers", "rotary", "modules", "activations", "config"])
@pytest.mark.parametrize("value", WRONG, ids=lambda value: str(value)[:20])
def test_facts_of_any_origin_are_read_or_refused(part: str, value: Any) -> None:
    model = understood(config_of("llama"))
    for meaning in (meaning_of(model) | {part: value}, _inside(meaning_of(model), part, value)):
        try:
            found = difference(meaning, model)
        except PackedFormatError as error:
            found = str(error)
        assert found is None or "\n" not in found


def _inside(meaning: dict[str, Any], part: str, value: Any) -> dict[str, Any]:
    section = meaning[part]
    if isinstance(section, dict):
        section[next(iter(section))] = value
    return meaning
