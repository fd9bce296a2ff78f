"""``usllm.load``: a packed model, or one clear error; never a model with random layers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from usllm.packed.attention import widen_attention_
from usllm.packed.folder import CONFIG_FILE, PackedFolder, open_folder
from usllm.packed.layouts import CHOICES, asked
from usllm.system.errors import PackedFormatError, UserError, first_line
from usllm.system.files import expanded

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_COMPUTED_BYTES = 1 << 26  # of tensors that a model computes for itself, such as frequencies and masks
_HUB_FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")


def load(
    model: str | Path,
    *,
    dtype: torch.dtype | str = "auto",
    device_map: Any = None,
    layout: str = "auto",
    layout_memory: int | None = None,
    revision: str | None = None,
    **options: Any,
) -> PreTrainedModel:
    """Load a packed model.

    As ``AutoModelForCausalLM.from_pretrained``, but the folder is checked before anything is allocated, and whatever
    was missing, unexpected or newly initialised is an error.

    Args:
        model: Folder written by ``usllm-export``, or the name of one on the Hugging Face hub.
        dtype: That the model computes with; ``auto`` is that of the stored embeddings and norms.
        device_map: As in transformers.
        layout: ``compact``, ``expanded`` or ``decoded``: what is held of each layer; ``auto`` chooses
            (:func:`usllm.packed.layouts.choose_layouts_`).
        layout_memory: Ceiling in bytes on what is held besides what is stored.
        revision: Branch, tag or commit on the hub.
        options: Passed on to ``from_pretrained``. Where no ``attn_implementation`` is among them, ``sdpa`` is that of
            :mod:`usllm.packed.attention`.

    Returns:
        The model in evaluation mode.

    Raises:
        PackedFormatError: A file is missing or damaged; the message begins with the tensor's or file's name.
        UserError: There is no such folder, hub model or layout.
        Exception: Whatever transformers raises for ``device_map``, a ``dtype`` by name or ``options``.
    """
    if "keep_decoded" in options:
        kept = options["keep_decoded"]
        raise UserError(f"keep_decoded={kept}: is layout='decoded', layout_memory={kept} now")
    if layout not in CHOICES:
        raise UserError(f"layout={layout!r}: is unknown; choose one of {', '.join(CHOICES)}")
    path = local_folder(model, revision)
    folder = open_folder(path)
    check_against_model(folder)
    from transformers import AutoModelForCausalLM

    from usllm.packed import quantizer  # noqa: F401 (registers itself)

    by_caller = bool(options) or device_map is not None or (isinstance(dtype, str) and dtype != "auto")
    options = {"trust_remote_code": False, **options, "use_safetensors": True, "output_loading_info": True}
    token = asked.set((layout, layout_memory))
    try:
        loaded: Any
        info: dict[str, Any]
        loaded, info = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, device_map=device_map, **options)  # type: ignore[misc]
    except (PackedFormatError, UserError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # transformers, safetensors and accelerate errors have no common base class
        if by_caller:  # the caller's own options may be at fault: the folder was checked before
            raise
        raise PackedFormatError(f"{path.name}: cannot be loaded ({first_line(error)})") from error
    finally:
        asked.reset(token)
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        if odd := info.get(kind):
            first = next(iter(odd))
            raise PackedFormatError(f"{first}: is among the {kind.replace('_', ' ')} of {path}, {len(odd)} in all")
    model_loaded: PreTrainedModel = loaded
    if options.get("attn_implementation") is None:
        widen_attention_(model_loaded)
    return model_loaded


def check_against_model(folder: PackedFolder) -> PreTrainedModel:
    """Refuse a folder whose tensors are not those of the model that its configuration describes, or whose
    configuration means something else to the installed transformers than to its writer's.

    The model is built without memory; the number of its layers is bounded by the number of stored tensors first.

    Returns:
        That model, on the meta device.

    Raises:
        PackedFormatError: A tensor is missing, unexpected or misshaped, the configuration is impossible, or is
            understood otherwise than when it was written.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    from usllm.packed.quantizer import swap_packed_

    _check_counts(folder.model_config, len(folder.tensors), CONFIG_FILE)
    try:
        config = AutoConfig.from_pretrained(folder.path, trust_remote_code=False)
        del config.quantization_config
        with torch.device("meta"):
            skeleton = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        swap_packed_(skeleton, folder.packed)
    except PackedFormatError:
        raise
    except Exception as error:  # whatever an impossible configuration runs into
        raise PackedFormatError(f"{CONFIG_FILE}: describes no model ({first_line(error)})") from error
    expected = skeleton.state_dict(keep_vars=True)
    computed = sum(buffer.nbytes for name, buffer in skeleton.named_buffers() if name not in expected)
    if computed > _COMPUTED_BYTES:
        raise PackedFormatError(
            f"{CONFIG_FILE}: describes a model with {computed} bytes of tensors that are not stored"
        )
    tied = {name for name, tensor in expected.items() if _first_name(expected, tensor) != name}
    for name, tensor in expected.items():
        stored = folder.tensors.get(name)
        if stored is None:
            if name not in tied:
                raise PackedFormatError(f"{name}: is missing from the weight files")
        elif stored.shape != tuple(tensor.shape):
            raise PackedFormatError(f"{name}: is {list(stored.shape)}, the model's is {list(tensor.shape)}")
        elif (stored.dtype == "U8") != (tensor.dtype == torch.uint8):
            raise PackedFormatError(f"{name}: has the type {stored.dtype}, the model's is {tensor.dtype}")
    if unexpected := sorted(set(folder.tensors) - set(expected)):
        raise PackedFormatError(f"{unexpected[0]}: is in the weight files, but not in the model")
    check_meaning(folder, skeleton)
    empty: PreTrainedModel = skeleton
    return empty


