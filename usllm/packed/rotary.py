"""Rotary position tables, as the installed transformers computes them from a configuration.

transformers 5 keeps the parameters of all layer types in ``rope_parameters``, which 4.57 does not read; the tables are
what both compute with, so they are what is compared.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import transformers
from packaging.version import Version
from torch import Tensor, nn

from usllm.system.errors import PackedFormatError

if TYPE_CHECKING:  # this module is loaded while transformers still is
    from transformers import PretrainedConfig

ANY = "*"
"""Layer type of a table that serves all layer types that have none of their own."""
_NAME = "inv_freq"
_LOCAL = {"rotary_emb_local": "sliding_attention"}  # modules that transformers 4.57 has for the other layer type
_MAX_ENTRIES = 1 << 14  # of a table: half of a head's width
_DIGITS = 8


def rotary_tables(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Tables by layer type: ``frequencies`` (radians per position, [pairs]), ``scaling`` of cosines and sines.

    Where a type of RoPE changes its table with the length of the text, ``long`` is the one at twice the longest.

    Args:
        model: On any device, also the meta device: tables are computed anew from the configuration.

    Raises:
        PackedFormatError: A table is too long to be one.
    """
    tables: dict[str, dict[str, Any]] = {}
    for path, module in model.named_modules():
        buffers = {name for name, _ in module.named_buffers(recurse=False) if name.endswith(_NAME)}
        names = sorted(name for name in buffers if "original" not in name)
        if not names:
            continue
        if any(getattr(module, name).numel() > _MAX_ENTRIES for name in names):
            raise PackedFormatError(f"config.json: describes rotary tables of more than {_MAX_ENTRIES} entries")
        computed = _computed(module)
        for name in names if computed is not None else ():
            kind = name.removesuffix(_NAME).rstrip("_") or _LOCAL.get(path.rpartition(".")[2], ANY)
            tables.setdefault(kind, _table(computed, name))
    return tables


def differing_tables(
    stored: Mapping[str, Mapping[str, Any]], found: Mapping[str, Mapping[str, Any]], tolerance: float
) -> Iterator[str]:
    """Layer types whose tables differ by more than a relative ``tolerance``, or that only one side has."""
    for kind in sorted({*stored, *found}):
        ours, theirs = (tables.get(kind, tables.get(ANY)) for tables in (stored, found))
        pairs = [(ours, theirs)]
        if kind == ANY and None in pairs[0]:  # the other side names the layer types: those without a table of their own
            general, special = (stored, found) if ANY in stored else (found, stored)
            pairs = [(general[ANY], special[other]) for other in special if other not in general]
        if not (stored and found) or not all(_same_table(*pair, tolerance) for pair in pairs):
            yield kind


def refuse_unread_rope(config: PretrainedConfig) -> None:
    """Refuse rotary parameters that transformers 4 passes over: of folders that store no meaning.

    Args:
        config: As transformers read it.

    Raises:
        PackedFormatError: They are only in the form of transformers 5; the key is named.
    """
    if Version(transformers.__version__).major >= 5:
        return
    for key, value in older_rope(vars(config)).items():
        if getattr(config, key, None) != value:
            raise PackedFormatError(
                f"config.json: rope_parameters: transformers {transformers.__version__} does not read them, and takes "
                f"{key}={getattr(config, key, None)!r} for {value!r}; upgrade transformers"
            )


def older_rope(content: Mapping[str, Any]) -> dict[str, Any]:
    """The keys in which transformers 4.57 looks for what ``rope_parameters`` of transformers 5 says.

    Args:
        content: Of ``config.json``.

    Returns:
        ``rope_theta``, and ``rope_scaling``, ``partial_rotary_factor`` and ``rope_local_base_freq`` where they matter;
        empty without ``rope_parameters``.
    """
    parameters = content.get("rope_parameters")
    if not isinstance(parameters, Mapping):
        return {}
    full: Any = parameters
    local: Any = None
    if "rope_theta" not in parameters:  # one for each layer type
        full, local = parameters.get("full_attention"), parameters.get("sliding_attention")
    if not isinstance(full, Mapping) or "rope_theta" not in full:
        return {}
    found: dict[str, Any] = {"rope_theta": full["rope_theta"]}
    if full.get("rope_type", "default") != "default":
        found["rope_scaling"] = {key: full[key] for key in _scaling_keys(content, full) if key in full}
    if "partial_rotary_factor" in full:
        found["partial_rotary_factor"] = full["partial_rotary_factor"]
    if isinstance(local, Mapping) and "rope_theta" in local:
        found["rope_local_base_freq"] = local["rope_theta"]
    return found


def _scaling_keys(content: Mapping[str, Any], parameters: Mapping[str, Any]) -> Sequence[str]:
    """Keys of ``rope_scaling``; 4.57 refuses more than these three of Phi-3, and finds the others beside it."""
    if content.get("model_type") == "phi3" and parameters.get("rope_type") == "longrope":
        return ("type", "short_factor", "long_factor")
    return list(parameters)


def _computed(module: Any) -> nn.Module | None:
    """The module once more, with numbers; ``None`` where it is not made from a configuration alone."""
    try:
        with torch.random.fork_rng(devices=[]):
            made: nn.Module = type(module)(config=module.config)
    except (TypeError, AttributeError):
        return None
    return made


@torch.no_grad()
def _table(module: Any, name: str) -> dict[str, Any]:
    table: Tensor = getattr(module, name)
    scaling = getattr(module, f"{name.removesuffix(_NAME)}attention_scaling", 1.0)
    found: dict[str, Any] = {"frequencies": _rounded(table), "scaling": float(f"{float(scaling):.{_DIGITS}g}")}
    short = table.clone()  # some versions write into it
    long = getattr(_lengthened(module, name.removesuffix(_NAME).rstrip("_")), name)
    return found if torch.equal(long, short) else found | {"long": _rounded(long)}


def _lengthened(module: Any, kind: str) -> Any:
    """The module after a text of twice the longest length."""
    last = torch.tensor([[2 * int(module.config.max_position_embeddings)]])
    arguments: tuple[Any, ...] = (torch.zeros(1, 1, 1), last, *([kind] if kind else []))
    try:
        module(*arguments)
    except TypeError:  # of another signature: its tables are fixed
        return module
    return module


def _rounded(tensor: Tensor) -> list[float]:
    """As JSON, in as many digits as fp32 has; machines compute powers that differ in the last one."""
    return [float(f"{value:.{_DIGITS}g}") for value in tensor.flatten().tolist()]


def _same_table(ours: Mapping[str, Any] | None, theirs: Mapping[str, Any] | None, tolerance: float) -> bool:
    if ours is None or theirs is None or set(ours) != set(theirs):
        return False
    for key, value in ours.items():
        one, other = (torch.tensor(item, dtype=torch.float64, device="cpu") for item in (value, theirs[key]))
        if one.shape != other.shape or not torch.allclose(one, other, rtol=tolerance, atol=0.0):
            return False
    return True
