"""Makes ``import usllm`` enough for ``AutoModelForCausalLM.from_pretrained`` to read packed models.

transformers takes seconds to import and much of usllm does without it, so usllm does not import it: where transformers
is not loaded yet, registration waits for it to load its table of quantizers.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType

_TABLE = "transformers.quantizers.auto"
_QUANTIZER = "usllm.packed.quantizer"


def register() -> None:
    """Register the quantizer with transformers, now or as soon as transformers is imported. Safe to call again."""
    if _TABLE in sys.modules:
        importlib.import_module(_QUANTIZER)
    elif not any(isinstance(finder, _AfterTable) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterTable())


class _AfterTable(importlib.abc.MetaPathFinder):
    """Lets the import of the table of quantizers go its way, and registers when it is done."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != _TABLE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Registering(spec.loader)
        return spec


class _Registering(importlib.abc.Loader):
    def __init__(self, loader: importlib.abc.Loader) -> None:
        self.loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        importlib.import_module(_QUANTIZER)
