"""Rotary embeddings of a GGUF file: translated into a configuration of transformers, or refused.

llama.cpp stores scaled frequencies as tensors of divisors (``rope_freqs.weight``, ``rope_factors_*.weight``), which
transformers does not read. A configuration carries parameters instead, so that they survive saving and packing: they
are recovered from the divisors, and the frequencies of the finished model are compared with those of the file.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from usllm.models.gguf_contents import GgufContents
from usllm.packed.rotary import older_rope
from usllm.system.errors import UserError

ROPE_KEYS = (
    "rope.freq_base",
    "rope.freq_base_swa",
    "rope.dimension_count",
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scaling.original_context_length",
    "rope.scaling.attn_factor",
    "rope.scaling.finetuned",
)
"""Metadata keys read here, without the architecture's name."""

ROPE_TENSORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
"""Tensors read here, each ``[head_dim / 2]``: divisors of the frequencies. No parameters of a model."""

_LOCAL_BASE = 10_000.0  # of Gemma 3's layers with a sliding window, and llama.cpp's default of all others
_WORDS = ("rope_theta", "rope_scaling", "partial_rotary_factor", "rope_local_base_freq")
_TOLERANCE = 2e-6  # both sides are computed in fp32
_PUBLISHED = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""Of all published Llama models with scaled frequencies; only their factor varies."""


def rope_settings(contents: GgufContents, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a configuration in the words that both majors of transformers read.

    Args:
        contents: the file.
        settings: what is known so far; its head size and context are used.

    Raises:
        UserError: the file asks for a rotation that a configuration of this model cannot express.
    """
    width = settings.get("head_dim", settings["hidden_size"] // settings["num_attention_heads"])
    rotated = contents.of_model("rope.dimension_count", width)
    found: dict[str, Any] = {"rope_theta": float(contents.of_model("rope.freq_base", 10_000.0))}
    if rotated != width and contents.architecture != "phi3":
        raise contents.refusal(f"rope.dimension_count={rotated} rotates a part of a head of {width} only")
    if type(rotated) is not int or not 0 < rotated <= width or rotated % 2:
        raise contents.refusal(f"rope.dimension_count={rotated!r}: a head of {width} numbers rotates them in pairs")
    if contents.architecture == "phi3":
        found["partial_rotary_factor"] = rotated / width
    local = contents.of_model("rope.freq_base_swa")
    if contents.architecture == "gemma3":
        found["rope_local_base_freq"] = float(_LOCAL_BASE if local is None else local)
    elif local is not None:
        raise contents.refusal(f"rope.freq_base_swa={local} has no place in a {contents.architecture} of transformers")
    if (scaling := _scaling(contents, settings, found["rope_theta"], rotated)) is not None:
        found["rope_scaling"] = scaling
    return found


def check_rope(contents: GgufContents, model: nn.Module) -> None:
    """Compare the frequencies that a finished model rotates by with those that the file states.

    Raises:
        UserError: they differ.
    """
    width = None
    for name, frequencies in model.named_buffers():
        kind = name.rpartition(".")[2]
        if not kind.endswith("inv_freq") or kind.startswith("original") or "_original" in kind:
            continue
        width = 2 * frequencies.numel()
        local = contents.architecture == "gemma3" and ("sliding" in kind or "rotary_emb_local" in name)
        wanted = _frequencies(contents, width, local)
        if wanted.shape != frequencies.shape or not torch.allclose(
            frequencies.double(), wanted, rtol=_TOLERANCE, atol=0
        ):
            worst = (frequencies.double() / wanted - 1).abs().max()
            raise contents.refusal(
                f"transformers reads its rotary frequencies wrongly: those of {name} are {float(worst):.1%} off"
            )
    if width is None:
        raise contents.refusal("the model of transformers has no rotary embedding to compare with")


def _frequencies(contents: GgufContents, width: int, local: bool) -> Tensor:
    """Angles per position, fp64 ``[width / 2]``, from the file alone."""
    base = float(contents.of_model("rope.freq_base", 10_000.0))
    if local:
        base = float(contents.of_model("rope.freq_base_swa", _LOCAL_BASE))
    frequencies = base ** -(torch.arange(0, width, 2, dtype=torch.float64) / width)
    if local:
        return frequencies
    for name in ("rope_freqs.weight", "rope_factors_short.weight"):
        if name in contents.shapes:
            frequencies = frequencies / contents.tensor(name).double()
    if contents.of_model("rope.scaling.type") == "linear":
        frequencies = frequencies / float(contents.of_model("rope.scaling.factor", 1.0))
    return frequencies


def _scaling(contents: GgufContents, settings: Mapping[str, Any], base: float, rotated: int) -> dict[str, Any] | None:
    kind = contents.of_model("rope.scaling.type", "none")
    factor = contents.of_model("rope.scaling.factor")
    tensors = [name for name in ROPE_TENSORS if name in contents.shapes]
    for name in tensors:
        if contents.shapes[name] != (rotated // 2,):
            raise contents.refusal(f"{name} is {list(contents.shapes[name])}, a head rotates {rotated // 2} pairs")
    if tensors == list(ROPE_TENSORS[1:]) and contents.architecture == "phi3" and kind in ("none", "longrope"):
        return _longrope(contents, settings)
    if (attention := contents.of_model("rope.scaling.attn_factor", 1.0)) != 1.0:
        raise contents.refusal(f"rope.scaling.attn_factor={attention} is not supported")
    if tensors == [ROPE_TENSORS[0]] and contents.architecture == "llama" and kind == "none":
        return llama3_scaling(contents, contents.tensor(tensors[0]), base)
    if tensors:
        raise contents.refusal(
            f"{tensors[0]} with rope.scaling.type={kind} in a {contents.architecture} is not understood"
        )
    if kind == "linear" and factor and contents.architecture != "phi3":
        return {"rope_type": "linear", "factor": float(factor)}
    if kind != "none" or factor not in (None, 0.0, 1.0):
        raise contents.refusal(f"rope.scaling.type={kind} (factor {factor}) is not supported")
    return None


def rope_metadata(config: PretrainedConfig, architecture: str, width: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The inverse of :func:`rope_settings`.

    Args:
        config: of the model, in the words of either major of transformers.
        architecture: GGUF's name of its family.
        width: of a head.

    Returns:
        Metadata without the architecture's name, and tensors, fp32 ``[rotated / 2]``.

    Raises:
        UserError: GGUF has no words for this rotation.
    """
    words = {key: getattr(config, key, None) for key in _WORDS} | older_rope(config.to_dict())
    base, scaling = float(words["rope_theta"] or 10_000.0), words["rope_scaling"] or {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    found: dict[str, Any] = {"rope.freq_base": base}
    rotated = int(width * (words["partial_rotary_factor"] or 1.0))
    if architecture in ("llama", "phi3"):
        found["rope.dimension_count"] = rotated
    if architecture == "gemma3" and (local := float(words["rope_local_base_freq"] or _LOCAL_BASE)) != _LOCAL_BASE:
        found["rope.freq_base_swa"] = local
    if kind == "default":
        return found, {}
    if kind == "linear":
        return found | {"rope.scaling.type": kind, "rope.scaling.factor": float(scaling["factor"])}, {}
    if kind == "llama3" and architecture == "llama":
        frequencies = base ** -(torch.arange(0, rotated, 2, dtype=torch.float64) / rotated)
        parameters = {key: scaling[key] for key in ("factor", *_PUBLISHED)}
        return found, {ROPE_TENSORS[0]: _llama3_divisors(frequencies, **parameters).float()}
    if kind == "longrope" and architecture == "phi3":
        context, original = config.max_position_embeddings, config.original_max_position_embeddings
        found["rope.scaling.attn_factor"] = _attention_factor(context, original)
        factors = {f"rope_factors_{length}.weight": scaling[f"{length}_factor"] for length in ("long", "short")}
        return found, {name: torch.tensor(values, dtype=torch.float32) for name, values in factors.items()}
    raise UserError(f"form=gguf: rope_type={kind} of a {config.model_type} has no form in GGUF; pass form=dense")


def _attention_factor(context: int, original: int) -> float:
    return math.sqrt(1 + math.log(context / original) / math.log(original)) if context > original else 1.0


def _longrope(contents: GgufContents, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Phi-3 with a long context: divisors for short and for long texts, and a factor of the attention."""
    context, original = settings["max_position_embeddings"], settings["original_max_position_embeddings"]
    implied = _attention_factor(context, original)
    stated = float(contents.of_model("rope.scaling.attn_factor", 1.0))
    if abs(stated / implied - 1) > 1e-5:
        raise contents.refusal(f"rope.scaling.attn_factor={stated} is not the {implied:.6f} that its contexts imply")
    return {
        "type": "longrope",
        "short_factor": contents.tensor("rope_factors_short.weight").double().tolist(),
        "long_factor": contents.tensor("rope_factors_long.weight").double().tolist(),
    }


def llama3_scaling(contents: GgufContents, divisors: Tensor, base: float) -> dict[str, Any] | None:
    """Parameters of the ``llama3`` (or ``linear``, or no) scaling that gives ``divisors``, fp32 ``[head_dim / 2]``.

    Between two wavelengths ``1 / divisor`` is linear in the frequency; longer waves are divided by ``factor``, shorter
    ones stay. A line through the frequencies in between gives the two wavelengths; where there are too few of them,
    the published parameters are tried.

    Raises:
        UserError: no parameters give these divisors.
    """
    divisors = divisors.double()
    factor = float(divisors[-1])
    if bool((divisors == 1).all()):
        return None
    if bool((divisors == factor).all()):
        return {"rope_type": "linear", "factor": factor}
    frequencies = base ** -(torch.arange(0, 2 * len(divisors), 2, dtype=torch.float64) / (2 * len(divisors)))
    for candidate in (_PUBLISHED, _through_line(divisors, frequencies, factor)):
        if candidate is None:
            continue
        expected = _llama3_divisors(frequencies, factor, **candidate)
        if torch.allclose(divisors, expected, rtol=_TOLERANCE, atol=0):
            return {"rope_type": "llama3", "factor": factor, **candidate}
    raise contents.refusal(
        "rope_freqs.weight holds divisors of the rotary frequencies that no rope_scaling of transformers expresses"
    )


def _through_line(divisors: Tensor, frequencies: Tensor, factor: float) -> dict[str, Any] | None:
    between = (divisors > 1 + 1e-6) & (divisors < factor * (1 - 1e-6))
    if int(between.sum()) < 2:
        return None
    share = (1 / divisors[between] - 1 / factor) / (1 - 1 / factor)
    turns = frequencies[between] / (2 * math.pi)
    slope = float((share[0] - share[-1]) / (turns[0] - turns[-1]))
    offset = float(share[0] - slope * turns[0])
    if slope <= 0 or offset >= 0:
        return None
    # (context * turns - low) / (high - low): of the equivalent triples, the one with low = 1.
    spread = -1 / offset
    return {
        "low_freq_factor": 1.0,
        "high_freq_factor": _whole(1 + spread, 1e-4),
        "original_max_position_embeddings": round(slope * spread),
    }


def _whole(value: float, tolerance: float) -> float:
    return float(round(value)) if abs(value - round(value)) < tolerance * value else value


def _llama3_divisors(
    frequencies: Tensor,
    factor: float,
    low_freq_factor: float,
    high_freq_factor: float,
    original_max_position_embeddings: int,
) -> Tensor:
    turns = original_max_position_embeddings * frequencies / (2 * math.pi)
    share = ((turns - low_freq_factor) / (high_freq_factor - low_freq_factor)).clamp(0, 1)
    return 1 / ((1 - share) / factor + share)
