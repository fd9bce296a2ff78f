"""What lies beside the tensors of a packed folder, written so that old and new transformers read the same model."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase

from usllm.packed.config import PackedConfig
from usllm.packed.folder import CONFIG_FILE
from usllm.packed.rotary import older_rope
from usllm.system.files import write_text


@dataclass(frozen=True)
class ModelFiles:
    """What goes beside the tensors: configuration, tokenizer, generation settings."""

    config: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase | None = None
    generation: GenerationConfig | None = None


def write_description(
    files: ModelFiles, architecture: str, stored: PackedConfig | None, dtype: torch.dtype, folder: Path
) -> None:
    """Write configuration, generation settings and tokenizer.

    Args:
        files: Of the dense model.
        architecture: Name of the model's class.
        stored: How its tensors are stored; ``None`` where they are an ordinary dense model's.
        dtype: Of the tensors that are neither sketched nor in blocks.
        folder: Where to.
    """
    config = copy.deepcopy(files.config)
    if stored is not None:
        config.quantization_config = stored.to_dict()
    elif hasattr(config, "quantization_config"):
        del config.quantization_config
    config.architectures = [architecture]
    config.dtype = dtype
    config.save_pretrained(folder)
    _add_older_rope(folder / CONFIG_FILE)
    _save_generation(files, folder)
    if files.tokenizer is not None:
        files.tokenizer.save_pretrained(folder)
        _rename_tokenizer(folder / "tokenizer_config.json")


def _add_older_rope(path: Path) -> None:
    """transformers 5 writes ``rope_parameters`` alone, which 4.57 passes over for its defaults."""
    content = json.loads(path.read_text(encoding="utf-8"))
    if older := older_rope(content):
        _write_json(path, older | content)


def _rename_tokenizer(path: Path) -> None:
    """transformers 5's name of the tokenizer class, under which 4.57 finds none, becomes the one that both know."""
    if not path.is_file():
        return
    content = json.loads(path.read_text(encoding="utf-8"))
    if content.get("tokenizer_class") == "TokenizersBackend":
        _write_json(path, {**content, "tokenizer_class": "PreTrainedTokenizerFast"})


def _save_generation(files: ModelFiles, folder: Path) -> None:
    """Published settings may contradict themselves (a temperature without sampling), which transformers won't save."""
    generation = copy.deepcopy(files.generation) or GenerationConfig.from_model_config(files.config)
    try:
        generation.save_pretrained(folder)
    except ValueError:
        generation.do_sample = True
        generation.save_pretrained(folder)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    write_text(path, json.dumps(content, indent=2, sort_keys=True) + "\n")
