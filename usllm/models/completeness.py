"""A model that was not completely read is refused: what is missing would be random, what is left over was meant."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from usllm.system.errors import UserError

_SHOWN = 3


def incompleteness(
    missing: Collection[str] = (), unexpected: Collection[str] = (), misshaped: Collection[str] = ()
) -> str | None:
    """What is wrong with a set of tensors in one line: the first names of each kind and their number; or ``None``."""
    kinds = (
        ("missing", missing),
        ("not part of the model", unexpected),
        ("of another shape than the model's", misshaped),
    )
    parts = [
        f"{len(names)} tensor{'s are' if len(names) > 1 else ' is'} {what} ({_first(names)})"
        for what, names in kinds
        if names
    ]
    return "; ".join(parts) or None


def refuse_incomplete(info: Mapping[str, Any], place: str) -> None:
    """Refuse a model by what ``from_pretrained(…, output_loading_info=True)`` says about its loading.

    A head tied to the embedding is not among the missing.

    Raises:
        UserError: names the first tensors of each kind, their number and the way out.
    """
    problem = incompleteness(
        missing=[str(name) for name in info.get("missing_keys") or ()],
        unexpected=[str(name) for name in info.get("unexpected_keys") or ()],
        misshaped=[_shapes(entry) for entry in info.get("mismatched_keys") or ()],
    )
    if errors := info.get("error_msgs"):
        problem = "; ".join(filter(None, (problem, str(next(iter(errors))).strip().splitlines()[0])))
    if problem is not None:
        raise UserError(
            f"The model at {place} is not the one that its config.json describes: {problem}. Restore the missing "
            "weight files, or the config.json that belongs to them"
        )


def refuse_second_head(model: PreTrainedModel, folder: Path | None, place: str) -> None:
    """Refuse weight files that hold a head of their own where the configuration ties it to the embedding.

    transformers 4 drops such a head without a word; transformers 5 uses it, but saves a configuration that says it is
    tied.

    Args:
        model: loaded.
        folder: where its files lie; ``None`` where that is not known.
        place: what to call the model in the message.

    Raises:
        UserError: names the head and the way out.
    """
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if not getattr(model.config, "tie_word_embeddings", False) or head is None or embedding is None:
        return
    names = {id(module): name for name, module in model.named_modules()}
    head_name, embedding_name = (f"{names[id(module)]}.weight" for module in (head, embedding))
    same = head.weight is embedding.weight
    if same and folder is not None:
        stored = {name: _stored(folder, name) for name in (head_name, embedding_name)}
        first, second = stored.values()
        same = first is None or second is None or torch.equal(first, second)
    if not same:
        raise UserError(
            f"The model at {place} has {head_name} in its weight files, and a config.json that ties it to "
            f"{embedding_name}: set tie_word_embeddings=false there, or restore the config.json of these weights"
        )


def _stored(folder: Path, name: str) -> torch.Tensor | None:
    """One tensor of the safetensors files in ``folder``, where they have it."""
    from safetensors import safe_open

    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            if name in file.keys():  # noqa: SIM118 (not a mapping)
                return file.get_tensor(name)
    return None


def _first(names: Collection[str]) -> str:
    shown = list(names)[:_SHOWN]
    return ", ".join(shown) + (", …" if len(names) > _SHOWN else "")


def _shapes(entry: Any) -> str:
    """A mismatched key: a name, or a name with the stored and the wanted shape."""
    if isinstance(entry, str):
        return entry
    name, *shapes = entry
    return f"{name} ({' for '.join(str(list(shape)) for shape in shapes)})" if shapes else str(name)
