"""usllm: finetune Llama models through a sub-1-bit weight sketch, and run what is left from its packed form.

Nothing heavy is imported here: ``usllm.sketch`` and ``usllm.compress`` need torch alone. Importing usllm lets
``transformers`` read packed models.
"""

from __future__ import annotations

from typing import Any

from usllm.packed.registration import register
from usllm.system.version import VERSION

__version__ = VERSION
__all__ = ["__version__", "load"]

register()


def __getattr__(name: str) -> Any:
    if name == "load":
        from usllm.packed.loading import load

        return load
    raise AttributeError(f"module 'usllm' has no attribute {name!r}")
