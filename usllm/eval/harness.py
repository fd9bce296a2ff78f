"""Tasks of lm-evaluation-harness (``lm_eval``) on a model that is already in memory: dense, sketched or packed.

The harness is an extra, ``pip install 'usllm[eval]'``, and is imported only here and only when called. Its own tasks
download their data; a task file of one's own that reads local data (``dataset_path: json``) needs no network. Task
files are code as much as data (``!function`` imports the Python beside them): take them from people you trust.

Its ``wikitext`` perplexity is per word of detokenised text and no figure of :mod:`usllm.eval.perplexity`.
"""

from __future__ import annotations

import copy
import difflib
import fnmatch
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from usllm.system.errors import UserError
from usllm.system.files import expanded

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

INSTALL = "pip install 'usllm[eval]'"
BOOTSTRAP = 1000
"""Resamples behind the standard errors that have no formula; the harness' 100,000 take minutes. 0 gives no errors."""
# What is kept of the harness' answer, what make_table reads among it.
_KEPT = ("results", "groups", "group_subtasks", "versions", "n-shot", "higher_is_better", "n-samples", "configs")


def find_tasks(tasks: Sequence[str], include_path: str | Path | None = None) -> TaskManager:
    """The harness' index with all ``tasks`` in it. It takes seconds, unless all of them are in ``include_path``.

    Args:
        tasks: names of tasks, groups or tags; wildcards as in file names.
        include_path: folder of one's own task files; they win over the harness' own of the same name.

    Raises:
        UserError: the package is missing, the folder is, or a task is unknown; with the names nearest to it.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ModuleNotFoundError as error:
        raise UserError(f"harness.tasks={list(tasks)}: needs lm-evaluation-harness ({error}); {INSTALL}") from error
    own = None if include_path is None else expanded(include_path)
    if own is not None and not own.is_dir():
        raise UserError(f"harness.include_path={include_path}: no such folder")
    if own is not None:
        index = TaskManager(include_path=str(own), include_defaults=False)
        if set(tasks) <= set(index.all_subtasks):  # a group may name tasks of the harness
            return index
    index = TaskManager(include_path=None if own is None else str(own))
    for name in tasks:
        if not _matches(name, index):
            raise UserError(_unknown(name, index, include_path))
    return index


def run_harness(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    *,
    include_path: str | Path | None = None,
    limit: float | None = None,
    batch_size: int = 1,
    max_length: int | None = None,
    num_fewshot: int | None = None,
    seed: int = 0,
    add_bos_token: bool | None = None,
    autocast: torch.dtype | None = None,
    manager: TaskManager | None = None,
) -> dict[str, Any]:
    """Run tasks on ``model`` where it is; its training mode, the tokenizer and all global RNGs are left as they were.

    Args:
        model: causal language model.
        tokenizer: of the model.
        tasks: names of tasks, groups or tags; wildcards as in file names.
        include_path: folder of one's own task files.
        limit: measure only the first examples of each task; below 1, that share of them.
        batch_size: requests per forward pass.
        max_length: tokens that the model sees at once; ``None`` takes the model's context.
        num_fewshot: solved examples in front of each question; ``None`` takes each task's own number.
        seed: of all four generators that the harness seeds.
        add_bos_token: whether texts begin with a beginning-of-text token; ``None`` leaves it to the tokenizer.
        autocast: dtype of ``torch.autocast``; ``None`` computes in the weights' dtype.
        manager: of :func:`find_tasks`, if it was called before.

    Returns:
        What JSON can hold: the harness' ``results`` (``{task: {"acc,none": …}}``), ``groups``, ``versions``,
        ``n-shot``, ``n-samples``, ``higher_is_better`` and ``configs``, and ``lm_eval_version``, ``seeds``,
        ``settings`` and ``notes``, lines about the figures. A figure that is not finite is ``None``.

    Raises:
        UserError: the package is missing, a task is unknown, or its data cannot be had.
    """
    if not tasks:
        raise UserError("harness.tasks=[]: give at least one task")
    manager = manager or find_tasks(tasks, include_path)
    from lightning.pytorch.utilities.seed import isolate_rng
    from lm_eval import __version__, simple_evaluate
    from lm_eval.models.huggingface import HFLM

    seeds = dict.fromkeys(("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed"), seed)
    training = {module for module in nn.Module.modules(model) if module.training}
    with isolate_rng():
        try:
            adapter = HFLM(
                pretrained=model,
                tokenizer=copy.deepcopy(tokenizer),  # it gets a padding token
                batch_size=batch_size,
                max_length=max_length,
                mixed_precision_dtype=autocast,
                # What None means has changed between versions of the harness; all know a missing argument.
                **({} if add_bos_token is None else {"add_bos_token": add_bos_token}),
            )
            found = simple_evaluate(
                model=adapter,
                tasks=list(dict.fromkeys(match for name in tasks for match in _matches(name, manager))),
                num_fewshot=num_fewshot,
                limit=limit,
                task_manager=manager,
                log_samples=False,
                bootstrap_iters=BOOTSTRAP,
                **seeds,
            )
        except (OSError, ImportError) as error:  # no network, no such file, a package that a task wants
            reason = str(error).strip().partition("\n")[0]
            raise UserError(f"harness.tasks={list(tasks)}: cannot be run here ({reason})") from error
        except (ValueError, IndexError, RuntimeError) as error:
            if line := _refused(error, model, tokenizer, num_fewshot):
                raise UserError(line) from error
            raise
        finally:
            for module in training:
                module.training = True
    kept = {key: found[key] for key in _KEPT if key in found}
    settings = {"limit": limit, "batch_size": batch_size, "max_length": adapter.max_length, "num_fewshot": num_fewshot}
    settings["autocast"] = None if autocast is None else str(autocast).removeprefix("torch.")
    settings["add_bos_token"] = add_bos_token
    doubled = adapter.tok_encode("a")[:1] == [adapter.prefix_token_id]
    notes = _notes(found.get("configs", {}), tokenizer) if doubled else []
    return {**_plain(kept), "lm_eval_version": __version__, "seeds": seeds, "settings": settings, "notes": notes}


def _refused(
    error: Exception, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, num_fewshot: int | None
) -> str | None:
    """What the settings have to do with an error of the harness; ``None``: nothing that is known."""
    if "Sample larger than population" in str(error):
        return (
            f"harness.num_fewshot={num_fewshot}: a task has too few documents for so many examples and a question; "
            "give fewer, or null for each task's own number"
        )
    size = model.config.get_text_config().vocab_size
    if not isinstance(error, ValueError) and max(tokenizer.get_vocab().values()) >= size:
        return (
            f"harness.tasks: a text holds a token that the model, which has {size}, does not know: its tokenizer "
            "belongs to another model"
        )
    return None


def harness_tables(result: dict[str, Any] | None) -> list[str]:
    """The harness' own tables of tasks and of groups; none for ``None``."""
    if result is None:
        return []
    from lm_eval.utils import make_table

    return [make_table(result, column) for column in ("results", "groups") if result.get(column)]


