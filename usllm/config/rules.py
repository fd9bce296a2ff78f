"""Ranges, choices, files and cross-field rules of a typed configuration; each broken rule becomes one line."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from usllm.config.schema import DataConfig, EvaluationConfig, HarnessConfig
from usllm.config.structure import built
from usllm.config.trainer_arguments import argument_problems, length_problems
from usllm.data import SourceSpec
from usllm.data.sources.files import is_remote, matching
from usllm.data.sources.kinds import with_kind
from usllm.data.sources.messages import LOSS_ON, NO_TEST_SET
from usllm.data.streaming.order import RAISE, SKIP
from usllm.data.windows import WINDOW_STARTS
from usllm.models import ModelSpec
from usllm.system.errors import UserError
from usllm.system.files import expanded, unusable

PRECISIONS = ("auto", "32-true", "bf16-mixed")

TOO_MANY = 2**31
"""Of anything that is counted: what multiplies counts stays within 64 bits."""
MOST_PROCESSES = 1024

PERPLEXITY = "perplexity"
METRICS = (PERPLEXITY, f"{PERPLEXITY}/<test set>/<window>", "bits_per_weight", "model_bytes")
"""What ``optimized_metric`` may name."""


class Problems(list[str]):
    """A list of problem lines with the few kinds of rule that configurations need."""

    def require(self, holds: bool, key: str, value: object, way_out: str) -> None:
        if not holds:
            self.append(f"{key}={value}: {way_out}")

    def number(
        self,
        key: str,
        value: float | None,
        *,
        above: float | None = None,
        least: float | None = None,
        below: float | None = None,
        hint: str = "",
    ) -> None:
        """``value`` must be finite and inside the bounds; ``None`` means "not set" and passes.

        A whole number without an upper bound is a count, and must be below ``TOO_MANY``.
        """
        if value is None:
            return
        if below is None and isinstance(value, int) and value >= TOO_MANY:
            below = TOO_MANY
        bounds: list[tuple[Callable[[float], bool], str]] = []
        if above is not None:
            bounds.append((lambda v: v > above, f"above {above}"))
        if least is not None:
            bounds.append((lambda v: v >= least, f"at least {least}"))
        if below is not None:
            bounds.append((lambda v: v < below, f"below {below}"))
        if not math.isfinite(value) or not all(holds(value) for holds, _ in bounds):
            words = " and ".join(text for _, text in bounds) or "finite"
            self.append(f"{key}={value}: must be {words}{f'; {hint}' if hint else ''}")

    def choice(self, key: str, value: object, choices: Iterable[str]) -> None:
        choices = tuple(choices)
        if value not in choices:
            self.append(f"{key}={value}: unknown; choose one of {', '.join(choices)}")


def check_model(model: ModelSpec, problems: Problems) -> None:
    """The rules of ``ModelSpec``, and that the files it names are there."""
    broken = model.problems()
    problems.extend(broken)
    if broken:
        return
    if model.kind == "folder":
        found = (expanded(str(model.name)) / "config.json").is_file()
        problems.require(found, "model.name", model.name, "no such folder with a config.json in it")
    if model.kind == "gguf":
        found = expanded(str(model.file)).is_file()
        problems.require(found, "model.file", model.file, "no such file; give the path of a .gguf file")


_DATA = "../shared/data/"  # what stands in conf/ for $USLLM_DATA


def check_source(key: str, source: SourceSpec, problems: Problems, may_stream: bool = False) -> None:
    """The rules of ``SourceSpec``, and that the files it names are there and of its kind."""
    broken = source.problems(key)
    if source.streaming and not may_stream:
        broken.append(f"{key}.streaming=true: only what is trained on is streamed; leave it out here")
    missing = [path for path in source.paths if not is_remote(path) and not matching(path)]
    problems.extend(broken)
    for path in missing:
        where = f"relative paths start at {Path.cwd()}"
        if "USLLM_DATA" not in os.environ and path.startswith(_DATA):
            where = "the folder of this configuration's texts is $USLLM_DATA, which is not set"
        problems.require(False, f"{key}.path", path, f"no such file ({where})")
    if not broken and not missing and not source.streaming:  # of many files the first are looked at when it is opened
        try:
            with_kind(source, key)
        except UserError as error:
            problems.append(f"{key}: {error}")


def check_objective(objective: dict[str, Any], problems: Problems) -> None:
    """Build the objective once: it checks its own arguments, and takes no memory before it gets a teacher."""
    from usllm.training.objectives import build_objective

    if "name" in objective:
        built(lambda: build_objective(**objective), problems)
    else:
        problems.append("objective.name: needs a value; pass objective=cross_entropy")


def check_data(data: DataConfig, problems: Problems) -> None:
    if data.train is not None:  # it has no default; that it is missing was said before
        check_source("data.train", data.train, problems, may_stream=True)
    if data.validation is not None:
        check_source("data.validation", data.validation, problems)
    elif not streams(data):
        problems.number(
            "data.validation_fraction",
            data.validation_fraction,
            above=0,
            below=1,
            hint="0.02 holds out every fiftieth document",
        )
    for name, source in data.mixture.items():
        check_source(f"data.mixture.{name}", source, problems, may_stream=True)
    shares = sum(source.share for source in data.mixture.values())
    problems.require(shares < 1, "data.mixture", f"shares of {shares:g}", "data.train takes what they leave: below 1")
    problems.number("data.context_length", data.context_length, least=2)
    problems.number("data.max_sequences", data.max_sequences, least=1, hint="null takes the whole text")
    problems.choice("data.window_start", data.window_start, WINDOW_STARTS)
    problems.number("data.batch_size", data.batch_size, least=1)
    problems.number("data.num_proc", data.num_proc, least=1, below=MOST_PROCESSES + 1)
    problems.number("data.num_workers", data.num_workers, least=0, below=MOST_PROCESSES + 1)
    _check_streams(data, problems)
    problems.choice("data.loss_on", data.loss_on, LOSS_ON)
    sources = [source for source in (data.train, data.validation, *data.mixture.values()) if source is not None]
    if data.loss_on != DataConfig.loss_on and all(source.messages_field is None for source in sources):
        problems.append(
            f"data.loss_on={data.loss_on}: says which turns of conversations are learnt; set "
            "data.train.messages_field, or leave it out"
        )
    _check_place("data.cache_dir", data.cache_dir, problems)


def streams(data: DataConfig) -> bool:
    """Whether ``data.train`` is streamed."""
    return data.train is not None and data.train.streaming


def _check_streams(data: DataConfig, problems: Problems) -> None:
    """What belongs to streamed sources has its effect on one, and what they cannot do is not asked of them."""
    problems.number("data.shuffle_buffer", data.shuffle_buffer, least=1)
    problems.number("data.validation_documents", data.validation_documents, least=1)
    problems.choice("data.on_bad", data.on_bad, (RAISE, SKIP))
    train = data.train
    streamed = [source for source in (train, *data.mixture.values()) if source is not None and source.streaming]
    if not streamed:
        for key in ("shuffle_buffer", "on_bad"):
            if (value := getattr(data, key)) != getattr(DataConfig, key):
                way_out = "belongs to streamed text; set data.train.streaming=true, or leave it out"
                problems.append(f"data.{key}={value}: {way_out}")
    if data.validation_documents != DataConfig.validation_documents and not (streams(data) and data.validation is None):
        problems.append(
            f"data.validation_documents={data.validation_documents}: are set aside from a streamed data.train where "
            "data.validation is null; leave it out"
        )
    if train is not None and train.streaming and data.max_sequences is not None:
        problems.append(
            f"data.max_sequences={data.max_sequences}: counts the sequences of packed text; of a stream "
            "trainer.max_steps and trainer.tokens take as many as they need"
        )


def _check_place(key: str, folder: str, problems: Problems) -> None:
    """A folder that files will be written to can be made."""
    reason = unusable(expanded(folder) / "file")
    problems.require(reason is None, key, folder, f"{reason}; choose another folder")


def check_evaluation(evaluation: EvaluationConfig, problems: Problems) -> None:
    for name, source in evaluation.test_sets.items():
        check_source(f"evaluation.test_sets.{name}", source, problems)
        key = f"evaluation.test_sets.{name}.messages_field"
        problems.require(source.messages_field is None, key, source.messages_field, NO_TEST_SET)
    problems.require(
        len(evaluation.windows) > 0, "evaluation.windows", evaluation.windows, "give at least one, say 512"
    )
    for window in evaluation.windows:
        problems.number("evaluation.windows", window, least=2)
    problems.number("evaluation.max_windows", evaluation.max_windows, least=1)
    problems.number("evaluation.batch_size", evaluation.batch_size, least=1)
    problems.choice("evaluation.precision", evaluation.precision, ("auto", "bf16", "fp32"))
    problems.choice("evaluation.window_start", evaluation.window_start, WINDOW_STARTS)


def check_unseen(seen: Mapping[str, SourceSpec], evaluation: EvaluationConfig, problems: Problems) -> None:
    """No test set is a source of training and calibration, unless ``evaluation.allow_shared`` names it.

    Args:
        seen: sources by what they are called in the configuration.
    """
    for name in evaluation.allow_shared:
        known = ", ".join(evaluation.test_sets) or "there is none"
        problems.require(name in evaluation.test_sets, "evaluation.allow_shared", name, f"no such test set ({known})")
    for name, source in evaluation.test_sets.items():
        for key, trained in seen.items():
            if name not in evaluation.allow_shared and (what := trained.shared_with(source)):
                problems.append(
                    f"evaluation.test_sets.{name}: {what} is also {key}, so its perplexity would not be of unseen "
                    f"text; choose another, or allow it with evaluation.allow_shared=[{name}]"
                )


def sources_of_training(data: DataConfig) -> dict[str, SourceSpec]:
    """What is trained on and calibrated with, by its key."""
    found: dict[str, SourceSpec] = {} if data.train is None else {"data.train": data.train}
    return found | {f"data.mixture.{name}": source for name, source in data.mixture.items()}


def check_harness(harness: HarnessConfig, problems: Problems) -> None:
    """Ranges, and that the folder is there; whether the tasks are known is for the harness to say."""
    path = harness.include_path
    found = path is None or expanded(path).is_dir()
    problems.require(
        found, "harness.include_path", path, "no such folder; give the one that holds the tasks' YAML files"
    )
    problems.number("harness.limit", harness.limit, above=0, below=TOO_MANY, hint="null measures every example")
    if harness.limit is not None and harness.limit > 1:
        whole = float(harness.limit).is_integer()
        problems.require(whole, "harness.limit", harness.limit, "must be a whole number, or a share below 1")
    problems.number("harness.batch_size", harness.batch_size, least=1)
    problems.number("harness.num_fewshot", harness.num_fewshot, least=0, hint="null takes each task's own number")


def check_trainer(trainer: dict[str, Any], warmup_steps: int, problems: Problems, streamed: bool = False) -> None:
    """Length, precision and names of the arguments that go to ``lightning.Trainer``."""
    steps, epochs, tokens = (trainer.get(key) for key in ("max_steps", "epochs", "tokens"))
    if [steps, epochs, tokens].count(None) != 2:
        problems.append(
            f"trainer.max_steps={steps}, trainer.epochs={epochs} and trainer.tokens={tokens}: set exactly one, the "
            "others to null (an epoch is one pass over the packed training text)"
        )
    for key, value, kind, example in (("max_steps", steps, int, 1000), ("epochs", epochs, (int, float), 0.5)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, kind)):
            problems.append(f"trainer.{key}={value}: must be a {'whole ' * (kind is int)}number, such as {example}")
        else:
            bounds = (0, None) if kind is int else (None, 0)
            problems.number(f"trainer.{key}", value, least=bounds[0], above=bounds[1])
    whole = isinstance(tokens, int) and not isinstance(tokens, bool) and 0 < tokens < 2**63
    way_out = "must be a whole number of at least 1 and below 2**63, such as 2_000_000_000"
    problems.require(tokens is None or whole, "trainer.tokens", tokens, way_out)
    if streamed and epochs is not None and steps is None and tokens is None:
        problems.append(
            f"trainer.epochs={epochs}: nobody knows the length of a streamed data.train; set trainer.max_steps or "
            "trainer.tokens, and trainer.epochs=null"
        )
    accumulate = trainer.get("accumulate_grad_batches", 1)
    is_count = isinstance(accumulate, int) and not isinstance(accumulate, bool) and 1 <= accumulate < TOO_MANY
    what = f"must be a whole number of at least 1 and below {TOO_MANY}"
    problems.require(is_count, "trainer.accumulate_grad_batches", accumulate, what)
    problems.choice("trainer.precision", trainer.get("precision", "auto"), PRECISIONS)
    problems.extend(argument_problems(trainer))
    if isinstance(steps, int) and 0 <= steps < TOO_MANY:
        problems.extend(length_problems(trainer, warmup_steps, steps))


def check_nodes(group: str, nodes: dict[str, Any] | None, problems: Problems) -> None:
    """``callbacks`` and ``logger`` hold named nodes, each with a ``_target_``; ``null`` removes one."""
    for name, node in (nodes or {}).items():
        if node is not None and not (isinstance(node, dict) and isinstance(node.get("_target_"), str)):
            problems.append(
                f"{group}.{name}={node}: needs a _target_ (the dotted name of a class), or null to remove it"
            )


def metric_problem(names: Any) -> str | None:
    """What is wrong with ``optimized_metric``, before anything ran: a line, or ``None``."""
    given = [names] if isinstance(names, str) else names
    usable = isinstance(given, Sequence) and bool(given)
    if usable and all(isinstance(n, str) and (n in METRICS or n.startswith(f"{PERPLEXITY}/")) for n in given):
        return None
    return f"optimized_metric={names}: choose one of {', '.join(METRICS)}, or a list of them"
