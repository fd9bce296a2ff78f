"""The entry point ``vllm.general_plugins``, which vLLM calls in every process that it starts."""

from __future__ import annotations


def register() -> None:
    """Let vLLM read folders whose ``quant_method`` is ``usllm``. Safe to call again; nothing is imported before."""
    from vllm.model_executor.layers.quantization import register_quantization_config

    from usllm.packed.config import QUANT_METHOD
    from usllm.serving.vllm.quantization import PackedQuantization

    register_quantization_config(QUANT_METHOD)(PackedQuantization)
