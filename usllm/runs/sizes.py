"""Bits and bytes of a compressed model, as reports of runs hold them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from usllm.compress import CompressionReport, LayerPlan, compressed_layers, compression_report
from usllm.compress.ceilings import shortfall
from usllm.config import TrainConfig, compressor_of


def sizes(model: nn.Module, config: TrainConfig) -> dict[str, Any]:
    """Bits and bytes for the report; a model that was finetuned dense (no calibration, no plans) has none."""
    if any(layer.plan is None for layer in compressed_layers(model).values()):
        return {"bits_per_weight": None, "bytes": None, "compression": None}
    plans = {name: layer.plan for name, layer in compressed_layers(model).items() if layer.plan is not None}
    return sizes_of(compression_report(model), plans, config)


def sizes_of(compression: CompressionReport, plans: Mapping[str, LayerPlan], config: TrainConfig) -> dict[str, Any]:
    """The same from the account of a model and the plans of its layers."""
    compressor = compressor_of(config.sketch, config.allocation)
    parameters = compression.compressed_weights + compression.other_parameters
    return {
        "bits_per_weight": {
            "asked": compressor.options.bits_per_weight,  # None: by a width
            "achieved": compression.bits_per_weight,
            "reason": shortfall(plans, compressor),
            "with_entries": compression.bits_per_weight_with_entries,
            "model": compression.model_bits_per_weight,
        },
        "bytes": {"sketched": compression.model_bytes, "dense_bf16": 2 * parameters},
        "compression": compression.to_dict(),
    }
