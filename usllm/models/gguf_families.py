"""What the metadata of a GGUF file means for each architecture, as a configuration of transformers.

The configuration is built from the file and from llama.cpp's defaults alone. transformers' own reading skips what it
does not know and fills the gaps with the defaults of a configuration class, which are one published model's values.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import AutoConfig, PretrainedConfig

from usllm.models.gguf_contents import GgufContents
from usllm.models.gguf_rope import ROPE_KEYS, rope_settings
from usllm.models.gguf_tokenizer import TOKENIZER_KEYS
from usllm.system.errors import UserError, first_line

SETTINGS = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}
"""Keys that every file must state, and what they are called in transformers."""

_DERIVED = ("attention.head_count_kv", "attention.key_length", "attention.value_length", "vocab_size")
"""Keys that every file may state; llama.cpp derives the first three from the number of heads where they are absent."""

Extra = Callable[[GgufContents, Mapping[str, Any]], dict[str, Any]]
"""Settings of one architecture, from the file and the settings that all have."""
Stated = Callable[[PretrainedConfig], dict[str, Any]]
"""The inverse: metadata of one architecture, without its name, from a configuration."""


@dataclass(frozen=True)
class GgufFamily:
    """One architecture of GGUF files.

    Attributes:
        model_type: what transformers calls it.
        extra: settings beyond those of all decoders.
        stated: metadata beyond that of all decoders.
        keys: metadata keys that ``extra`` reads, without the architecture's name.
        norm_offset: what llama.cpp adds to the weights of all norms.
        permuted_heads: whether llama.cpp stores the rows of ``attn_q`` and ``attn_k`` in pairs of a rotation.
        free_head_dim: whether heads may have another width than ``hidden_size / num_attention_heads``.
    """

    model_type: str
    extra: Extra = field(default=lambda contents, settings: {})
    stated: Stated = field(default=lambda config: {})
    keys: tuple[str, ...] = ()
    norm_offset: int = 0
    permuted_heads: bool = False
    free_head_dim: bool = True


def _llama(contents: GgufContents, settings: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "attention_bias": "blk.0.attn_q.bias" in contents.shapes,
        "mlp_bias": "blk.0.ffn_down.bias" in contents.shapes,
    }


def _gemma2(contents: GgufContents, settings: Mapping[str, Any]) -> dict[str, Any]:
    # llama.cpp knows the 27 billion weights by their layers, and scales their queries by the width of a share of them.
    largest = settings["num_hidden_layers"] == 46
    return {
        "attn_logit_softcapping": contents.of_model("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": contents.of_model("final_logit_softcapping", 30.0),
        "sliding_window": contents.of_model("attention.sliding_window", 4096),
        "query_pre_attn_scalar": _query_scalar(settings, largest),
        "hidden_activation": "gelu_pytorch_tanh",
    }


def _gemma3(contents: GgufContents, settings: Mapping[str, Any]) -> dict[str, Any]:
    window = contents.of_model("attention.sliding_window")
    if not window:
        raise contents.refusal("it states no gemma3.attention.sliding_window")
    pattern = contents.of_model("attention.sliding_window_pattern", 6)
    layers = settings["num_hidden_layers"]
    slides = [(layer + 1) % pattern != 0 for layer in range(layers)] if isinstance(pattern, int) else list(pattern)
    if len(slides) != layers:
        raise contents.refusal(f"gemma3.attention.sliding_window_pattern has {len(slides)} entries for {layers} layers")
    return {
        "sliding_window": window,
        "layer_types": ["sliding_attention" if slide else "full_attention" for slide in slides],
        "query_pre_attn_scalar": _query_scalar(settings, layers == 62),
        "final_logit_softcapping": contents.of_model("final_logit_softcapping"),
        "hidden_activation": "gelu_pytorch_tanh",
    }


def _gemma2_keys(config: PretrainedConfig) -> dict[str, Any]:
    return {
        "attn_logit_softcapping": _number(config.attn_logit_softcapping),
        "final_logit_softcapping": _number(config.final_logit_softcapping),
        "attention.sliding_window": config.sliding_window,
    }


def _gemma3_keys(config: PretrainedConfig) -> dict[str, Any]:
    slides = [kind == "sliding_attention" for kind in config.layer_types]
    usual = [(layer + 1) % 6 != 0 for layer in range(len(slides))]
    return {
        "attention.sliding_window": config.sliding_window,
        "attention.sliding_window_pattern": None if slides == usual else slides,
        "final_logit_softcapping": _number(config.final_logit_softcapping),
    }


def _number(value: float | None) -> float | None:
    return None if value is None else float(value)


def _query_scalar(settings: Mapping[str, Any], largest: bool) -> int:
    return int(settings["hidden_size"] // settings["num_attention_heads"] if largest else settings["head_dim"])


def _phi3_keys(config: PretrainedConfig) -> dict[str, Any]:
    return {
        "attention.sliding_window": config.sliding_window or None,
        "rope.scaling.original_context_length": config.original_max_position_embeddings,
    }


def _phi3(contents: GgufContents, settings: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "sliding_window": contents.of_model("attention.sliding_window") or None,
        "original_max_position_embeddings": contents.of_model(
            "rope.scaling.original_context_length", settings["max_position_embeddings"]
        ),
    }


GGUF_FAMILIES = {
    "llama": GgufFamily("llama", _llama, permuted_heads=True),
    "qwen2": GgufFamily("qwen2", free_head_dim=False),
    "qwen3": GgufFamily("qwen3"),
    "gemma2": GgufFamily(
        "gemma2",
        _gemma2,
        _gemma2_keys,
        ("attn_logit_softcapping", "final_logit_softcapping", "attention.sliding_window"),
        norm_offset=1,
    ),
    "gemma3": GgufFamily(
        "gemma3_text",
        _gemma3,
        _gemma3_keys,
        ("attention.sliding_window", "attention.sliding_window_pattern", "final_logit_softcapping"),
        norm_offset=1,
    ),
    "phi3": GgufFamily("phi3", _phi3, _phi3_keys, ("attention.sliding_window",), free_head_dim=False),
}
"""The architectures that are read and written. Each is compared with transformers' own model of it in the tests."""