def check_meaning(folder: PackedFolder, model: PreTrainedModel) -> None:
    """Refuse a folder whose configuration the installed transformers understands otherwise than its writer's did.

    Args:
        folder: The folder.
        model: Made from its configuration, on any device.

    Raises:
        PackedFormatError: What differs, and between which versions.
    """
    from usllm.packed.meaning import difference
    from usllm.packed.rotary import refuse_unread_rope

    if not folder.checksums:
        refuse_unread_rope(model.config)
    for stored in folder.checksums.values():
        if what := difference(stored.meaning, model):
            raise PackedFormatError(f"{CONFIG_FILE}: {what}")


def _first_name(tensors: dict[str, torch.Tensor], tensor: torch.Tensor) -> str:
    return next(name for name, other in tensors.items() if other is tensor)


def _check_counts(section: dict[str, Any], tensors: int, where: str) -> None:
    """Numbers of modules must be covered by tensors: a model of a billion layers would take for ever to build."""
    for key, value in section.items():
        if isinstance(value, dict):
            _check_counts(value, tensors, f"{where} {key}")
            continue
        counts_modules = key.startswith(("num_", "n_")) and any(word in key for word in ("layer", "expert", "block"))
        if counts_modules and value is not None and not (isinstance(value, int) and 0 <= value <= tensors):
            raise PackedFormatError(f"{where}: {key}={value!r} is impossible with {tensors} tensors")


def local_folder(model: str | Path, revision: str | None = None) -> Path:
    """The folder of a model, fetched where it is one of the Hugging Face hub.

    Raises:
        UserError: There is no such folder or hub model.
    """
    path = expanded(model)
    if path.is_dir():
        return path
    if path.exists() or str(model).startswith(("/", ".", "~")) or str(model).count("/") != 1:
        what = "is no folder" if path.exists() else "no such folder"
        raise UserError(f"model={model}: {what}; give a packed one from usllm-export, or owner/name on the hub")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(model), revision=revision, allow_patterns=list(_HUB_FILES)))
    except Exception as error:  # HTTP, offline and repository errors have no common base class
        raise UserError(
            f"model={model}: is no folder here, and the Hugging Face hub did not give it ({first_line(error)})"
        ) from error
