"""Typed form of the composed configuration.

The YAML files under ``conf/`` hold the defaults that a user sees. Groups that one part of the code reads are typed by
that part (``ModelSpec``, ``SourceSpec``, ``OptimizerConfig``, ``SketchConfig``); the rest is here.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from usllm.data import SourceSpec
from usllm.data.sources import MixedSource
from usllm.models import ModelSpec
from usllm.training.optimization import OptimizerConfig


@dataclass
class DataConfig:
    """Training and validation text, tokenised and packed.

    Attributes:
        train: the text that is trained on.
        validation: the text that is validated on; ``None`` holds out ``validation_fraction`` of the training documents.
        mixture: other texts that are trained on, by name, each with its share of the sequences.
        context_length: tokens per packed sequence.
        max_sequences: train and calibrate on the first ones only; ``None`` takes all.
        window_start: what stands at the start of each sequence: ``none``, ``each`` (the beginning-of-text token) or
            ``auto``, what the model's family needs (:mod:`usllm.data.windows`).
        cache_dir: where packed sequences are kept between runs.
        num_proc: processes that tokenise.
        batch_size: sequences per micro batch.
        num_workers: processes that load batches, and tokenise streamed text.
        shuffle_buffer: documents of a streamed source that are shuffled together.
        validation_documents: the first ones of a streamed ``train``, set aside where ``validation`` is ``None``.
        on_bad: ``raise``, or ``skip`` for files and rows of a stream that cannot be read.
        loss_on: which turns of conversations are learnt: ``assistant``, or ``all``.
    """

    train: SourceSpec
    validation: SourceSpec | None = None
    validation_fraction: float = 0.02
    mixture: dict[str, MixedSource] = field(default_factory=dict)
    context_length: int = 512
    max_sequences: int | None = None
    window_start: str = "auto"
    cache_dir: str = "~/.cache/usllm"
    num_proc: int = 2
    batch_size: int = 4
    num_workers: int = 0
    shuffle_buffer: int = 4096
    validation_documents: int = 500
    on_bad: str = "raise"
    loss_on: str = "assistant"


@dataclass
class AllocationConfig:
    """How states are shared out between channels and layers; part of the options of methods that do so.

    Attributes:
        name: rule over channels; ``None`` for methods that share nothing out over them.
        layer_budget: rule over layers.
        min_importance: channels whose E[a²] is below this share of their layer's mean get nothing.
    """

    name: str | None = "proportional"
    layer_budget: str = "equal"
    min_importance: float = 0.0
    price_list: str = "untrained"
    price_exponent: float = 1.5


@dataclass
class EvaluationConfig:
    """What perplexity is measured on.

    Attributes:
        test_sets: sources by name.
        validation_split: measure the run's held-out text too, as the test set ``validation``.
        windows: tokens per window; each test set is measured with each.
        max_windows: measure only the first ones.
        batch_size: windows per forward pass.
        precision: of the forward passes: ``bf16`` (autocast), ``fp32``, or ``auto``, bf16 where the machine has it.
        window_start: what stands at the start of each window; the configuration takes that of ``data``, where there is
            one.
        allow_shared: names of test sets that may be the very text of training.
    """

    test_sets: dict[str, SourceSpec] = field(default_factory=dict)
    validation_split: bool = True
    windows: list[int] = field(default_factory=lambda: [512])
    max_windows: int | None = None
    batch_size: int = 1
    precision: str = "auto"
    window_start: str = "auto"
    allow_shared: list[str] = field(default_factory=list)


@dataclass
class HarnessConfig:
    """Tasks of lm-evaluation-harness (``pip install 'usllm[eval]'``).

    Attributes:
        tasks: names of tasks, groups or tags, with wildcards; none runs no harness.
        include_path: folder of one's own task files (YAML); they win over the harness' tasks of the same name.
        limit: measure only the first examples of each task; below 1, that share of them.
        batch_size: requests per forward pass.
        num_fewshot: solved examples in front of each question; ``None`` takes each task's own number.
        add_bos_token: whether texts begin with a beginning-of-text token; ``None`` leaves it to the tokenizer.
    """

    tasks: list[str] = field(default_factory=list)
    include_path: str | None = None
    limit: float | None = None
    batch_size: int = 1
    num_fewshot: int | None = None
    add_bos_token: bool | None = None


@dataclass
class TrainConfig:
    """Everything ``usllm-train`` reads. ``sketch`` and ``allocation`` together make one compressor.

    With a ``study`` (its ``name`` and settings, :mod:`usllm.experiments`) the rest describes what the study varies.
    ``block_by_block`` never holds more of the model than a window of blocks (:mod:`usllm.runs.block_by_block`).
    ``optimized_metric`` is what a sweep optimises, :mod:`usllm.runs.sweeps`; ``reuse_statistics`` shares what a dense
    model alone decides with other runs, :mod:`usllm.system.results`.
    """

    name: str
    run_dir: str
    model: ModelSpec
    data: DataConfig
    sketch: dict[str, Any]
    objective: dict[str, Any]
    trainer: dict[str, Any]
    allocation: AllocationConfig = field(default_factory=AllocationConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    stages: dict[str, Any] | None = None
    callbacks: dict[str, Any] | None = None
    logger: dict[str, Any] | None = None
    study: dict[str, Any] | None = None
    seed: int = 0
    resume: bool = False
    block_by_block: bool = False
    optimized_metric: Any = "perplexity"
    reuse_statistics: bool = True
    plugins: list[str] = field(default_factory=list)
    output_root: str = "runs"


@dataclass
class EvalConfig:
    """Everything ``usllm-eval`` reads.

    Attributes:
        ckpt: a checkpoint file or the directory of a run; ``None`` evaluates the dense ``model``.
        device: auto, cpu or cuda.
    """

    run_dir: str
    model: ModelSpec
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    harness: HarnessConfig = field(default_factory=HarnessConfig)
    ckpt: str | None = None
    device: str = "auto"
    name: str = "eval"
    plugins: list[str] = field(default_factory=list)
    seed: int = 0
    output_root: str = "runs"
