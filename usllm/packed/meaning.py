"""What a model's configuration means to the installed transformers: the facts that decide what is computed.

A configuration means what the reading version makes of it: keys move, defaults change, and what a version does not
know it passes over without a word. So a packed folder stores the facts as its writer's transformers understood them
(rotary tables, scales, norms' epsilons, windows, activations, layer types), and a reader compares its own. Both
versions need not name all facts alike: those are compared that both have.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
import transformers
from packaging.version import Version
from torch import nn

from usllm.packed.rotary import ANY, differing_tables, rotary_tables
from usllm.system.errors import PackedFormatError

if TYPE_CHECKING:  # this module is loaded while transformers still is
    from transformers import PretrainedConfig, PreTrainedModel

_TOLERANCE = 1e-5  # relative; versions and machines compute powers and activations that differ in the last digit
_PROBES = (-6.0, -3.0, -1.0, -0.25, 0.0, 0.25, 1.0, 3.0, 6.0)
# Numbers of modules and configurations that decide nothing about the logits, or that tensors' shapes decide.
_IGNORED = re.compile(
    r"training|layer_idx|.*dropout.*|.*drop_rate|gradient_checkpointing.*|use_cache|.*_token_id|initializer_.*|"
    r"in_features|out_features|num_embeddings|embedding_dim|padding_idx|max_norm|norm_type|scale_grad_by_freq|sparse|"
    r"is_quantized|quantization_method|warnings_issued|supports_.*|max_seq_len_cached|original_max_seq_len|"
    r"rope_.*|partial_rotary_factor|max_position_embeddings|transformers_version|dtype|torch_dtype|"
    r"output_.*|return_dict|pretraining_tp|router_aux_loss_coef|router_jitter_noise|model_type|name_or_path"
)
_Scalar = (bool, int, float, str, type(None))


def meaning_of(model: PreTrainedModel) -> dict[str, Any]:
    """Facts about a model that decide what it computes beside its tensors; JSON types.

    Args:
        model: On any device, also the meta device, dense or packed.

    Returns:
        ``transformers``: the version whose facts they are; ``rotary``: tables by layer type; ``modules``: numbers by
        module, with ``*`` for the layers' numbers, a list where layers differ; ``activations``: values at fixed
        points by module; ``config``: values of the configuration, defaults included.

    Raises:
        PackedFormatError: The configuration is impossible.
    """
    kind = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)  # transformers loads where new tensors are the model's type, on no device
    try:
        with torch.device("cpu"):
            return _meaning(model)
    finally:
        torch.set_default_dtype(kind)


def _meaning(model: Any) -> dict[str, Any]:
    modules: dict[str, list[Any]] = {}
    activations: dict[str, list[Any]] = {}
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    for path, module in model.named_modules():
        place = re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", path.removeprefix(prefix))
        if _is_activation(module):
            activations.setdefault(place, []).append(_probed(module))
        elif not _decodes(module) and not hasattr(module, "inv_freq"):
            for name, value in _numbers(vars(module)):
                modules.setdefault(f"{place}.{name}".lstrip("."), []).append(value)
    return {
        "transformers": transformers.__version__,
        "rotary": rotary_tables(model),
        "modules": _joined(modules),
        "activations": _joined(activations),
        "config": _config_facts(model.config),
    }


def first_difference(
    wanted: Mapping[str, Any], found: Mapping[str, Any] | PreTrainedModel, passed_over: Collection[str] = ()
) -> str | None:
    """The first fact in which two models differ, by name and with both values; ``None`` where they do not.

    Args:
        wanted: :func:`meaning_of` one.
        found: The other, or :func:`meaning_of` it.
        passed_over: Values of the configuration that may differ.
    """
    other = found if isinstance(found, Mapping) else meaning_of(found)
    kept = {key: value for key, value in wanted["config"].items() if key not in passed_over}
    return next(_differences({**wanted, "config": kept}, other), None)


def difference(stored: Mapping[str, Any], model: PreTrainedModel) -> str | None:
    """What the installed transformers understands otherwise than the writer of a folder did; ``None`` if nothing.

    Args:
        stored: :func:`meaning_of` the writer, of any origin.
        model: The model as it is understood here.

    Raises:
        PackedFormatError: ``stored`` is no such description.
    """
    found = meaning_of(model)
    writer = stored.get("transformers")
    parts = [stored.get(part) for part in ("rotary", "modules", "activations", "config")]
    if not isinstance(writer, str) or not all(isinstance(part, dict) for part in parts):
        raise PackedFormatError("config.json: what it meant to its writer is not stored; download the files again")
    try:
        what = first_difference(stored, found)
    except (TypeError, ValueError, AttributeError, RuntimeError, OverflowError) as error:  # facts of impossible types
        raise PackedFormatError(f"config.json: what it meant to its writer cannot be read ({error})") from error
    if what is None:
        return None
    versions = f"written by transformers {_shown(writer)}, read by {transformers.__version__}"
    return f"{what}: {versions}; {_way_out(writer)}"


def _differences(stored: Mapping[str, Any], found: Mapping[str, Any]) -> Iterator[str]:
    for kind in differing_tables(stored["rotary"], found["rotary"], _TOLERANCE):
        yield "rotary table differs" if kind == ANY else f"rotary table of layer type {_shown(kind)} differs"
    for part in ("modules", "activations", "config"):
        for name in sorted(set(stored[part]) & set(found[part])):
            ours, theirs = stored[part][name], found[part][name]
            if not _same(ours, theirs, 1.0 if part == "activations" else 0.0):
                shown = "" if part == "activations" else f" ({_shown(ours)} is read as {_shown(theirs)})"
                yield f"{_shown(name)} differs{shown}"


def _way_out(writer: str) -> str:
    if writer == transformers.__version__:
        return "the configuration is not the one that the tensors were stored with: download it again"
    try:
        older = Version(writer) < Version(transformers.__version__)
    except ValueError:
        older = False
    if older:
        return f"install transformers {_shown(writer)}, or export the model again with this version"
    return "upgrade transformers"


def _shown(value: Any) -> str:
    """A value of any origin as printable ASCII of at most 80 characters."""
    return ascii(str(value)[:80])[1:-1][:80]


def _is_activation(module: nn.Module) -> bool:
    return type(module).__module__ in ("transformers.activations", "torch.nn.modules.activation") and not any(
        True for _ in module.parameters()
    )


def _decodes(module: nn.Module) -> bool:
    """Whether tensors alone say what a module computes; packed ones stand where dense ones did."""
    return type(module) in (nn.Linear, nn.Embedding) or type(module).__module__.startswith("usllm.")


@torch.no_grad()
def _probed(module: nn.Module) -> list[float] | None:
    try:
        values = module(torch.tensor(_PROBES)).tolist()
    except (TypeError, RuntimeError):  # of more than one argument
        return None
    return [float(f"{value:.6g}") for value in values]


def _numbers(attributes: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in attributes.items():
        if not name.startswith("_") and isinstance(value, (bool, int, float)) and not _IGNORED.fullmatch(name):
            yield name, value


def _config_facts(config: PretrainedConfig) -> dict[str, Any]:
    """Values of a text model's own configuration, without what every configuration has; tying is told apart."""
    from transformers import PretrainedConfig

    config = config.get_text_config()
    general = set(vars(PretrainedConfig()))
    facts = {
        name: list(value) if isinstance(value, (list, tuple)) else value
        for name, value in vars(config).items()
        if name not in general and not name.startswith("_") and not _IGNORED.fullmatch(name) and _is_plain(value)
    }
    if "sliding_window" in facts:
        facts["sliding_window"] = facts["sliding_window"] or None  # 0 in some versions where none is used
    return facts | {"tie_word_embeddings": bool(getattr(config, "tie_word_embeddings", False))}


def _is_plain(value: Any) -> bool:
    return isinstance(value, _Scalar) or (
        isinstance(value, (list, tuple)) and all(isinstance(item, _Scalar) for item in value)
    )


def _joined(values: Mapping[str, Iterable[Any]]) -> dict[str, Any]:
    """One value where all layers agree, else one for each."""
    joined = {}
    for name, of_layers in values.items():
        held = list(of_layers)
        joined[name] = held[0] if all(value == held[0] for value in held) else held
    return joined


def _same(one: Any, other: Any, floor: float) -> bool:
    """Equal up to the tolerance, which is relative down to magnitudes of ``floor``."""
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(_same(a, b, floor) for a, b in zip(one, other, strict=True))
    if all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in (one, other)):
        return one == other or bool(abs(one - other) <= _TOLERANCE * max(abs(one), abs(other), floor))
    return bool(one == other)
