"""The truth about projection: :func:`usllm.sketch.project`, in plain torch."""

from usllm.sketch.codec import project

__all__ = ["project"]