def _notes(configs: Mapping[str, Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """What to know about the figures of a tokenizer that puts the harness' own first token before a text."""
    tasks = [name for name, task in configs.items() if task.get("output_type") == "loglikelihood_rolling"]
    if not tasks:
        return []
    return [
        f"{', '.join(tasks)}: lm-evaluation-harness puts a beginning-of-text token before each text, and so does this "
        f"tokenizer ({tokenizer.bos_token}): two stand there; harness.add_bos_token=false leaves one"
    ]


def _matches(name: str, manager: TaskManager) -> list[str]:
    """``name`` itself, or what it matches: tasks before groups, which would run them twice."""
    if name in manager.all_tasks:
        return [name]
    return fnmatch.filter(manager.all_subtasks, name) or fnmatch.filter(manager.all_tasks, name)


def _unknown(name: str, manager: TaskManager, include_path: str | Path | None) -> str:
    near = difflib.get_close_matches(name, manager.all_tasks, n=5)
    hint = f"did you mean {', '.join(near)}?" if near else "`lm-eval ls tasks` lists them all"
    where = (
        "" if include_path is None else f", neither the harness' nor in {include_path} (files with errors are left out)"
    )
    return f"harness.tasks={name}: no such task{where}; {hint}"


def _plain(content: dict[str, Any]) -> Any:
    """``content`` as JSON gives it back: strings for functions, ``None`` for figures that are not finite."""
    from lm_eval.utils import handle_non_serializable

    text = json.dumps(content, default=handle_non_serializable)
    return json.loads(text, parse_constant=lambda _: None)
