"""Public names of :mod:`usllm.sketch.layer_bytes` at the place where users of earlier versions import them from."""

from usllm.sketch.layer_bytes import pack_layer, read_plan, read_states
from usllm.system.errors import PackedFormatError

__all__ = ["PackedFormatError", "pack_layer", "read_plan", "read_states"]
