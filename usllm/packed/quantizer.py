"""transformers' view of a packed model: ``quant_method: usllm`` in ``config.json``.

Registered when usllm is imported (:mod:`usllm.packed.registration`); works unchanged from transformers 4.57 to 5.x,
whose hooks differ: arguments that only some versions pass are swallowed by ``**kwargs``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from usllm.packed.block_layers import BlockEmbedding, BlockLinear
from usllm.packed.blocks import check_blocks
from usllm.packed.config import QUANT_METHOD, BlockEntry, PackedConfig
from usllm.packed.folder import refuse_files
from usllm.packed.layouts import asked, choose_layouts_
from usllm.packed.linear import PackedLinear, packed_layers
from usllm.packed.rotary import older_rope
from usllm.packed.saving import checksums_of
from usllm.packed.weight_files import check_files, files_of, names_in
from usllm.system.errors import PackedFormatError

if TYPE_CHECKING:  # this module is loaded while transformers still is
    from transformers import PreTrainedModel


@register_quantization_config(QUANT_METHOD)
class SketchQuantizationConfig(QuantizationConfigMixin):
    """:class:`usllm.packed.config.PackedConfig` as transformers stores it: attributes of JSON types.

    Raises:
        PackedFormatError: The content is impossible, or of an unknown version.
    """

    def __init__(self, **content: Any) -> None:
        self.quant_method = QUANT_METHOD  # type: ignore[assignment]  # the base class knows its own methods only
        checked = PackedConfig.from_dict({**content, "quant_method": QUANT_METHOD}).to_dict()
        self.__dict__.update(checked)

    @property
    def packed(self) -> PackedConfig:
        """The typed form."""
        return PackedConfig.from_dict(self.__dict__)

    def upgrade_(self) -> PackedConfig:
        """Turn into the version of the format that is written, in place; the typed form."""
        packed = self.packed.upgraded()
        self.__dict__ = packed.to_dict()
        return packed


@register_quantizer(QUANT_METHOD)
class SketchQuantizer(HfQuantizer):
    """Puts packed layers in the place of linear ones before weights are read, and checks them afterwards."""

    requires_calibration = True  # refuses to compress while loading: that is usllm-export's work
    quantization_config: SketchQuantizationConfig

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Nothing but torch is needed."""

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        if model.config.name_or_path:
            refuse_files(Path(model.config.name_or_path))
        packed = self.quantization_config.packed
        swap_packed_(model, packed)
        files = files_of(model, kwargs.get("checkpoint_files"))
        if files:
            found = _without_prefix(model, names_in(files))
            self._refuse_missing(model, lambda name: name not in found)
        check_files(files, packed, model)

    def update_missing_keys(self, model: PreTrainedModel, missing_keys: list[str], prefix: str) -> list[str]:
        """transformers 4 asks here; later versions do not, but tell the files before."""
        missing = _without_prefix(model, missing_keys)
        self._refuse_missing(model, lambda name: name in missing)
        return missing_keys

    def _refuse_missing(self, model: PreTrainedModel, is_missing: Callable[[str], bool]) -> None:
        """A packed tensor that is not in the files would be left as memory happens to be: zeros, or noise."""
        config = self.quantization_config.packed
        names = [*(f"{name}.packed" for name in config.layers), *(f"{name}.weight" for name in config.blocks)]
        wanted = _without_prefix(model, model.state_dict())  # without the head, for a base model
        short = {name: name.removeprefix(f"{model.base_model_prefix}.") for name in names}
        missing = [name for name in names if short[name] in wanted and is_missing(short[name])]
        if missing:
            raise PackedFormatError(f"{missing[0]}: is missing from the weight files, {len(missing)} in all")

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        check_packed(model)
        choose_layouts_(model, *asked.get())
        if hasattr(model, "_weight_conversions"):  # names in the files are the model's own: saving changes none
            model._weight_conversions = []  # type: ignore[assignment]
        for cast in ("half", "float"):  # transformers forbids them for quantised models; bytes they leave alone
            setattr(model, cast, MethodType(getattr(nn.Module, cast), model))
        return model

    def is_serializable(self, safe_serialization: bool | None = None, **kwargs: Any) -> bool:
        """Packed tensors are saved as they are, in safetensors, whose headers hold their checksums."""
        return safe_serialization is not False

    def get_state_dict_and_metadata(
        self, model: PreTrainedModel, *args: Any, **kwargs: Any
    ) -> tuple[None, dict[str, str]]:
        """Metadata of the weight files that are about to be written: checksums, in the newest version of the format."""
        if getattr(model, "_hf_peft_config_loaded", False):
            return None, {}  # what is saved are the adapter's tensors
        packed = self.quantization_config.upgrade_()
        model.config.quantization_config = self.quantization_config
        for key, value in older_rope(model.config.to_dict()).items():  # as an export writes it, for transformers 4
            if getattr(model.config, key, None) is None:
                setattr(model.config, key, value)
        return None, checksums_of(model, packed).to_metadata()

    @property
    def is_trainable(self) -> bool:
        """Adapters can be trained over a packed model; its own layers have no latent weights and never change."""
        return True


