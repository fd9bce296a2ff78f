"""From a composed Hydra configuration to a typed, checked one; every problem ends in the same message."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from usllm.compress import Compressor
from usllm.config import rules
from usllm.config.block_by_block import check_block_by_block
from usllm.config.compression import check_compressor
from usllm.config.overrides import evaluation_beside, idle_beside_checkpoint, key_of
from usllm.config.rules import Problems, metric_problem
from usllm.config.schema import AllocationConfig, DataConfig, EvalConfig, EvaluationConfig, TrainConfig
from usllm.config.structure import NEEDS_A_VALUE, merge_typed
from usllm.system.errors import UserError

T = TypeVar("T")

_OF_WINDOWS = tuple(f"evaluation.{key}" for key in ("windows", "max_windows", "batch_size", "window_start"))


def plain_config(cfg: DictConfig | dict[str, Any]) -> dict[str, Any]:
    """The resolved configuration as plain Python containers (what checkpoints, reports and loggers may hold).

    Raises:
        UserError: An interpolation does not resolve.
    """
    if isinstance(cfg, dict):
        return cfg
    try:
        plain = OmegaConf.to_container(cfg, resolve=True)
    except OmegaConfBaseException as error:
        place = getattr(error, "full_key", None) or "the configuration"
        raise UserError(
            f"{place}: does not resolve: {str(error).splitlines()[0]}; give a key that there is, or \\${{ for the "
            "characters themselves"
        ) from error
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def check_train(cfg: DictConfig | dict[str, Any]) -> TrainConfig:
    """Typed configuration of ``usllm-train``.

    Raises:
        UserError: With all problems in one message, each with key, value and way out.
    """
    problems = Problems()
    config = merge_typed(TrainConfig, plain_config(cfg), problems)
    if config is None or None in (config.model, config.data, config.objective, config.trainer):
        raise user_error(problems)  # a whole group is missing or unusable: nothing to apply the rules to
    check_compressor(config.sketch, config.allocation, problems)
    _check_run(config.name, config.seed, problems)
    rules.check_model(config.model, problems)
    rules.check_data(config.data, problems)
    rules.check_objective(config.objective, problems)
    rules.check_nodes("stages", config.stages, problems)
    rules.check_nodes("callbacks", config.callbacks, problems)
    rules.check_nodes("logger", config.logger, problems)
    rules.check_evaluation(config.evaluation, problems)
    rules.check_unseen(rules.sources_of_training(config.data), config.evaluation, problems)
    if not config.evaluation.test_sets and not config.evaluation.validation_split:
        problems.append("evaluation.test_sets: none given and evaluation.validation_split=false: nothing is measured")
    if (problem := metric_problem(config.optimized_metric)) is not None:
        problems.append(problem)
    rules.check_trainer(config.trainer, config.optimizer.warmup_steps, problems, rules.streams(config.data))
    check_block_by_block(config, problems)
    if problems:
        raise user_error(problems)
    return config


def check_eval(cfg: DictConfig | dict[str, Any], given: Sequence[str] = ()) -> EvalConfig:
    """Typed configuration of ``usllm-eval``.

    Args:
        cfg: the composed configuration.
        given: overrides that the user typed: those that can have no effect are refused.

    Raises:
        UserError: With all problems in one message, each with key, value and way out.
    """
    problems = Problems()
    config = merge_typed(EvalConfig, plain_config(cfg), problems)
    if config is None or config.model is None:
        raise user_error(problems)
    problems.choice("device", config.device, ("auto", "cpu", "cuda"))
    problems.number("seed", config.seed, least=0, below=2**32)
    if config.ckpt is not None:
        problems.require(
            bool(config.ckpt), "ckpt", config.ckpt, "is empty; give the directory of a run, or a .ckpt file"
        )
    if config.ckpt is None:
        rules.check_model(config.model, problems)
    rules.check_evaluation(config.evaluation, problems)
    rules.check_harness(config.harness, problems)
    if config.ckpt is None and not config.evaluation.test_sets and not config.harness.tasks:
        problems.append(
            "evaluation.test_sets: none given; pass data=[<file>,…], or +evaluation.test_sets.<name>.kind=text and "
            "+evaluation.test_sets.<name>.path=<file>, or harness.tasks=[…]"
        )
    problems.extend(_idle(config, given))
    if problems:
        raise user_error(problems)
    return config


def _idle(config: EvalConfig, given: Sequence[str]) -> list[str]:
    """One line for each typed override of ``usllm-eval`` that nothing would come of."""
    found = []
    if config.ckpt is not None:
        found += idle_beside_checkpoint(config.ckpt, given, ("model",))
    for override in given:
        key = key_of(override)
        of_tasks = key == "seed" or (key.startswith("harness.") and key != "harness.tasks")
        if of_tasks and not config.harness.tasks:
            found.append(f"{override}: no task is run; name some with harness.tasks=[…], or leave it out")
        if config.ckpt is None and key == "evaluation.validation_split" and config.evaluation.validation_split:
            found.append(f"{override}: only a run has a validation split; give ckpt=<run>, or leave it out")
        nothing_measured = config.ckpt is None and not config.evaluation.test_sets
        if nothing_measured and key in _OF_WINDOWS:
            found.append(f"{override}: no perplexity is measured; give data=[<file>,…], or leave it out")
    return found


def section_of(cls: type[T], plain: Mapping[str, Any], path: str) -> T:
    """One typed group of a configuration that was checked before, such as one stored in a checkpoint.

    Raises:
        UserError: With all problems of that group.
    """
    problems = Problems()
    section = merge_typed(cls, plain, problems, f"{path}.")
    if section is None or problems:
        raise user_error(problems)
    return section


def sketch_config(config: TrainConfig) -> Any:
    """The options of the method that a checked configuration describes, such as ``SketchConfig``."""
    return compressor_of(config.sketch, config.allocation).options


def evaluation_of_run(run: Mapping[str, Any], composed: EvaluationConfig, given: Sequence[str]) -> EvaluationConfig:
    """What a run was measured on, with what the user typed changed in it; see :func:`evaluation_beside`.

    Args:
        run: the run's configuration.
        composed: the group ``evaluation`` as it was composed.
        given: overrides that the user typed.

    Raises:
        UserError: With all problems of the result.
    """
    section = section_of(EvaluationConfig, evaluation_beside(run["evaluation"], composed, given), "evaluation")
    problems = Problems()
    rules.check_evaluation(section, problems)
    data = run.get("data") or {}
    seen = rules.sources_of_training(section_of(DataConfig, data, "data")) if data.get("train") else {}
    rules.check_unseen(seen, section, problems)
    if problems:
        raise user_error(problems)
    return section


def sketch_config_of(sketch: dict[str, Any], allocation: AllocationConfig) -> Any:
    """The options of the method that the groups ``sketch`` and ``allocation`` describe together.

    Raises:
        UserError: With all problems of the two.
    """
    return compressor_of(sketch, allocation).options


def compressor_of(sketch: dict[str, Any], allocation: AllocationConfig) -> Compressor:
    """The compressor that the groups ``sketch`` and ``allocation`` describe together.

    Raises:
        UserError: With all problems of the two.
    """
    problems = Problems()
    compressor = check_compressor(sketch, allocation, problems)
    if compressor is None or problems:
        raise user_error(problems)
    return compressor


def _check_run(name: str, seed: int, problems: Problems) -> None:
    usable = bool(name) and name not in (".", "..") and not set(name) & set("/\\")
    problems.require(usable, "name", name, "must be a plain name, it becomes a folder under output_root")
    problems.number("seed", seed, least=0, below=2**32)


def user_error(problems: list[str]) -> UserError:
    """One error that lists all ``problems``; a value that is missing is asked for once.

    Rules look at the default that stands in for a missing value, and may have something to say about it.
    """
    missing = [line.partition(NEEDS_A_VALUE)[0] for line in problems if NEEDS_A_VALUE in line]
    about_missing = [re.compile(rf"(?<![\w.]){re.escape(key)}=") for key in missing]
    problems = [
        line for line in problems if NEEDS_A_VALUE in line or not any(key.search(line) for key in about_missing)
    ]
    if len(problems) == 1:
        return UserError(problems[0])
    lines = "\n".join(f"  - {line}" for line in problems)
    return UserError(f"the configuration has {len(problems)} problems:\n{lines}")
