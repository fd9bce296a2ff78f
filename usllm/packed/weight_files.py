"""The weight files that transformers is about to read: where they lie, and whether they are what was stored.

``usllm.load`` checks more and earlier (:mod:`usllm.packed.loading`); this is what ``from_pretrained`` alone allows.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open

from usllm.packed.checksums import Checksums, check_keys, check_tensors, refuse_other_models
from usllm.packed.config import PackedConfig
from usllm.packed.folder import CONFIG_FILE, INDEX_FILE, WEIGHTS_FILE, read_json, weight_files
from usllm.packed.meaning import difference
from usllm.packed.rotary import refuse_unread_rope
from usllm.system.errors import PackedFormatError

if TYPE_CHECKING:  # this module is loaded while transformers still is
    from transformers import PreTrainedModel

_log = logging.getLogger(__name__)


def files_of(model: PreTrainedModel, told: Sequence[str] | None) -> list[Path]:
    """Weight files of a model that is being loaded.

    Args:
        model: With ``config.name_or_path`` as transformers sets it.
        told: What transformers tells (from version 5 on).

    Returns:
        The files; none where they cannot be found.
    """
    if told:
        return [Path(file) for file in told]
    place = str(model.config.name_or_path)
    folder = Path(place)
    if not folder.is_dir():
        from huggingface_hub import try_to_load_from_cache

        revision = getattr(model.config, "_commit_hash", None)
        cached = [try_to_load_from_cache(place, file, revision=revision) for file in (WEIGHTS_FILE, INDEX_FILE)]
        found = next((file for file in cached if isinstance(file, str)), None)
        if found is None:
            return []
        folder = Path(found).parent
    if not any((folder / file).is_file() for file in (WEIGHTS_FILE, INDEX_FILE)):
        return []  # a variant of another name
    return [folder / file for file in weight_files(folder)]


def names_in(files: Iterable[Path]) -> set[str]:
    """Names of all tensors."""
    found: set[str] = set()
    for file in files:
        with safe_open(file, framework="pt") as content:
            found |= set(content.keys())
    return found


def check_files(files: Sequence[Path], packed: PackedConfig, model: PreTrainedModel) -> None:
    """Check what is about to be read: the configuration beside the files, their tensors, and what both mean here.

    Args:
        files: Weight files of one folder.
        packed: The packed configuration.
        model: Made from the configuration, and from what the caller of ``from_pretrained`` changed in it.

    Raises:
        PackedFormatError: Something was changed or damaged, or is understood otherwise than when it was written.
    """
    if packed.format_version == 1:
        refuse_unread_rope(model.config)
        return
    if not files:
        _log.warning("The weight files were not found, so their checksums are not compared: use usllm.load")
        return
    with torch.device("cpu"):  # transformers 5 calls where new tensors go to the meta device
        _check(files, packed, model)


def _check(files: Sequence[Path], packed: PackedConfig, model: PreTrainedModel) -> None:
    configuration = files[0].parent / CONFIG_FILE
    model_config = read_json(configuration) if configuration.is_file() else None
    checksums = {file: _checksums(file) for file in files}
    for file, stored in checksums.items():
        if model_config is not None:
            check_keys(model_config, stored)
        check_tensors(file, stored, packed)
    refuse_other_models({file.name: stored for file, stored in checksums.items()})
    meaning = checksums[files[0]].meaning
    if what := difference(meaning, model):
        # The caller may have asked for other settings, which is not the folder's fault: it is asked alone.
        plain = None if model_config is None else _understood_alone(configuration.parent, model)
        if plain is None or (what := difference(meaning, plain)):
            raise PackedFormatError(f"{CONFIG_FILE}: {what}")


def _checksums(file: Path) -> Checksums:
    try:
        with safe_open(file, framework="pt") as content:
            metadata = content.metadata()
    except (OSError, SafetensorError) as error:
        raise PackedFormatError(f"{file.name}: cannot be read ({error})") from error
    return Checksums.from_metadata(metadata, file.name)


def _understood_alone(folder: Path, model: PreTrainedModel) -> Any:
    """The same class of model from the stored configuration alone, without memory."""
    from transformers import AutoConfig

    with torch.device("meta"):
        return type(model)(AutoConfig.from_pretrained(folder, trust_remote_code=False))
