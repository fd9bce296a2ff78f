"""Round to nearest with symmetric codes: :mod:`usllm.compress.methods.rounding` puts it behind the seam."""

from usllm.rounding.config import RoundingConfig

__all__ = ["RoundingConfig"]
