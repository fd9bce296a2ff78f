"""Typed configuration of the commands around packed models, and their checks."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from omegaconf import DictConfig

from usllm.config import rules
from usllm.config.compression import check_compressor
from usllm.config.overrides import group_of, idle_beside_checkpoint, idle_beside_packed, key_of
from usllm.config.rules import Problems
from usllm.config.schema import AllocationConfig, DataConfig, EvaluationConfig
from usllm.config.structure import built, merge_typed
from usllm.config.validation import plain_config, user_error
from usllm.models import ModelSpec
from usllm.models.gguf_out import GGUF_TYPES, check_gguf_out
from usllm.packed.folder import is_packed
from usllm.packed.layouts import CHOICES
from usllm.packed.new_folder import DENSE_FOLDER, PACKED_FOLDER, check_out
from usllm.system.files import expanded, unusable

DTYPES = ("auto", "float32", "bfloat16", "float16")
LEAST_TEMPERATURE = 0.001
"""Scores divided by less are too large to be drawn from."""
FORMS = {"packed": ("rest", "max_shard_size"), "dense": ("dense", "max_shard_size"), "gguf": ("gguf",)}
"""Forms of an export, and the keys that have an effect on each but not on all."""
WITHOUT_CKPT = ("model", "data", "sketch", "allocation", "calibration_sequences", "seed")
"""Keys of ``usllm-export`` that say what to pack where there is no checkpoint."""
_SIZE = re.compile(r"^(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?$", re.IGNORECASE)


@dataclass
class RestConfig:
    """How what the sketch leaves alone is stored; see :class:`usllm.packed.export.RestStorage`."""

    dtype: str = "bfloat16"
    embeddings: int = 16
    linears: int = 16


@dataclass
class DenseConfig:
    """How decoded weights are stored in a folder of transformers."""

    dtype: str = "bfloat16"


@dataclass
class GgufConfig:
    """How decoded weights are stored in a GGUF file; see :func:`usllm.models.gguf_plan.plan_gguf`."""

    type: str = "BF16"
    embeddings: str | None = None


@dataclass
class ExportConfig:
    """Everything ``usllm-export`` reads; ``conf/export.yaml`` says what each key means."""

    out: str
    model: ModelSpec
    data: DataConfig
    sketch: dict[str, Any]
    allocation: AllocationConfig = field(default_factory=AllocationConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    form: str = "packed"
    rest: RestConfig = field(default_factory=RestConfig)
    dense: DenseConfig = field(default_factory=DenseConfig)
    gguf: GgufConfig = field(default_factory=GgufConfig)
    ckpt: str | None = None
    overwrite: bool = False
    max_shard_size: str = "4GB"
    calibration_sequences: int = 32
    measure: bool = False
    seed: int = 0
    plugins: list[str] = field(default_factory=list)


@dataclass
class GenerateConfig:
    """Everything ``usllm-generate`` reads; ``conf/generate.yaml`` says what each key means."""

    prompt: str
    folder: str | None = None
    ckpt: str | None = None
    chat: bool = False
    max_new_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    device: str = "auto"
    dtype: str = "auto"
    layout: str = "auto"
    layout_memory: str | None = None
    plugins: list[str] = field(default_factory=list)


@dataclass
class InspectConfig:
    """Everything ``usllm-inspect`` reads."""

    folder: str
    json: str | None = None
    plugins: list[str] = field(default_factory=list)


def check_export(cfg: DictConfig | dict[str, Any], given: Sequence[str] = ()) -> ExportConfig:
    """Typed configuration of ``usllm-export``.

    Args:
        cfg: Composed configuration.
        given: Overrides that the user typed: those that a checkpoint decides are refused beside one.

    Raises:
        UserError: With all problems in one message, each with key, value and way out.
    """
    problems = Problems()
    config = merge_typed(ExportConfig, plain_config(cfg), problems)
    if config is None or config.model is None or config.data is None:
        raise user_error(problems)
    _check_form(config, given, problems)
    problems.choice("rest.dtype", config.rest.dtype, DTYPES[1:])
    for key in ("embeddings", "linears"):
        bits = getattr(config.rest, key)
        problems.require(bits in (16, 8, 4), f"rest.{key}", bits, "must be 16 (as rest.dtype), 8 or 4")
    _check_size("max_shard_size", config.max_shard_size, 1, problems)
    problems.number("calibration_sequences", config.calibration_sequences, least=1)
    problems.number("seed", config.seed, least=0, below=2**32)
    if config.ckpt is not None:
        problems.extend(idle_beside_checkpoint(config.ckpt, given, WITHOUT_CKPT))
    if not config.measure:
        idle = [override for override in given if group_of(override) == "evaluation"]
        problems.extend(f"{override}: nothing is measured; pass measure=true, or leave it out" for override in idle)
    packed = config.ckpt is None and config.model.kind == "folder" and is_packed(expanded(str(config.model.name)))
    if packed:
        problems.extend(refused_beside_packed(config, given))
        if config.form == "packed":
            problems.append(f"model={config.model.name}: is packed already; pass form=dense or form=gguf to decode it")
    elif config.ckpt is None:
        check_compressor(config.sketch, config.allocation, problems)
        rules.check_model(config.model, problems)
        rules.check_data(config.data, problems)
    if config.measure:
        rules.check_evaluation(config.evaluation, problems)
        if config.ckpt is None and not packed:
            rules.check_unseen(rules.sources_of_training(config.data), config.evaluation, problems)
        if not packed and not config.evaluation.test_sets and not config.evaluation.validation_split:
            problems.append("evaluation.test_sets: none given, so measure=true has nothing to measure")
    problems.require(bool(config.out), "out", config.out, "is empty; give the folder, or the file, to make")
    if config.out:
        built(lambda: _check_out(config), problems)
    if problems:
        raise user_error(problems)
    return config


def refused_beside_packed(config: ExportConfig, given: Sequence[str]) -> list[str]:
    """One line for each setting that has no meaning where a packed model is exported.

    A model of the hub is known as a packed one after it was fetched only, so this is for the command to ask too.

    Args:
        config: Configuration, whose ``model`` is packed.
        given: Overrides that the user typed.
    """
    model = f"model={config.model.name}"
    lines = idle_beside_packed(str(config.model.name), given, WITHOUT_CKPT)
    if config.measure and config.evaluation.validation_split:
        typed = [override for override in given if key_of(override) == "evaluation.validation_split"]
        lines += [
            f"{override}: {model} does not bring the text that it was split from; leave it out" for override in typed
        ]
    if config.measure and not config.evaluation.test_sets:
        lines.append(
            f"evaluation.test_sets: none given, so measure=true has nothing to measure beside {model}; "
            "pass evaluation=files and a text, or leave measure out"
        )
    return lines


def _check_form(config: ExportConfig, given: Sequence[str], problems: Problems) -> None:
    problems.choice("form", config.form, tuple(FORMS))
    for override in given if config.form in FORMS else ():
        key = group_of(override)
        forms = [form for form, keys in FORMS.items() if key in keys]
        if forms and config.form not in forms:
            others = " or form=".join(forms)
            problems.append(f"{override}: has no effect with form={config.form}; leave it out, or pass form={others}")
    problems.choice("dense.dtype", config.dense.dtype, DTYPES[1:])
    problems.choice("gguf.type", config.gguf.type, GGUF_TYPES)
    if config.gguf.embeddings is not None:
        problems.choice("gguf.embeddings", config.gguf.embeddings, GGUF_TYPES)
    if config.form == "gguf" and config.measure:
        problems.append(
            f"measure=true: form=gguf has no card for the figures; usllm-eval model={config.out} measures it"
        )


def _check_out(config: ExportConfig) -> None:
    out = expanded(config.out)
    if config.form == "gguf":
        check_gguf_out(out, config.overwrite)
    else:
        check_out(out, config.overwrite, DENSE_FOLDER if config.form == "dense" else PACKED_FOLDER)


def check_generate(cfg: DictConfig | dict[str, Any]) -> GenerateConfig:
    """Typed configuration of ``usllm-generate``.

    Raises:
        UserError: With all problems in one message.
    """
    problems = Problems()
    config = merge_typed(GenerateConfig, plain_config(cfg), problems)
    if config is None:
        raise user_error(problems)
    if (config.folder is None) == (config.ckpt is None):
        given = "neither is given" if config.ckpt is None else f"model={config.folder} and ckpt={config.ckpt} are"
        problems.append(f"model and ckpt: {given}; give exactly one, model=<packed folder> or ckpt=<run>")
    problems.number("max_new_tokens", config.max_new_tokens, least=1)
    problems.number("seed", config.seed, least=0, below=2**32)
    usable = config.temperature == 0 or (math.isfinite(config.temperature) and config.temperature >= LEAST_TEMPERATURE)
    problems.require(
        usable,
        "temperature",
        config.temperature,
        f"must be 0, which takes the likeliest token, or at least {LEAST_TEMPERATURE}",
    )
    problems.number("top_p", config.top_p, above=0)
    problems.require(config.top_p <= 1, "top_p", config.top_p, "must be at most 1")
    for key, default in (("seed", 0), ("top_p", 1)):
        drawn = config.temperature != 0 or getattr(config, key) == default
        problems.require(
            drawn, key, getattr(config, key), "nothing is drawn at temperature=0; raise it, or leave it out"
        )
    problems.choice("device", config.device, ("auto", "cpu", "cuda"))
    problems.choice("dtype", config.dtype, DTYPES)
    problems.choice("layout", config.layout, CHOICES)
    if config.layout_memory is not None:
        _check_size("layout_memory", config.layout_memory, 0, problems)
    if config.layout == "compact" and config.layout_memory is not None:
        problems.append(f"layout_memory={config.layout_memory}: nothing is held with layout=compact; leave it out")
    held = {"layout": (config.layout, "auto"), "layout_memory": (config.layout_memory, None)}
    for key, (value, unset) in held.items():
        if config.ckpt is not None and value != unset:
            problems.append(f"{key}={value}: has a meaning for packed models only; leave it out")
    if problems:
        raise user_error(problems)
    return config


def check_inspect(cfg: DictConfig | dict[str, Any]) -> InspectConfig:
    """Typed configuration of ``usllm-inspect``.

    Raises:
        UserError: With all problems in one message.
    """
    problems = Problems()
    config = merge_typed(InspectConfig, plain_config(cfg), problems)
    if config is None or problems:
        raise user_error([line.replace("folder", "model") if line.startswith("folder") else line for line in problems])
    problems.require(bool(config.folder), "model", config.folder, "is empty; give the folder of a packed model")
    if config.json is not None:
        reason = unusable(expanded(config.json)) if config.json else "is empty"
        problems.require(reason is None, "json", config.json, f"{reason}; give the name of a file")
    if problems:
        raise user_error(problems)
    return config


def size_in_bytes(text: str) -> int:
    """Bytes of a size such as ``200MB``, ``1.5GiB`` or ``1000``."""
    match = _SIZE.match(text.strip())
    assert match is not None, "checked before"
    power = " KMGT".index(match[2].upper() or " ")
    return int(float(match[1]) * (1024 if match[3] else 1000) ** power)


def _check_size(key: str, value: str, least: int, problems: Problems) -> None:
    fits = bool(_SIZE.match(value.strip())) and size_in_bytes(value) >= least
    problems.require(fits, key, value, "must be a size such as 200MB or 4GB")
