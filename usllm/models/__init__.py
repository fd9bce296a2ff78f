"""Dense models and tokenizers: where they come from and how they are loaded."""

from usllm.models.spec import ModelSpec

__all__ = ["ModelSpec"]
