"""A saved run: the one reader of its checkpoint."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from usllm.compress import load_plans_, swap_linears_
from usllm.compress.registry import from_checkpoint_section
from usllm.packed.folder import is_packed
from usllm.system.cache import cache_root
from usllm.system.errors import UserError
from usllm.system.files import expanded
from usllm.system.run_files import CHECKPOINT_FOLDER, PACKED_FOLDER, checkpoint_folder
from usllm.training import latest_checkpoint
from usllm.training.checkpoint_section import CHECKPOINT_KEY, check_format
from usllm.training.checkpoints import checkpoints_in
from usllm.training.differences import ADDED_LATER


def find_checkpoint(ckpt: str) -> Path:
    """The checkpoint file that ``ckpt`` stands for: itself, or the newest readable one of a run's directory.

    Raises:
        UserError: there is none.
    """
    path = expanded(ckpt)
    if path.is_file():
        return path
    if path.is_dir():
        for folder in (checkpoint_folder(path), path):
            if (found := latest_checkpoint(folder)) is not None:
                return found
        if is_packed(path / PACKED_FOLDER):
            raise UserError(
                f"ckpt={ckpt}: that run held one block at a time and wrote no checkpoint; its result is "
                f"model={path / PACKED_FOLDER}"
            )
        raise UserError(f"ckpt={ckpt}: the folder holds no checkpoint; {_way_out(path)}")
    raise UserError(f"ckpt={ckpt}: no such file or folder")


def _way_out(folder: Path) -> str:
    """What to give in place of a folder without a checkpoint: the newest run below it, where there are any."""
    below: dict[Path, float] = {}
    for depth in ("*", "*/*"):  # of a name's runs, and of all names
        for kept in folder.glob(f"{depth}/{CHECKPOINT_FOLDER}"):
            with suppress(OSError, ValueError):  # a run that goes on replaces its checkpoints; another has none
                below[kept.parent] = max(file.stat().st_mtime for _, file in checkpoints_in(kept))
    if not below:
        return "give the directory of a run, or a .ckpt file"
    newest = max(below, key=lambda run: below[run])
    return f"give ckpt={newest}" + f", or another of the {len(below)} runs in it" * (len(below) > 1)


def stored_config(saved: Mapping[str, Any], checkpoint: Path) -> dict[str, Any]:
    """The configuration of the run that wrote a checkpoint, with what older versions did in keys that they lacked.

    Args:
        saved: the checkpoint.
        checkpoint: its file, for messages.

    Raises:
        UserError: the checkpoint was not written by ``usllm-train``.
    """
    if CHECKPOINT_KEY not in saved:
        raise UserError(f"ckpt={checkpoint}: was not written by usllm-train")
    config: dict[str, Any] = copy.deepcopy(dict(saved[CHECKPOINT_KEY]["config"]))
    for key, value in ADDED_LATER.items():
        *groups, name = key.split(".")
        section: Any = config
        for group in groups:
            section = section.get(group) if isinstance(section, dict) else None
        if isinstance(section, dict):
            section.setdefault(name, value)
    data = config.get("data")
    if isinstance(data, dict) and "cache_dir" in data:
        data["cache_dir"] = _cache_here(data["cache_dir"])
    return config


def _cache_here(kept: str) -> str:
    """A run's cache, where it can be used; elsewhere, such as on another machine, that of today's environment."""
    path = expanded(kept)
    return kept if path.is_dir() and os.access(path, os.W_OK) else str(cache_root())


def load_sketched_(model: PreTrainedModel, saved: dict[str, Any]) -> None:
    """Turn a dense model into the sketched one of a checkpoint, in place.

    Raises:
        UserError: the checkpoint belongs to another model.
    """
    section = saved[CHECKPOINT_KEY]
    swap_linears_(model, section["patterns"])
    check_format(section)
    load_plans_(model, section["plans"], from_checkpoint_section(section))
    prefix = "model."
    weights = {
        name.removeprefix(prefix): tensor for name, tensor in saved["state_dict"].items() if name.startswith(prefix)
    }
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise UserError(f"the checkpoint does not fit the model that it names ({reason})") from error