_DESCRIPTIONS = ("GGUF.", "general.", "quantize.", "split.")
"""Where keys begin that tell a file's origin and layout, which the ``gguf`` package reads, and nothing of the model."""


def family_of(contents: GgufContents) -> GgufFamily:
    """The family of a file.

    Raises:
        UserError: its architecture is none of :data:`GGUF_FAMILIES`, or it holds no model.
    """
    kind = contents.metadata.get("general.type", "model")
    if kind != "model":
        raise contents.refusal(f"general.type is {kind!r}, not a whole model")
    try:
        return GGUF_FAMILIES[contents.architecture]
    except KeyError:
        raise contents.refusal(
            f"the architecture {contents.architecture!r} is not supported; those read are {', '.join(GGUF_FAMILIES)}"
        ) from None


def configuration_of(contents: GgufContents) -> PretrainedConfig:
    """The configuration that a file's metadata describes, with every key accounted for.

    Raises:
        UserError: a key is missing, unknown, or says what transformers' model of that architecture cannot do.
    """
    family = family_of(contents)
    name = contents.architecture
    known = {f"{name}.{key}" for key in (*SETTINGS, *_DERIVED, *ROPE_KEYS, *family.keys)} | TOKENIZER_KEYS
    odd = [key for key in contents.metadata if key not in known and not key.startswith(_DESCRIPTIONS)]
    odd = [key for key in odd if not key.startswith("tokenizer.chat_template")]
    if odd:
        value = repr(contents.metadata[odd[0]])
        raise contents.refusal(
            f"{odd[0]}={value if len(value) < 60 else value[:60] + '…'} is not understood ({len(odd)} such keys in all)"
        )
    settings: dict[str, Any] = {}
    for key, setting in SETTINGS.items():
        value = contents.of_model(key)
        if not isinstance(value, int | float) or value <= 0:
            raise contents.refusal(f"{name}.{key}={value!r}: a number is needed, the same for all layers")
        settings[setting] = value
    settings |= _heads(contents, settings, family)
    settings |= family.extra(contents, settings)
    settings |= rope_settings(contents, settings)
    settings["tie_word_embeddings"] = "output.weight" not in contents.shapes
    settings["vocab_size"] = _vocabulary(contents)
    for which in ("bos", "eos"):
        settings[f"{which}_token_id"] = contents.metadata.get(f"tokenizer.ggml.{which}_token_id")
    settings["pad_token_id"] = contents.metadata.get("tokenizer.ggml.padding_token_id")
    try:
        return AutoConfig.for_model(family.model_type, **settings)
    except Exception as error:  # whatever an impossible value runs into
        raise contents.refusal(f"its metadata describe no {family.model_type} model ({first_line(error)})") from error


def _heads(contents: GgufContents, settings: Mapping[str, Any], family: GgufFamily) -> dict[str, Any]:
    heads = settings["num_attention_heads"]
    groups = contents.of_model("attention.head_count_kv", heads)
    if not isinstance(groups, int):
        raise contents.refusal(f"{contents.architecture}.attention.head_count_kv={groups!r} differs between layers")
    usual = settings["hidden_size"] // heads
    width = contents.of_model("attention.key_length", usual)
    if (values := contents.of_model("attention.value_length", width)) != width:
        raise contents.refusal(f"keys of {width} numbers and values of {values} are not supported")
    if width != usual and not family.free_head_dim:
        raise contents.refusal(f"{contents.architecture}.attention.key_length={width}: {family.model_type} has {usual}")
    if groups < 1 or heads % groups:
        raise contents.refusal(f"{heads} heads cannot share {groups} keys")
    found = {"num_key_value_heads": groups}
    return found | ({"head_dim": width} if family.free_head_dim else {})


def _vocabulary(contents: GgufContents) -> int:
    """Rows of the embedding, which the stated sizes must not exceed (a vocabulary may be padded to a round number)."""
    shape = contents.shapes.get("token_embd.weight")
    if shape is None:
        raise UserError(f"model.file={contents.path}: the tensor token_embd.weight is missing; download the file again")
    for key in (f"{contents.architecture}.vocab_size", "tokenizer.ggml.tokens"):
        stated = contents.metadata.get(key, shape[0])
        stated = len(stated) if isinstance(stated, list) else stated
        if stated > shape[0] or (key.endswith("vocab_size") and stated != shape[0]):
            raise contents.refusal(f"{key} counts {stated} tokens, token_embd.weight {shape[0]}")
    return shape[0]