def swap_packed_(model: PreTrainedModel, config: PackedConfig) -> None:
    """Replace the layers that a packed configuration names by empty packed ones; in place.

    Args:
        model: Usually on the meta device; new layers are made on the device of the layers that they replace.
        config: The packed configuration. Names may carry the base model's prefix where ``model`` is that base model.

    Raises:
        PackedFormatError: A named layer is not in the model, or has another shape; it is named.
    """
    dtype = model.dtype
    for name, entry in config.layers.items():
        path, linear = _find(model, name, entry.shape, (nn.Linear,))
        with linear.weight.device:
            layer = PackedLinear(entry, config.compressor, name, linear.bias is not None, dtype)
        model.set_submodule(path, layer)
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    tied = head is not None and bool(model.config.get_text_config().tie_word_embeddings)
    prefix = f"{model.base_model_prefix}."
    for name, block in config.blocks.items():
        if head is None and not name.startswith(prefix):
            continue  # the head of a causal model, read without one
        path, module = _find(model, name, block.shape, (nn.Linear, nn.Embedding))
        if not can_be_blocks(module):
            raise PackedFormatError(f"{name}: is a {type(module).__name__}, which cannot be stored in blocks")
        packed = _block_module(module, block, dtype)
        model.set_submodule(path, packed)
        if tied and module is embedding:  # transformers ties what is called `weight`, whatever its type
            tied_head = _block_module(head, block, dtype)
            tied_head.weight = packed.weight
            model.set_output_embeddings(tied_head)


def check_packed(model: nn.Module) -> None:
    """Check every packed layer of a loaded model.

    Raises:
        PackedFormatError: A layer is damaged, or was never loaded; it is named.
    """
    for layer in packed_layers(model).values():
        if layer.packed.device.type != "meta":  # offloaded ones are checked at their first use
            _ = layer.plan
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and parameter.device.type != "meta" and not is_finite(parameter):
            raise PackedFormatError(f"{name}: holds numbers that are not finite")
    for name, module in model.named_modules():
        if isinstance(module, (BlockLinear, BlockEmbedding)) and module.weight.device.type != "meta":
            try:
                check_blocks(module.weight, module.bits, name)
            except ValueError as error:
                raise PackedFormatError(str(error)) from error


@torch.no_grad()
def is_finite(tensor: torch.Tensor) -> bool:
    """Whether all numbers are finite; some rows at a time, to make no large mask."""
    rows = tensor.flatten(0, -2) if tensor.dim() > 1 else tensor[None]
    step = max(1, (1 << 22) // max(rows.shape[1], 1))
    return all(bool(part.isfinite().all()) for part in rows.split(step))


def can_be_blocks(module: nn.Module | None) -> bool:
    """Whether blocks can stand in for a module: not for subclasses, which may scale or normalise what they look up."""
    return type(module) is nn.Linear or (type(module) is nn.Embedding and module.max_norm is None)


def _without_prefix(model: PreTrainedModel, names: Iterable[str]) -> set[str]:
    """Names as the base model has them: files may be read by it or by a model around it."""
    return {name.removeprefix(f"{model.base_model_prefix}.") for name in names}


def _find(
    model: PreTrainedModel, name: str, shape: tuple[int, int], kinds: tuple[type[nn.Module], ...]
) -> tuple[str, Any]:
    path, module = name, _submodule(model, name)
    if module is None:  # AutoModel loads the base model alone, whose names have no prefix
        path = name.removeprefix(f"{model.base_model_prefix}.")
        module = _submodule(model, path)
    if not isinstance(module, kinds) or isinstance(module, PackedLinear):
        raise PackedFormatError(
            f"{name}: {type(model).__name__} has no {' or '.join(kind.__name__ for kind in kinds)} of that name"
        )
    found = tuple(getattr(module, "weight").shape)  # noqa: B009 (any of the kinds has one)
    if found != shape:
        raise PackedFormatError(f"{name}: is {shape[0]}x{shape[1]} in the file, {found[0]}x{found[1]} in the model")
    return path, module


def _submodule(model: nn.Module, path: str) -> nn.Module | None:
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None


def _block_module(module: nn.Module, entry: BlockEntry, dtype: torch.dtype) -> BlockEmbedding | BlockLinear:
    rows, columns = entry.shape
    if isinstance(module, nn.Embedding):
        return BlockEmbedding(rows, columns, entry.bits, dtype=dtype, device=module.weight.device)
    assert isinstance(module, nn.Linear)
    bias = module.bias is not None
    return BlockLinear(columns, rows, entry.bits, bias=bias, dtype=dtype, device=module.weight.device)
