"""What vLLM was started with, as far as packed models care."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from usllm.packed.layouts import CHOICES
from usllm.system.errors import UserError

if TYPE_CHECKING:
    from vllm.config import VllmConfig

_SECTION = "usllm"
_LOAD_FORMATS = ("auto", "hf", "safetensors", "fastsafetensors", "runai_streamer")
"""Those that read the folder's own weight files."""


@dataclass(frozen=True)
class Settings:
    """Of one engine.

    Attributes:
        dtype: That the model computes in.
        layout: What is held of a layer (:func:`usllm.packed.layouts.choose_layouts_`).
        layout_memory: Ceiling on it in bytes, or none.
    """

    dtype: torch.dtype
    layout: str = "auto"
    layout_memory: int | None = None

    @classmethod
    def of(cls, config: VllmConfig) -> Settings:
        """Read an engine's configuration.

        Raises:
            UserError: It asks for what packed models do not have; the key is named.
        """
        parallel = config.parallel_config
        for key in ("tensor_parallel_size", "pipeline_parallel_size"):
            if (size := getattr(parallel, key)) > 1:
                raise UserError(f"{key}={size}: a packed layer is not cut into pieces; leave it at 1")
        if config.lora_config is not None:
            raise UserError("enable_lora=True: packed layers take no adapters; serve the model without")
        if (load_format := str(config.load_config.load_format)) not in _LOAD_FORMATS:
            known = ", ".join(_LOAD_FORMATS)
            raise UserError(f"load_format={load_format}: does not read packed weight files; choose one of {known}")
        return cls(config.model_config.dtype, **_section(config.additional_config))

    @staticmethod
    def refuse_left_over(names: Set[str]) -> None:
        """Refuse a model for which vLLM did not ask for all that is stored.

        Raises:
            UserError: A layer was left over; it is named.
        """
        if names:
            raise UserError(
                f"{min(names)}: is in the folder, and vLLM's model has no such layer, {len(names)} in all; "
                "serve it with model_impl=transformers"
            )


def _section(additional: Any) -> dict[str, Any]:
    """The object ``usllm`` of vLLM's ``additional_config``."""
    section = additional.get(_SECTION, {}) if isinstance(additional, dict) else {}
    if not isinstance(section, dict):
        raise UserError(f"additional_config.{_SECTION}={section!r}: must be an object, such as {{'layout': 'compact'}}")
    if odd := sorted(set(section) - {"layout", "layout_memory"}, key=str):
        raise UserError(f"additional_config.{_SECTION}.{odd[0]}: is unknown; there are layout and layout_memory")
    layout, memory = section.get("layout", "auto"), section.get("layout_memory")
    if layout not in CHOICES:
        raise UserError(f"additional_config.{_SECTION}.layout={layout!r}: choose one of {', '.join(CHOICES)}")
    if memory is not None and (type(memory) is not int or memory < 0):
        raise UserError(f"additional_config.{_SECTION}.layout_memory={memory!r}: must be a number of bytes")
    if layout == "compact" and memory is not None:
        raise UserError(
            f"additional_config.{_SECTION}.layout_memory={memory!r}: nothing is held with layout=compact; leave it out"
        )
    return {"layout": layout, "layout_memory": memory}
