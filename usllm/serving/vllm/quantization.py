"""vLLM's view of a packed model: what it asks for each layer, and what cannot be served."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.logger import init_logger
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.v1.worker.worker_base import WorkerWrapperBase

from usllm.packed.config import QUANT_METHOD, PackedConfig
from usllm.packed.layouts import choose_layouts_
from usllm.packed.loading import local_folder
from usllm.serving.vllm.blocks import BlockEmbeddingMethod
from usllm.serving.vllm.folder import ServedFolder, checked_folder
from usllm.serving.vllm.linear import PackedLinearMethod
from usllm.serving.vllm.parts import Parts, entry_of
from usllm.serving.vllm.settings import Settings
from usllm.system.frames import with_room

_log = init_logger("vllm.usllm")  # below vLLM's own logger, the only one that it shows


class PackedQuantization(QuantizationConfig):
    """The section ``quantization_config`` of a packed folder, as vLLM asks for it.

    It is made before vLLM starts its processes, where the folder is checked, and sent to them.

    Args:
        packed: The section, checked.
    """

    def __init__(self, packed: PackedConfig) -> None:
        super().__init__()
        self.packed = packed
        self._folder: ServedFolder | None = None
        self._settings: Settings | None = None
        self._renamed: dict[str, str] = {}
        self._claimed: set[str] = set()
        self._waiting: dict[tuple[str, ...], Parts | None] = {}

    @classmethod
    def get_name(cls) -> str:
        return QUANT_METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 70

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> PackedQuantization:
        """Read the section.

        Raises:
            PackedFormatError: It is impossible, or of an unknown version.
        """
        return cls(PackedConfig.from_dict(config))

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """Check a folder as soon as its path is known; one of the hub's is checked when vLLM has fetched it."""
        if Path(model_name).is_dir():
            self._folder = checked_folder(Path(model_name))

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Learn what vLLM calls the modules that the folder names."""
        for name in (*self.packed.layers, *self.packed.blocks):
            for renamed in hf_to_vllm_mapper.apply_list([name]):
                self._renamed[renamed] = name

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """How a layer is made, loaded and computed with.

        Raises:
            PackedFormatError: The folder is damaged.
            UserError: vLLM was started with settings that packed models do not have.
        """
        if not isinstance(layer, (LinearBase, VocabParallelEmbedding)):
            return None
        folder = self._begin(get_current_vllm_config())
        if isinstance(layer, VocabParallelEmbedding):
            default = folder.head if isinstance(layer, ParallelLMHead) else folder.embedding
            name = next((name for name in (*self._stored_names(prefix), default) if name in self.packed.blocks), None)
            if name is None:
                return None
            self._claimed.add(name)
            return BlockEmbeddingMethod(self.packed.blocks[name], name)
        names = self._stored_names(prefix)
        stored = {name for name in names if entry_of(name, self.packed) is not None}
        if not stored:
            return UnquantizedLinearMethod()
        self._claimed |= stored
        self._waiting[names] = None
        return PackedLinearMethod(names, self.packed, self._loaded)

    def _stored_names(self, prefix: str) -> tuple[str, ...]:
        """Names in the folder of the modules that one of vLLM's fuses."""
        parent, _, last = prefix.rpartition(".")
        names = (f"{parent}.{part}" if parent else part for part in self.packed_modules_mapping.get(last, [last]))
        return tuple(self._renamed.get(name, name) for name in names)

    def _begin(self, config: VllmConfig) -> ServedFolder:
        if self._settings is None:
            self._settings = Settings.of(config)
        if self._folder is None:
            model = config.model_config
            self._folder = checked_folder(local_folder(model.model, model.revision))
        return self._folder

    def _loaded(self, parts: Parts) -> None:
        """Choose layouts when the last layer is there: which are expanded depends on all of them."""
        self._waiting[parts.names] = parts
        found = [parts for parts in self._waiting.values() if parts is not None]
        if len(found) < len(self._waiting):
            return
        assert self._settings is not None
        self._settings.refuse_left_over({*self.packed.layers, *self.packed.blocks} - self._claimed)
        layers, settings = _Layers(found, self._settings.dtype), self._settings
        chosen = choose_layouts_(layers, settings.layout, settings.layout_memory)
        counts = Counter(chosen.values())
        told = ", ".join(f"{count} {layout}" for layout, count in sorted(counts.items()))
        _log.info("usllm: layout=%s, of %d compressed layers %s", settings.layout, len(chosen), told)
        step_with_room()


@lru_cache(maxsize=1)
def step_with_room() -> None:
    """Let vLLM's worker call the model with room for its frames: with hundreds of calls a token it pays."""
    WorkerWrapperBase.execute_model = with_room(WorkerWrapperBase.execute_model)


class _Layers(nn.ModuleList):
    """All parts of a model, with the type that it computes in."""

    def __init__(self, parts: list[Parts], dtype: torch.dtype) -> None:
        super().__init__(parts)
        self.dtype = dtype
