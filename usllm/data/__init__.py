"""Text: sources, tokenising and packing, the order of training, and the Lightning data module.

Only the source specification is imported here; ``datasets`` and Lightning load where they are used.
"""

from usllm.data.sources.spec import SourceSpec

__all__ = ["SourceSpec"]
